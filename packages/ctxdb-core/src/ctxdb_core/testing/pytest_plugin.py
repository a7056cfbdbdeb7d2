"""The fixtures that pytest finds when ctxdb is installed. They cost nothing where they are not asked for.

All of them are synchronous: they work for synchronous tests, and for asynchronous ones of every plugin and with event
loops of every scope. Their connections live on an event loop of their own.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect, check_database
from ctxdb_core._databases.loop_engine import has_engines
from ctxdb_core._signatures import signature_of
from ctxdb_core._sqlalchemy.binds import is_read_only
from ctxdb_core._units.lifecycle import new_db_ctx
from ctxdb_core.testing._cleaner import TableCleaner
from ctxdb_core.testing._contexts import put_savepoint_session_in_ctx, set_test_context
from ctxdb_core.testing._shared import WAIT_SECONDS, SharedTransaction
from ctxdb_core.testing._thread import LoopThread
from ctxdb_core.testing._workers import create_database, drop_database, worker_url

__all__ = [
    "ctxdb_clean_tables",
    "ctxdb_dbs",
    "ctxdb_rollback_session",
    "ctxdb_session",
    "ctxdb_shared_transaction",
    "ctxdb_test_context",
    "ctxdb_test_databases",
    "ctxdb_worker_database",
    "pytest_fixture_setup",
    "pytest_runtest_call",
]


@pytest.fixture(scope="session")
def ctxdb_dbs() -> DBConnect | Sequence[DBConnect]:
    """The databases of the tests, to be overridden in ``conftest.py``: one `DBConnect`, or several.

    A read-only `DBConnect` sees the same data as the first one before it whose database has the same name.
    """
    raise pytest.UsageError(
        'Tell ctxdb which databases the tests use: define a fixture `ctxdb_dbs` in conftest.py, with scope="session", '
        "that returns the application's DBConnect, or a list of them."
    )


@pytest.fixture(scope="session")
def _ctxdb_thread(ctxdb_dbs: object) -> Iterator[LoopThread]:
    with LoopThread() as thread:
        yield thread


@pytest.fixture(scope="session")
def _ctxdb_groups(ctxdb_dbs: DBConnect | Sequence[DBConnect], _ctxdb_thread: LoopThread) -> list[list[DBConnect]]:
    """The databases, each with the read-only `DBConnect`s that lead to it."""
    dbs = list(ctxdb_dbs) if isinstance(ctxdb_dbs, Sequence) else [ctxdb_dbs]
    for db in dbs:
        check_database(db)
    groups: list[list[DBConnect]] = []
    by_name: dict[str | None, list[DBConnect]] = {}
    for db in dbs:
        name, read_only = _ctxdb_thread.call(_describe, db)
        if read_only and name in by_name:
            by_name[name].append(db)
        else:
            groups.append([db])
            by_name.setdefault(name, groups[-1])
    return groups


async def _describe(db: DBConnect) -> tuple[str | None, bool]:
    await db.session_maker()
    engine = await db.engine()
    return engine.url.database, is_read_only(engine.sync_engine)


@pytest.fixture
def ctxdb_shared_transaction(
    _ctxdb_groups: list[list[DBConnect]], _ctxdb_thread: LoopThread
) -> Iterator[Mapping[DBConnect, AsyncSession]]:
    """Test and application share a connection to each database; all is rolled back after the test.

    Its value maps each `DBConnect` to the test's session on it. See `ctxdb_core.testing.shared_transaction`.
    """
    with ExitStack() as stack:
        sessions = {}
        for group in _ctxdb_groups:
            shared = SharedTransaction(_ctxdb_thread, tuple(group), WAIT_SECONDS)
            # Before it begins: an interruption, such as that of pytest-timeout, may come in between.
            stack.callback(shared.restore)
            stack.callback(_ctxdb_thread.call, shared.end)
            session = _ctxdb_thread.call(shared.begin)
            sessions.update(dict.fromkeys(group, session))
        yield sessions


@pytest.fixture
def ctxdb_session(ctxdb_shared_transaction: Mapping[DBConnect, AsyncSession]) -> AsyncSession:
    """The test's session on the first database, in `ctxdb_shared_transaction`."""
    return next(iter(ctxdb_shared_transaction.values()))


@pytest.fixture(scope="session")
def ctxdb_test_databases() -> Collection[str]:
    """The names of databases that `ctxdb_clean_tables` may clean, although nothing else says that they are for tests.

    To be overridden in ``conftest.py`` where a database's name does not say that it is for tests. See
    `ctxdb_core.testing.TableCleaner`.
    """
    return ()


@pytest.fixture(scope="session")
def _ctxdb_cleaners(
    _ctxdb_groups: list[list[DBConnect]], _ctxdb_thread: LoopThread, ctxdb_test_databases: Collection[str]
) -> Iterator[list[TableCleaner]]:
    stack = AsyncExitStack()
    cleaners = [TableCleaner(db, test_databases=ctxdb_test_databases) for db, *_ in _ctxdb_groups]
    try:
        yield [_ctxdb_thread.call(stack.enter_async_context, cleaner) for cleaner in cleaners]
    finally:
        _ctxdb_thread.call(stack.aclose)


@pytest.fixture
def ctxdb_clean_tables(_ctxdb_cleaners: list[TableCleaner], _ctxdb_thread: LoopThread) -> Iterator[None]:
    """The application really commits; the tables that have changed are cleaned after the test.

    What was in them when the first such test began is there again. See `ctxdb_core.testing.TableCleaner`.
    """
    yield
    for cleaner in _ctxdb_cleaners:
        _ctxdb_thread.call(cleaner.clean)


