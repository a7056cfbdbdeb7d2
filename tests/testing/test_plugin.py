"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import aiosqlite
import asyncpg
import psycopg
import pytest
import starlette.testclient
from tests.support.database import TABLES

from ctxdb_pgstatus.testing import EmbeddedPostgres

pytest_plugins = ["pytester"]

# After a run of pytest in this process, the modules that it has imported are removed, which extension modules do not
# survive. So these are imported before.
IMPORTED = (aiosqlite, asyncpg, starlette.testclient)

OPTIONS = ["-p", "no:cacheprovider", "-Werror"]
# pytest-asyncio warns if this option is not set. Its value makes no difference here.
ASYNCIO = ["-o", "asyncio_default_fixture_loop_scope=function"]

CONFTEST = """
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from ctxdb_core import DBConnect, db_session, new_db_ctx, run_in_new_ctx

db = DBConnect.from_url({url!r})
replica = DBConnect.from_url({url!r}, read_only=True)

@pytest.fixture(scope="session")
def ctxdb_dbs():
    return [db, replica]

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

HELPERS = """
import pytest
from conftest import db, replica
from sqlalchemy import text
from ctxdb_core import db_session, new_db_ctx, new_non_ctx_session, run_in_new_ctx

async def write(name="one"):
    await (await db_session(db)).execute(text("INSERT INTO item VALUES (:name)"), {"name": name})

async def count(db=db):
    async with new_non_ctx_session(db) as session:
        return await session.scalar(text("SELECT count(*) FROM item"))
"""

# Each test finds nothing of the other.
BOTH_STYLES = """
{mark}
class TestShared:
    @pytest.mark.parametrize("number", range(2))
    async def test_shared(self, number, ctxdb_session):
        assert await count() == 0
        await run_in_new_ctx(write)
        assert await count() == await count(replica) == 1
        assert await ctxdb_session.scalar(text("SELECT count(*) FROM item")) == 1

{mark}
class TestClean:
    @pytest.mark.parametrize("number", range(2))
    async def test_clean(self, number, ctxdb_clean_tables):
        assert await count() == 0
        await run_in_new_ctx(write)
        assert await count() == 1
"""


@pytest.fixture(params=["asyncpg", "sqlite"])
def url(request: pytest.FixtureRequest, postgres_server: EmbeddedPostgres, tmp_path: Path) -> Iterator[str]:
    """A database with the tests' tables, whose rows are checked after the run."""
    if request.param == "sqlite":
        file = tmp_path / "plugin.db"
        with closing(sqlite3.connect(file)) as connection:
            for table in TABLES:
                connection.execute(table)
            yield f"sqlite+aiosqlite:///{file}"
            assert connection.execute("SELECT count(*) FROM item").fetchone() == (0,)
        return
    with psycopg.connect(postgres_server.url("psycopg").replace("+psycopg", ""), autocommit=True) as admin:
        admin.execute("CREATE DATABASE plugin_test")
        own = postgres_server.url("asyncpg", "plugin_test")
        with psycopg.connect(own.replace("+asyncpg", ""), autocommit=True) as connection:
            for table in TABLES:
                connection.execute(table)
            yield own
            assert connection.execute("SELECT count(*) FROM item").fetchone() == (0,)
        # DROP without FORCE fails if a run has left a connection.
        admin.execute("DROP DATABASE plugin_test")


Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, url: str) -> Run:
    def run(tests: str, *arguments: str, conftest: str = "") -> pytest.RunResult:
        pytester.makeconftest(CONFTEST.format(url=url) + conftest)
        pytester.makepyfile(HELPERS + tests)
        asyncio_options = [] if "no:asyncio" in arguments else ASYNCIO
        return pytester.runpytest_inprocess(*OPTIONS, *asyncio_options, *arguments)

    return run


