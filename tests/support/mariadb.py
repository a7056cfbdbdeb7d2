"""`EmbeddedMariaDB`: a server from the system's package, and a test's database on it."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import Database, eventually

# The driver is in the group `mariadb` alone.
pymysql: Any = None
with suppress(ImportError):
    pymysql = importlib.import_module("pymysql")

__all__ = ["MARIADB_DRIVERS", "WHY_NOT", "EmbeddedMariaDB", "MariaDatabase", "maria_database"]

MARIADB_DRIVERS = ("asyncmy", "aiomysql")

_PROGRAMS = {
    name: shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")
    for name in ("mariadbd", "mariadb-install-db")
}

WHY_NOT = ", ".join(
    [
        *(f"the program {name} of Debian's mariadb-server" for name, path in _PROGRAMS.items() if path is None),
        *(["the drivers of the group mariadb"] if pymysql is None else []),
    ]
)
"""Names what these tests lack; empty if they can run."""

# The shell outlives a test that is killed. It reads to the end of its standard input, which closes however this process
# ends, and then nothing is left of the server.
_SCRIPT = """
directory=$1
shift
"$@" >"$directory/log" 2>&1 </dev/null &
read -r _
kill -KILL $! 2>/dev/null
wait
rm -rf "$directory"
"""

_START_SECONDS = 60.0


class EmbeddedMariaDB:
    """MariaDB on a port of its own on the loopback interface, as a context manager; without passwords.

    Args:
        options: further options of `mariadbd`.
    """

    host = "127.0.0.1"

    def __init__(self, *options: str) -> None:
        self._options = options

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="ctxdb-mariadb-"))
        self._shell: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        if self._shell is not None:
            assert self._shell.stdin is not None
            self._shell.stdin.close()
            self._shell.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def url(self, driver: str, database: str, port: int | None = None) -> str:
        """Return the URL of a database for a driver of SQLAlchemy's."""
        return f"mysql+{driver}://root@{self.host}:{port or self.port}/{database}"

    def connect(self, database: str | None = None) -> Any:
        """Return a connection in autocommit, for what a test looks up itself."""
        return pymysql.connect(host=self.host, port=self.port, user="root", database=database, autocommit=True)

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.port: int = free.getsockname()[1]
        # MariaDB runs as root only if it is told to.
        account = ["--user=root"] if os.getuid() == 0 else []
        # A server that starts deletes what others have in the directory for temporary files.
        temporary = self._directory / "tmp"
        temporary.mkdir()
        places = [f"--datadir={self._directory / 'data'}", f"--tmpdir={temporary}"]
        install = [str(_PROGRAMS["mariadb-install-db"]), "--no-defaults", *account, *places, "--skip-test-db"]
        installed = subprocess.run(
            [*install, "--auth-root-authentication-method=normal", "--innodb-log-file-size=8M", "--skip-name-resolve"],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert installed.returncode == 0, installed.stdout.decode(errors="replace")[-4000:]
        serve = [str(_PROGRAMS["mariadbd"]), "--no-defaults", *account, *places, f"--port={self.port}"]
        serve += [f"--bind-address={self.host}", f"--socket={self._directory / 'socket'}", "--skip-name-resolve"]
        # The data need not survive the machine.
        serve += [
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=16M",
            "--skip-log-bin",
            *self._options,
        ]
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(self._directory), *serve],
            stdin=subprocess.PIPE,
            # Ctrl-C is for pytest, which closes the shell's input.
            start_new_session=True,
        )
        latest = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.connect().close()
            except pymysql.err.OperationalError:
                if time.monotonic() > latest:
                    log = (self._directory / "log").read_text(encoding="utf-8", errors="replace")
                    raise AssertionError(f"MariaDB does not start: {log[-2000:]}") from None
                time.sleep(0.02)
            else:
                return


@asynccontextmanager
async def maria_database(driver: str, server: EmbeddedMariaDB) -> AsyncIterator[MariaDatabase]:
    """Provide the tests' tables on a server, with nothing in them."""
    pytest.importorskip(driver)
    database = MariaDatabase(server, driver, "test_items")
    try:
        yield database
    finally:
        database.close()


class MariaDatabase(Database):
    """A database with the tests' empty tables on MariaDB, watched through every connection that is made to it.

    Args:
        maria: the server.
        driver: ``asyncmy`` or ``aiomysql``.
        name: what it is called.
    """

    def __init__(self, maria: EmbeddedMariaDB, driver: str, name: str) -> None:
        super().__init__(maria.url(driver, name), name, None)
        self.maria = maria
        self._observer = maria.connect()
        for statement in (
            f"CREATE DATABASE IF NOT EXISTS {name}",
            f"USE {name}",
            "CREATE TABLE IF NOT EXISTS item (name VARCHAR(40) PRIMARY KEY) ENGINE=InnoDB",
            "CREATE TABLE IF NOT EXISTS parent (name VARCHAR(40) PRIMARY KEY) ENGINE=InnoDB",
            # MariaDB has no constraint that is checked at COMMIT.
            "CREATE TABLE IF NOT EXISTS child (parent VARCHAR(40) REFERENCES parent (name)) ENGINE=InnoDB",
            "CREATE TABLE IF NOT EXISTS counter (id INT PRIMARY KEY, value INT NOT NULL) ENGINE=InnoDB",
            "DELETE FROM item",
            "DELETE FROM child",
            "DELETE FROM parent",
            "REPLACE INTO counter VALUES (1, 0), (2, 0)",
        ):
            self._observer.cursor().execute(statement)

    def watch_new(self, **options: Any) -> Any:
        options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 10, **options}
        return self.watch(create_async_engine(self.url, **options))

    def prepare_connection(self, connection: Any) -> None:
        pass

    async def query(self, sql: str) -> list[tuple[Any, ...]]:
        with self._observer.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def statements(self) -> list[str]:
        """Return what this database's connections are running right now."""
        return [row[1] for row in self._processes() if row[1]]

    def connection_ids(self) -> list[int]:
        """Return the connections to this database, without the test's own."""
        return [row[0] for row in self._processes()]

    def _processes(self) -> list[tuple[Any, ...]]:
        with self._observer.cursor() as cursor:
            cursor.execute(
                "SELECT ID, INFO FROM information_schema.PROCESSLIST WHERE DB = %s AND ID <> CONNECTION_ID()",
                [self.name],
            )
            return list(cursor.fetchall())

    def kill_connections(self) -> int:
        """Kill all connections to this database, and return how many these were."""
        ids = self.connection_ids()
        for number in ids:
            with self._observer.cursor() as cursor:
                cursor.execute(f"KILL {number}")
        return len(ids)

    async def assert_quiet(self) -> None:
        await super().assert_quiet()
        await eventually(lambda: not self.statements(), lambda: f"still at work on the server: {self.statements()}")

        def transactions() -> list[tuple[Any, ...]]:
            with self._observer.cursor() as cursor:
                cursor.execute("SELECT trx_id, trx_query FROM information_schema.INNODB_TRX")
                return list(cursor.fetchall())

        await eventually(lambda: not transactions(), lambda: f"transactions are open: {transactions()}")

    def close(self) -> None:
        """Close the test's own connection."""
        self._observer.close()