@pytest.fixture
def ctxdb_rollback_session(_ctxdb_groups: list[list[DBConnect]], _ctxdb_thread: LoopThread) -> Iterator[AsyncSession]:
    """A session on the first database whose work is rolled back after the test; no other session sees it.

    Together with `ctxdb_test_context`, the test's unit of work has sessions on its connection. See
    `ctxdb_core.testing.rollback_session`.
    """
    shared = SharedTransaction(_ctxdb_thread, tuple(_ctxdb_groups[0]), WAIT_SECONDS, private=True)
    with ExitStack() as stack:
        stack.callback(shared.restore)
        stack.callback(_ctxdb_thread.call, shared.end)
        yield _ctxdb_thread.call(shared.begin)


@pytest.fixture(name="new_db_ctx")
def _new_db_ctx(request: pytest.FixtureRequest) -> None:
    """The test runs in a unit of work of its own, as in `ctxdb_core.new_db_ctx`: for functions that call `db_session`.

    It is committed when the test has ended, and rolled back if the test fails; together with
    `ctxdb_shared_transaction`, all of it is rolled back. Requests that the test makes have units of work of their own.
    """
    _run_in_context(request, "new_db_ctx")


# The database, and the test's session on whose connection the sessions of its unit of work are put.
_beside = pytest.StashKey[tuple[DBConnect, AsyncSession]]()


@pytest.fixture
def ctxdb_test_context(request: pytest.FixtureRequest) -> None:
    """The test runs in a unit of work of its own, committed at its end, which adapters join.

    See `ctxdb_core.testing.set_test_context`.
    """
    _run_in_context(request, "ctxdb_test_context")
    if "ctxdb_rollback_session" in request.fixturenames:
        groups: list[list[DBConnect]] = request.getfixturevalue("_ctxdb_groups")
        request.node.stash[_beside] = groups[0][0], request.getfixturevalue("ctxdb_rollback_session")


# The fixtures whose contexts an asynchronous test is going to run in, and whether it runs already.
_contexts = pytest.StashKey[set[str]]()
_is_running = pytest.StashKey[bool]()


def _run_in_context(request: pytest.FixtureRequest, name: str) -> None:
    if _is_running in request.node.stash:
        raise pytest.UsageError(
            f"{name} has to be there before the test begins: ask for it by a parameter, by "
            f"`@pytest.mark.usefixtures({name!r})`, or in a fixture, and not in the test by `getfixturevalue`."
        )
    if not isinstance(request.node, pytest.Function):
        # A doctest, or an item of another kind, runs as without it.
        return
    if inspect.iscoroutinefunction(getattr(*_place_of_function(request.node))):
        request.node.stash.setdefault(_contexts, set()).add(name)
    elif name in signature_of(request.function).parameters:
        raise pytest.UsageError(f"{name} is for asynchronous tests: this one is a plain function.")
    # A plain test that asks for the fixture by way of another one, which all tests have, runs as without it.


def _place_of_function(item: Any) -> tuple[Any, str]:
    """Return the object and the name of its attribute where the function of a test is looked up when the test runs."""
    if hasattr(item.obj, "hypothesis"):
        # `@given` makes a plain function, which calls this one for each example.
        return item.obj.hypothesis, "inner_test"
    if hasattr(item, "addSuccess"):
        # An item that is a `unittest.TestResult` has the `TestCase` run its method. Where anyio has marked the method,
        # the item is a plain one, which runs its own function.
        return item.instance, item.name
    return item, "obj"


@pytest.fixture(scope="session")
def ctxdb_worker_database() -> Iterator[Callable[..., URL]]:
    """Creates a database for this worker of pytest-xdist, or for the run, and drops it at the end.

    A function ``(url, template=None)`` that returns the database's URL: see `ctxdb_core.testing.worker_url` and
    `create_database`.
    """
    with ExitStack() as stack:
        # Not the thread of the others, which ends before the databases go.
        thread = stack.enter_context(LoopThread())

        def create(url: str | URL, template: str | None = None) -> URL:
            own = worker_url(url)
            thread.call(create_database, own, template)
            stack.callback(thread.call, drop_database, own)
            return own

        yield create


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Iterator[None]:
    """Have the engines of an event loop closed before a fixture closes that loop.

    An engine is closed with its loop's asynchronous generators, as `asyncio.run` and pytest-asyncio 1.0 do it. Older
    versions, and the fixtures named ``event_loop`` that many suites have, close the loop alone.
    """
    yield
    loop = fixturedef.cached_result[0] if fixturedef.cached_result else None
    if isinstance(loop, asyncio.AbstractEventLoop):
        # It runs before the fixture goes on after its `yield`.
        fixturedef.addfinalizer(functools.partial(_close_engines, loop))


def _close_engines(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed() and not loop.is_running() and has_engines(loop):
        loop.run_until_complete(loop.shutdown_asyncgens())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Let a test run in the contexts that its fixtures have asked for: these run in another one than the test."""
    item.stash[_is_running] = True
    with ExitStack() as stack:
        if _contexts in item.stash:
            holder, name = _place_of_function(item)
            test = getattr(holder, name)
            setattr(holder, name, _in_contexts(item, test, item.stash[_contexts]))
            stack.callback(setattr, holder, name, test)
            del item.stash[_contexts]
        yield
    del item.stash[_is_running]


def _in_contexts(item: pytest.Item, test: Callable[..., Any], asked_for: set[str]) -> Callable[..., Any]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        async with AsyncExitStack() as stack:
            if "new_db_ctx" in asked_for:
                await stack.enter_async_context(new_db_ctx())
            if "ctxdb_test_context" in asked_for:
                await stack.enter_async_context(set_test_context(auto_close=True))
            if _beside in item.stash:
                await stack.enter_async_context(put_savepoint_session_in_ctx(*item.stash[_beside]))
            await test(*args, **kwargs)

    return run
