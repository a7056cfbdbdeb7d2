"""The command ``ctxdb-demo``: its promises, databases, mistakes, signals and applications."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import httpx
import psycopg
import pytest
from sqlalchemy import make_url
from tests.support.server import http_client

from ctxdb_core import DBConnect
from ctxdb_demo import cli, demo_database, domain
from ctxdb_demo.demo import connected
from ctxdb_demo.demo_database import open_database, parse_url
from ctxdb_demo.errors import DemoError
from ctxdb_demo.frameworks import FRAMEWORKS
from ctxdb_demo.progress import Progress
from ctxdb_demo.server import HOST, listen
from ctxdb_pgstatus.testing import EmbeddedPostgres, postgres_is_available

COMMAND = Path(sys.executable).with_name("ctxdb-demo")
PASSWORD = "s3cret"
TIMEOUT_SECONDS = 120
UNWANTED_VARIABLES = ("COLUMNS", "DATABASE_URL")

# What each scenario must answer, and what must be in the database afterwards.
PROMISES = {
    "simple write": ("201", "alice 80, bob 60 carol 20 transfers 0 audit 0"),
    "two functions, one transaction": ("201", "alice 50, bob 90 carol 20 transfers 1 audit 0"),
    "early commit": ("422", "alice 50, bob 90 carol 50 transfers 1 audit 0"),
    "early close": ("204", "alice 55, bob 90 carol 50 transfers 1 audit 0"),
    "audit log in a second session": ("201", "alice 55, bob 40 carol 50 transfers 1 audit 2"),
    "roll-back by exception": ("500", "alice 55, bob 40 carol 50 transfers 1 audit 3"),
    "roll-back by status": ("422", "alice 55, bob 40 carol 50 transfers 1 audit 3"),
    "concurrent sessions": ("200", "alice 56, bob 41 carol 51 transfers 1 audit 3"),
    "a commit that fails": ("409", "alice 56, bob 41 carol 51 transfers 1 audit 3"),
    "a slow reader": ("200", "alice 56, bob 41 carol 51 transfers 1 audit 3"),
}

needs_postgres = pytest.mark.skipif(
    not postgres_is_available(), reason="there is no embedded PostgreSQL for this platform"
)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and processes as POSIX has them")


@pytest.fixture(scope="session")
def users_server() -> Iterator[EmbeddedPostgres]:
    """A user's own PostgreSQL, with a password."""
    with EmbeddedPostgres(password=PASSWORD) as server:
        yield server


