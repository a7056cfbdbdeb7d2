from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url
from tests.support.bytecode import share_bytecode
from tests.support.database import Database, close_observers, eventually, fresh_database
from tests.support.faulty_network import FaultyNetwork
from tests.support.mariadb import MARIADB_DRIVERS, WHY_NOT, EmbeddedMariaDB, maria_database
from tests.support.signals import end_by_sigterm_as_by_ctrl_c, let_children_be_interrupted
from tests.support.workers import begin_with_what_waits, use_workers

from ctxdb_core import DBConnect
from ctxdb_core._units.unit import current_unit
from ctxdb_pgstatus.testing import EmbeddedPostgres

if TYPE_CHECKING:
    from tests.support.browser import Browser, Tab


# Before pytest-xdist looks at its options.
@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    use_workers(config)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    # Nothing of what is collected is garbage, which would be looked for again and again.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begin_with_what_waits(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    leave_out_of_garbage()


# Inside of what pytest itself has around it, so that a warning of the garbage is the last test's of its file.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            leave_out_of_garbage()


def leave_out_of_garbage() -> None:
    """Collect the garbage that there is, and never look again at the objects that stay.

    Python looks for garbage by itself, and many tests have it look. Each time it would look at all modules, at
    thousands of collected tests, and at what frameworks, SQLAlchemy and pytest have kept since: half a second late in a
    run.
    """
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    let_children_be_interrupted()
    end_by_sigterm_as_by_ctrl_c()
    share_bytecode(config)
    # The tests' servers have no TLS. Drivers would prepare it and ask for it at each connection, which takes longer
    # than the connection itself. Tests of TLS say so, and those of failing networks let the drivers ask.
    os.environ.setdefault("PGSSLMODE", "disable")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """The one server of a run, or of each of its workers; each test has a database of its own on it."""
    with EmbeddedPostgres({"max_prepared_transactions": "10"}) as server:
        yield server
        close_observers()


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[EmbeddedMariaDB]:
    """The one MariaDB of a run, or of each of its workers."""
    if WHY_NOT:
        pytest.skip(f"these are not installed: {WHY_NOT}")
    with EmbeddedMariaDB() as server:
        yield server


@pytest.fixture(params=["asyncpg"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def database(
    database_kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Database]:
    """A fresh database; the test fails if it leaves a connection, transaction, query, context or task behind."""
    tasks = asyncio.all_tasks()

    def make_directory() -> Path:
        return tmp_path_factory.mktemp("database")

    made: AbstractAsyncContextManager[Database]
    if database_kind in MARIADB_DRIVERS:
        made = maria_database(database_kind, request.getfixturevalue("mariadb_server"))
    else:
        made = fresh_database(database_kind, request.getfixturevalue("postgres_server"), make_directory)
    async with made as database:
        yield database
        await database.assert_quiet()

    def left() -> set[asyncio.Task[object]]:
        return asyncio.all_tasks() - tasks - {asyncio.current_task()}

    # A driver may still be closing a socket.
    await eventually(lambda: not left(), lambda: f"tasks are left: {left()}")


@pytest.fixture
async def db(database: Database) -> AsyncIterator[DBConnect]:
    async with database.connect() as db:
        yield db
        # Closing it would hide that a connection is still in use.
        await database.assert_quiet()


@pytest.fixture
async def second_db(database: Database) -> AsyncIterator[DBConnect]:
    """A second `DBConnect`, with an engine of its own, on the database of `db`."""
    async with database.connect() as second_db:
        yield second_db


@pytest.fixture
async def far(database: Database, network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DBConnect]:
    """The database, on the other side of the folder's `network`."""
    # A connection begins as it does by default: with the question whether the server has TLS.
    monkeypatch.delenv("PGSSLMODE", raising=False)
    near = database.url
    database.url = make_url(near).set(port=network.port).render_as_string(hide_password=False)
    async with database.connect() as far:
        yield far
        await database.assert_quiet()
    database.url = near


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The one browser of a run, or of each of its workers; each test has a tab and a profile of its own in it."""
    # Tests of single packages run where the libraries that drive the browser are not installed.
    from tests.support.browser import Browser

    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.end()


@pytest.fixture
async def tab(browser: Browser) -> AsyncIterator[Tab]:
    """An empty tab of a browser, with a profile of its own."""
    async with browser.tab() as tab:
        yield tab


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let each async test check the context that it ran in: a fixture runs in another one."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _leaving_no_context(item.obj)


def _leaving_no_context(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)
        assert current_unit.get(None) is None, "a unit of work is left in the test's context"

    return run