@pytest.mark.parametrize(
    ("mark", "arguments"),
    [
        ("", ["--asyncio-mode=auto"]),
        ("@pytest.mark.asyncio(loop_scope='session')", []),
        ("@pytest.mark.anyio", ["-p", "no:asyncio"]),
    ],
    ids=["asyncio", "asyncio-session-loop", "anyio"],
)
def test_both_styles_isolate_tests_under_every_asynchronous_plugin(run: Run, mark: str, arguments: list[str]) -> None:
    run(BOTH_STYLES.format(mark=mark), *arguments).assert_outcomes(passed=4)


def test_both_styles_serve_synchronous_tests_with_a_test_client(run: Run) -> None:
    tests = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown

async def endpoint(request):
    await write()
    return PlainTextResponse(str(await (await db_session(db)).scalar(text("SELECT count(*) FROM item"))))

app = Starlette(routes=[Route("/", endpoint)], lifespan=close_on_shutdown(db))
app.add_middleware(DBSessionMiddleware)

@pytest.mark.parametrize("style", ["ctxdb_shared_transaction", "ctxdb_clean_tables"] * 2)
def test_request(style, request):
    request.getfixturevalue(style)
    with TestClient(app) as client:
        assert client.get("/").text == "1"
"""
    run(tests, "-p", "no:asyncio").assert_outcomes(passed=4)


# Each worker is a process that imports everything anew: SQLite's files are left to test_workers.py.
@pytest.mark.parametrize("url", ["asyncpg"], indirect=True)
def test_each_worker_has_a_database_of_its_own(pytester: pytest.Pytester, url: str) -> None:
    conftest = """
import asyncio
import pytest
from sqlalchemy import text
from ctxdb_core import DBConnect, new_non_ctx_atomic_session
from ctxdb_core.testing import worker_url

db = DBConnect.from_url(worker_url({url!r}))

@pytest.fixture(scope="session")
def ctxdb_dbs(ctxdb_worker_database):
    assert ctxdb_worker_database({url!r}) == worker_url({url!r})

    async def create_tables():
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("CREATE TABLE item (name VARCHAR(40) PRIMARY KEY)"))

    asyncio.run(create_tables())
    return db
"""
    pytester.makeconftest(conftest.format(url=url))
    tests = """
import os

@pytest.mark.parametrize("number", range(6))
async def test_clean(number, ctxdb_clean_tables):
    assert await count() == 0
    await run_in_new_ctx(write)
    assert (await db.engine()).url.database.removesuffix(".db").endswith(os.environ["PYTEST_XDIST_WORKER"])
"""
    pytester.makepyfile(HELPERS.replace(", replica", "") + tests)
    result = pytester.runpytest_subprocess(*OPTIONS, *ASYNCIO, "--asyncio-mode=auto", "-n2")
    result.assert_outcomes(passed=6)


def test_a_rollback_session_is_beside_those_of_the_tests_unit_of_work(run: Run) -> None:
    tests = """
@pytest.mark.parametrize("number", range(2))
async def test_service(number, ctxdb_rollback_session, ctxdb_test_context):
    await write()
    await (await db_session(db)).commit()
    assert await ctxdb_rollback_session.scalar(text("SELECT count(*) FROM item")) == 1
    assert await count() == 0
"""
    run(tests, "--asyncio-mode=auto").assert_outcomes(passed=2)


def test_a_test_context_is_committed(run: Run) -> None:
    tests = """
async def test_service(ctxdb_shared_transaction, ctxdb_test_context):
    await write()

@pytest.fixture
def look(ctxdb_shared_transaction):
    yield
"""
    run(tests, "--asyncio-mode=auto").assert_outcomes(passed=1)


def test_rollback_of_another_sessions_commit_is_an_error_of_the_test(run: Run) -> None:
    tests = """
async def test_audit(ctxdb_shared_transaction):
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await write("undone")
            await run_in_new_ctx(write, "stands")
            raise LookupError

async def test_next(ctxdb_shared_transaction):
    assert await count() == 0
