"""`run_processes`: processes that are asked over a connection, and end when that is closed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

_STOP_TIMEOUT_SECONDS = 5.0


@contextmanager
def run_processes(work: Callable[..., None], arguments: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Call ``work(*arguments, connection)`` in a process for each name, and yield the other ends of the connections.

    The work is to end when its connection is closed.
    """
    # One process imports everything, and is forked for each of the others: they have the same order of names in sets.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contenders.everyone", "benchmarks.frameworks", work.__module__])
    started = []
    connections: dict[str, Connection[Any, Any]] = {}
    try:
        for name, own_arguments in arguments.items():
            connections[name], theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, own_arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in started:
            process.join(_STOP_TIMEOUT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _run(work: Callable[..., None], arguments: tuple[Any, ...], connection: Connection[Any, Any]) -> None:
    # Ctrl-C is for the parent: it ends this process by closing the connection.
    os.setsid()
    work(*arguments, connection)