@pytest.fixture
def temporary() -> Iterator[Path]:
    """What the demo gets as its temporary directory; the account that PostgreSQL runs as can enter it."""
    directory = Path(tempfile.mkdtemp(prefix="test-demo-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@dataclass
class Result:
    """How a run of the demo has ended, and what it has printed."""

    returncode: int | str | None
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the command in this process: a process of its own takes longer to start than most runs take."""
    signals = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if os.name == "posix" else ()))
    handlers = {number: signal.getsignal(number) for number in signals}
    for name in UNWANTED_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        status: int | str | None
        try:
            status = cli.main(arguments)
        except SystemExit as exc:
            status = exc.code
        return Result(status, *capsys.readouterr())

    yield run
    # The command leaves them ignored, for the rest of the life of its process.
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_process(*arguments: str, **environment: str) -> Result:
    """Run the command as its users do."""
    done = subprocess.run(
        [COMMAND, *arguments],
        env=demo_environment(**environment),
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def demo_environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in UNWANTED_VARIABLES}
    return {**inherited, "PYTHONUTF8": "1", **more}


@dataclass
class Row:
    status: str
    before: str
    after: str
    held: str
    kept: str


def table(output: str) -> dict[str, Row]:
    """Return the rows of the printed table by the titles of their scenarios."""
    rows: dict[str, Row] = {}
    block: list[list[str]] = []
    for line in output.splitlines():
        if line.startswith("│"):
            block.append([cell.strip() for cell in line.strip("│").split("│")])
        elif block:
            columns = [" ".join(cell for cell in column if cell) for column in zip(*block, strict=True)]
            rows[block[0][0]] = Row(*columns[1:])
            block = []
    return {title: row for title, row in rows.items() if row.kept in ("yes", "NO")}


def assert_promises_kept(result: Result) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    rows = table(result.stdout)
    assert {title: (row.status, row.after) for title, row in rows.items()} == PROMISES
    assert {row.kept for row in rows.values()} == {"yes"}
    assert [row.before for row in rows.values()][1:] == [row.after for row in rows.values()][:-1]
    assert "Traceback" not in result.stderr


def assert_one_sentence(result: Result, *words: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ctxdb-demo: ")
    for word in words:
        assert word in last
    assert "Traceback" not in result.stderr
    assert PASSWORD not in result.stderr


class TestPromises:
    @needs_postgres
    def test_promises_are_kept_on_the_embedded_postgresql(self, temporary: Path) -> None:
        result = run_process(TMPDIR=str(temporary))
        assert_promises_kept(result)
        assert result.stdout.startswith("FastAPI ")
        assert "on PostgreSQL 18" in result.stdout
        assert list(temporary.iterdir()) == []

    @needs_postgres
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_promises_are_kept_by_each_framework(
        self, framework: str, users_server: EmbeddedPostgres, run: Run
    ) -> None:
        result = run("--framework", framework, "--database-url", users_server.url())
        assert_promises_kept(result)
        assert result.stdout.casefold().startswith(f"{framework} ")

    def test_promises_are_kept_on_sqlite(self, temporary: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        result = run("--database-url", "sqlite://")
        assert_promises_kept(result)
        assert "on SQLite" in result.stdout
        assert list(temporary.iterdir()) == []
        rows = table(result.stdout)
        assert rows["audit log in a second session"].held.endswith("taken 3 times")
        assert rows["concurrent sessions"].held.endswith("taken 4 times 3 at once")

    def test_broken_promises_are_named_and_fail_the_command(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(domain, "commit_db_session", forget)
        result = run("--database-url", "sqlite://")
        assert result.returncode == 1
        rows = table(result.stdout)
        assert rows["early commit"].kept == "NO"
        assert rows["simple write"].kept == "yes"
        assert "early commit: The database changed by nothing instead of {'carol': 30}." in result.stdout

    def test_promises_about_connections_are_checked_as_well(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(domain, "close_db_session", forget)
        rows = table(run("--database-url", "sqlite://").stdout)
        assert {title for title, row in rows.items() if row.kept == "NO"} == {"early close"}


async def forget(db: DBConnect) -> None:
    """Do nothing, in the place of what a promise needs."""


class TestDatabases:
    @needs_postgres
    @pytest.mark.parametrize("driver", ["", "+psycopg"])
    def test_a_users_postgresql_keeps_its_tables_and_none_of_the_demos(
        self, users_server: EmbeddedPostgres, driver: str, run: Run
    ) -> None:
        url = users_server.url().replace("+asyncpg", driver)
        with psycopg.connect(users_server.url("psycopg").replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("CREATE TABLE accounts (id int)")
            try:
                result = run("--database-url", url)
                tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
            finally:
                connection.execute("DROP TABLE accounts")
        assert_promises_kept(result)
        assert PASSWORD not in result.stdout + result.stderr
        assert tables == [("accounts",)]

    @needs_postgres
    def test_tables_of_another_demo_are_left_alone(self, users_server: EmbeddedPostgres, run: Run) -> None:
        with psycopg.connect(users_server.url("psycopg").replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("CREATE TABLE ctxdb_demo_audit (id int)")
            try:
                result = run("--database-url", users_server.url())
                assert_one_sentence(result, "another demo is running", "DROP TABLE ctxdb_demo_audit;")
            finally:
                # Fails where the demo has dropped it.
                connection.execute("DROP TABLE ctxdb_demo_audit")

    def test_a_users_sqlite_file_keeps_its_tables_and_none_of_the_demos(self, tmp_path: Path, run: Run) -> None:
        path = tmp_path / "own.db"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE accounts (id int)")
        assert run("--database-url", f"sqlite:///{path}").returncode == 0
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        connection.close()
        assert tables == [("accounts",)]

    def test_a_sqlite_file_that_did_not_exist_is_removed(self, tmp_path: Path, run: Run) -> None:
        assert run("--database-url", f"sqlite+aiosqlite:///{tmp_path / 'new.db'}").returncode == 0
        assert list(tmp_path.iterdir()) == []

    def test_the_demo_says_that_it_uses_sqlite_without_an_embedded_postgresql(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demo_database, "postgres_is_available", lambda: False)
        result = run()
        assert_promises_kept(result)
        said = "There is no embedded PostgreSQL for this platform: the demo runs on SQLite instead."
        assert said in result.stderr
        assert "as there is no embedded PostgreSQL for this platform" in result.stdout

    def test_on_windows_there_is_no_embedded_postgresql(self) -> None:
        code = (
            "import os, sys; sys.modules['pwd'] = None\n"
            "from ctxdb_pgstatus.testing import postgres_is_available\n"
            "os.name = 'nt'; sys.exit(postgres_is_available())"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.parametrize(
        ("given", "used"),
        [
            ("postgresql://u:p@h:1/d", "postgresql+asyncpg://u:p@h:1/d"),
            ("postgres://h/d", "postgresql+asyncpg://h/d"),
            ("postgresql+psycopg2://h/d", "postgresql+asyncpg://h/d"),
            ("postgresql+psycopg://h/d?sslmode=require", "postgresql+psycopg://h/d?sslmode=require"),
            ("postgresql://h/d?sslmode=require", "postgresql+asyncpg://h/d?ssl=require"),
            ("sqlite:///file.db", "sqlite+aiosqlite:///file.db"),
            ("sqlite+pysqlite:///file.db", "sqlite+aiosqlite:///file.db"),
        ],
    )
    def test_a_url_gets_an_asyncio_driver(self, given: str, used: str) -> None:
        assert parse_url(given) == make_url(used)

    def test_a_url_that_cannot_be_used_is_not_repeated(self) -> None:
        with pytest.raises(DemoError) as raised:
            parse_url(f"postgresql://u:{PASSWORD}@h:port/d")
        assert PASSWORD not in str(raised.value)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--framework", "cobol"], "invalid choice: 'cobol'"),
            (["--port", "0"], "'0' is not a port"),
            (["--port", "many"], "'many' is not a port"),
            (["--frame", "fastapi"], "unrecognized arguments"),
        ],
    )
    def test_a_wrong_option_gets_a_sentence(self, arguments: list[str], words: str, run: Run) -> None:
        result = run(*arguments)
        assert result.returncode == 2
        assert words in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("nonsense", "is not a database URL"),
            (f"postgresql://u:{PASSWORD}@h:port/d", "is not a database URL"),
            (f"mysql://u:{PASSWORD}@h/d", "PostgreSQL and SQLite"),
            (f"postgresql+nonsense://u:{PASSWORD}@h/d", "postgresql+asyncpg://"),
        ],
    )
    def test_a_wrong_url_gets_a_sentence(self, url: str, words: str, run: Run) -> None:
        assert_one_sentence(run("--database-url", url), words)

    @pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
    def test_an_unreachable_database_gets_a_sentence(self, driver: str, run: Run) -> None:
        with socket.socket() as unused:
            # Bound, but not listening: nobody else gets the port meanwhile.
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            result = run("--database-url", f"postgresql+{driver}://u:{PASSWORD}@127.0.0.1:{port}/d")
        assert_one_sentence(result, f"127.0.0.1:{port} cannot be reached", "refused")

    @needs_postgres
    @pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
    def test_a_wrong_password_gets_a_sentence(self, users_server: EmbeddedPostgres, driver: str, run: Run) -> None:
        url = users_server.url(driver).replace(PASSWORD, "guessed")
        result = run("--database-url", url)
        assert_one_sentence(result, "password authentication failed")
        assert "guessed" not in result.stderr

    @needs_postgres
    def test_a_database_that_does_not_exist_gets_a_sentence(self, users_server: EmbeddedPostgres, run: Run) -> None:
        assert_one_sentence(run("--database-url", users_server.url(database="nowhere")), '"nowhere" does not exist')

    def test_a_sqlite_file_that_cannot_be_opened_gets_a_sentence(self, tmp_path: Path, run: Run) -> None:
        result = run("--database-url", f"sqlite:///{tmp_path / 'missing' / 'file.db'}")
        assert_one_sentence(result, "unable to open database file")

    def test_a_missing_driver_gets_a_sentence(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        result = run("--database-url", "postgresql+psycopg://h/d")
        assert_one_sentence(result, "psycopg is not installed", "postgresql+asyncpg://")

    def test_a_port_that_is_taken_gets_a_sentence(self, run: Run) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            result = run("--port", str(port), "--database-url", "sqlite://")
        assert_one_sentence(result, f"Port {port}")

    @needs_postgres
    def test_a_server_that_does_not_start_gets_a_sentence(
        self, temporary: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(temporary))
        wrong = partial(EmbeddedPostgres, {"no_such_setting": "on"})
        monkeypatch.setattr(demo_database, "EmbeddedPostgres", wrong)
        result = run()
        assert result.returncode == 2
        assert 'unrecognized configuration parameter "no_such_setting"' in result.stderr
        assert "Traceback" not in result.stderr
        assert list(temporary.iterdir()) == []


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command; whatever happens, it is over at the end of the block."""
    process = subprocess.Popen(
        [COMMAND, *arguments],
        env=demo_environment(PYTHONUNBUFFERED="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    alarm = threading.Timer(TIMEOUT_SECONDS, process.kill)
    alarm.start()
    try:
        with process:
            yield process
            # Leaving the block waits for the process.
            if process.poll() is None:
                process.terminate()
    finally:
        alarm.cancel()


def read_until(stream: IO[str] | None, words: str) -> str:
    """Read until a line that contains `words`, and return that line."""
    assert stream is not None
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"The output ended without {words!r}.")


def descendants(pid: int) -> set[int]:
    """Return the processes that `pid` has started, directly or not."""
    listing = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listing.splitlines())}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def running(pids: set[int]) -> set[int]:
    listing = subprocess.run(["ps", "-Ao", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    states = dict(line.split() for line in listing.splitlines())
    return {pid for pid in pids if not states.get(str(pid), "Z").startswith("Z")}


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait for what another process does on its own."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def assert_nobody_listens(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@needs_posix
class TestSignals:
    @needs_postgres
    @pytest.mark.parametrize("moment", ["Starting PostgreSQL", "Connecting to", "early close", "a slow reader"])
    def test_ctrl_c_leaves_nothing_behind(self, moment: str, temporary: Path) -> None:
        with started(TMPDIR=str(temporary)) as process:
            read_until(process.stderr, moment)
            children = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "ctxdb-demo: stopped; nothing is left behind."
        assert "Traceback" not in errors
        assert running(children) == set()
        assert list(temporary.iterdir()) == []

    @needs_postgres
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_serving_ends_with_nothing_left_behind(self, number: signal.Signals, status: int, temporary: Path) -> None:
        with started("--serve", TMPDIR=str(temporary)) as process:
            database_port = int(read_until(process.stderr, "Connecting to").split(":")[1].split()[0])
            url = read_until(process.stdout, "Serving on").split()[2]
            read_until(process.stdout, f"curl {url}/accounts")
            assert httpx.get(f"{url}/accounts", trust_env=False).status_code == 200
            children = descendants(process.pid)
            assert children
            process.send_signal(number)
            _, errors = process.communicate()
        assert process.returncode == status
        assert "Traceback" not in errors
        assert running(children) == set()
        assert list(temporary.iterdir()) == []
        assert_nobody_listens(int(url.rpartition(":")[2]))
        assert_nobody_listens(database_port)

    def test_an_impatient_second_ctrl_c_changes_nothing(self, temporary: Path) -> None:
        with started("--serve", "--database-url", "sqlite://", TMPDIR=str(temporary)) as process:
            read_until(process.stdout, "Serving on")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.communicate()
        assert process.returncode == 130
        assert list(temporary.iterdir()) == []

    @needs_postgres
    def test_ctrl_c_drops_the_tables_in_a_users_database(self, users_server: EmbeddedPostgres) -> None:
        with started("--database-url", users_server.url()) as process:
            read_until(process.stderr, "a slow reader")
            process.send_signal(signal.SIGINT)
            process.communicate()
        assert process.returncode == 130
        with psycopg.connect(users_server.url("psycopg").replace("+psycopg", "")) as connection:
            tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert tables == []

    @needs_postgres
    def test_the_embedded_server_goes_even_if_the_demo_is_killed(self, temporary: Path) -> None:
        with started("--serve", TMPDIR=str(temporary)) as process:
            read_until(process.stdout, "Serving on")
            children = descendants(process.pid)
            process.kill()
        assert eventually(lambda: not running(children))
        assert list(temporary.iterdir()) == []


@pytest.fixture(params=FRAMEWORKS)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the bank in one of its frameworks, on a real server."""
    with listen(None) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        async with (
            open_database("sqlite://", Progress()) as database,
            connected(database),
            FRAMEWORKS[request.param].serve(listener),
            http_client(url) as client,
        ):
            yield client


class TestApplications:
    async def test_an_account_that_was_opened_is_there(self, served: httpx.AsyncClient) -> None:
        account = {"owner": "dave", "balance": 10}
        assert (await served.post("/accounts", json=account)).json() == account
        assert account in (await served.get("/accounts")).json()

    async def test_an_account_that_exists_is_a_conflict(self, served: httpx.AsyncClient) -> None:
        assert (await served.post("/accounts", json={"owner": "alice", "balance": 10})).status_code == 409

    async def test_an_unknown_account_is_not_found(self, served: httpx.AsyncClient) -> None:
        assert (await served.get("/accounts/eve/statement")).status_code == 404
        assert (await served.post("/accounts/eve/interest")).status_code == 404

    async def test_too_large_a_transfer_is_refused(self, served: httpx.AsyncClient) -> None:
        response = await served.post("/transfers", json={"source": "alice", "target": "bob", "amount": 1000})
        assert (response.status_code, response.json()) == (422, {"detail": "alice has no account with 1000 in it."})

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/accounts", {"owner": "", "balance": 1}),
            ("/transfers", {"source": "alice", "target": "bob", "amount": -1}),
            ("/accounts/alice/deposits", ["much"]),
            ("/salaries", {"alice": 0}),
            ("/bonus", {}),
            ("/withdrawals", None),
        ],
    )
    async def test_a_wrong_body_is_refused(self, served: httpx.AsyncClient, path: str, body: object) -> None:
        assert (await served.post(path, json=body)).status_code == 422


def test_the_domain_imports_no_framework() -> None:
    code = (
        "import sys, ctxdb_demo.domain\n"
        "sys.exit(bool({'aiohttp', 'fastapi', 'litestar', 'starlette'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_postgres
def test_a_failover_is_shown_and_loses_nothing() -> None:
    result = run_process("--cluster")
    assert result.returncode == 0, result.stderr
    lines = [line.split(" s  ", 1)[1] for line in result.stdout.splitlines()]
    assert "n1 is killed (SIGKILL)" in lines
    assert any(line.startswith("the first payment is acknowledged") for line in lines)
    assert "... 0 payments followed it" in " ".join(lines)
    assert any(line.startswith("lost 0;") for line in lines)
    assert any(line.endswith(", stale 0") for line in lines)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", [["--serve"], ["--framework", "litestar"], ["--database-url", "sqlite://"]])
def test_a_failover_is_not_shown_with_options_for_other_applications(option: list[str], run: Run) -> None:
    result = run("--cluster", *option)
    assert result.returncode == 2
    assert "--cluster brings its own databases" in result.stderr