"""
    result = run(tests, "--asyncio-mode=auto")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines("*has undone what another session had committed*ctxdb_clean_tables*")


def test_a_run_without_databases_is_told_what_to_define(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(ctxdb_clean_tables): pass")
    result = pytester.runpytest_inprocess(*OPTIONS, *ASYNCIO)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*define a fixture `ctxdb_dbs` in conftest.py*")


def test_a_database_without_a_mark_of_tests_is_cleaned_only_if_a_fixture_names_it(
    pytester: pytest.Pytester, postgres_server: EmbeddedPostgres
) -> None:
    conftest = CONFTEST.format(url=postgres_server.url())
    tests = "def test_it(ctxdb_clean_tables): pass"
    pytester.makeconftest(conftest)
    pytester.makepyfile(tests)
    result = pytester.runpytest_inprocess(*OPTIONS, *ASYNCIO)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*nothing says that the database 'postgres' is for tests*")
    pytester.makeconftest(
        conftest
        + """
@pytest.fixture(scope="session")
def ctxdb_test_databases():
    return ["postgres"]
"""
    )
    pytester.runpytest_inprocess(*OPTIONS, *ASYNCIO).assert_outcomes(passed=1)


SERVICES = """
pytestmark = pytest.mark.usefixtures("new_db_ctx")

async def test_services_share_a_session(ctxdb_shared_transaction):
    await write()
    assert await (await db_session(db)).scalar(text("SELECT count(*) FROM item")) == 1

async def test_rows_of_the_previous_test_are_gone(ctxdb_shared_transaction):
    assert await (await db_session(db)).scalar(text("SELECT count(*) FROM item")) == 0

def test_plain(): pass
"""


@pytest.mark.parametrize(
    ("mark", "arguments"),
    [("", ["--asyncio-mode=auto"]), ("@pytest.mark.anyio\n", ["-p", "no:asyncio"])],
    ids=["asyncio", "anyio"],
)
def test_a_suite_of_services_runs_in_units_of_work(run: Run, mark: str, arguments: list[str]) -> None:
    run(SERVICES.replace("async def test", f"{mark}async def test"), *arguments).assert_outcomes(passed=3)


UNITTEST = """
import unittest

@pytest.mark.usefixtures("ctxdb_shared_transaction", "{fixture}")
class TestServices(unittest.IsolatedAsyncioTestCase):
    async def test_one(self):
        await write()

    async def test_two(self):
        await write()
        assert await (await db_session(db)).scalar(text("SELECT count(*) FROM item")) == 1
"""


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fixture", ["new_db_ctx", "ctxdb_test_context"])
def test_methods_of_unittest_run_in_units_of_work(run: Run, fixture: str) -> None:
    run(UNITTEST.format(fixture=fixture)).assert_outcomes(passed=2)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fixture", ["new_db_ctx", "ctxdb_test_context"])
def test_methods_of_unittest_that_anyio_runs_are_in_units_of_work(run: Run, fixture: str) -> None:
    services = UNITTEST.format(fixture=fixture).replace("@pytest", "@pytest.mark.anyio\n@pytest", 1)
    run(services, "-p", "no:asyncio").assert_outcomes(passed=2)


# What pytest-asyncio and anyio ask a test about whether hypothesis runs it, and where its function is.
GIVEN = """
import functools
from types import SimpleNamespace

def given(*numbers):
    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            for number in numbers:
                run.hypothesis.inner_test(*args, number=number, **kwargs)

        parameters = [each for each in inspect.signature(test).parameters.values() if each.name != "number"]
        run.__signature__ = inspect.Signature(parameters)
        run.is_hypothesis_test = True
        run.hypothesis = SimpleNamespace(inner_test=test)
        return run
    return decorate

@pytest.mark.parametrize("name", ["one", "two"])
@given(1, 2, 3)
async def test_example(ctxdb_shared_transaction, new_db_ctx, name, number):
    await write(name * number)
    session = await db_session(db)
    assert await session.scalar(text("SELECT count(*) FROM item")) == number
"""


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_each_example_of_hypothesis_runs_in_a_unit_of_work_of_its_own(run: Run) -> None:
    run("import inspect" + GIVEN, "--asyncio-mode=auto").assert_outcomes(passed=2)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_doctests_of_a_suite_run_without_the_unit_of_work_that_all_its_tests_have(run: Run) -> None:
    everywhere = """
@pytest.fixture(autouse=True)
def everywhere(new_db_ctx): pass
"""
    tests = '''
def double(number):
    """
    >>> double(2)
    4
    """
    return 2 * number

async def test_it(ctxdb_shared_transaction):
    await db_session(db)
'''
    run(tests, "--asyncio-mode=auto", "--doctest-modules", conftest=everywhere).assert_outcomes(passed=2)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_fixture_of_the_suites_own_by_the_name_of_one_of_these_is_the_only_one(run: Run) -> None:
    own = """
@pytest.fixture(name="new_db_ctx")
def own_fixture():
    return "own"
"""
    tests = """
from ctxdb_core import ContextNotInitiatedError

async def test_it(new_db_ctx):
    assert new_db_ctx == "own"
    with pytest.raises(ContextNotInitiatedError):
        await db_session(db)
"""
    run(tests, "--asyncio-mode=auto", conftest=own).assert_outcomes(passed=1)


def test_the_unit_of_work_of_a_test_is_committed_when_it_passes_and_rolled_back_when_it_fails(run: Run) -> None:
    tests = """
import asyncio

seen = []

@pytest.fixture
def look(ctxdb_clean_tables):
    yield
    seen.append(asyncio.run(count()))

async def test_passes(look, new_db_ctx):
    await write("one")

async def test_fails(look, new_db_ctx):
    await write("two")
    raise LookupError

def test_recorded_numbers_of_rows():
    assert seen == [1, 0]
"""
    run(tests, "--asyncio-mode=auto").assert_outcomes(passed=2, failed=1)


def test_requests_of_a_test_in_a_unit_of_work_have_their_own(run: Run) -> None:
    tests = """
import httpx
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware

async def respond(scope, receive, send):
    await write()
    await send({"type": "http.response.start", "status": 409, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def test_it(ctxdb_shared_transaction, new_db_ctx):
    session = await db_session(db)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ASGIHTTPDBSessionMiddleware(respond))) as client:
        assert (await client.get("http://test/")).status_code == 409
    assert await session.scalar(text("SELECT count(*) FROM item")) == 0
"""
    run(tests, "--asyncio-mode=auto").assert_outcomes(passed=1)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fixture", ["new_db_ctx", "ctxdb_test_context"])
def test_a_context_that_cannot_be_had_is_told(run: Run, fixture: str) -> None:
    tests = f"""
def test_plain({fixture}): pass

async def test_late(request):
    request.getfixturevalue("{fixture}")
"""
    result = run(tests, "--asyncio-mode=auto")
    result.assert_outcomes(errors=1, failed=1)
    result.stdout.fnmatch_lines(f"*{fixture} is for asynchronous tests*")
    result.stdout.fnmatch_lines(f"*{fixture} has to be there before the test begins*")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_session_outside_of_any_unit_of_work_names_the_testing_tools(run: Run) -> None:
    result = run("async def test_it(): await write()", "--asyncio-mode=auto")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines("*the fixture `new_db_ctx`*set_test_context*")


# The connections that are left would keep the database from being dropped.
@pytest.mark.parametrize("url", ["asyncpg"], indirect=True)
def test_the_engines_of_an_event_loop_that_a_fixture_provides_are_closed_with_the_loop(run: Run) -> None:
    tests = """
import asyncio

@pytest.fixture
def own_loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.mark.parametrize("number", range(2))
def test_it(number, own_loop, ctxdb_clean_tables):
    own_loop.run_until_complete(run_in_new_ctx(write))
    assert own_loop.run_until_complete(count()) == 1
"""
    run(tests, "-p", "no:asyncio").assert_outcomes(passed=2)
