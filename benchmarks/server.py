"""A contender behind uvicorn on the loopback interface, in a process that ends with the one that started it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing.connection import Connection

import uvicorn
from starlette.responses import Response, StreamingResponse

from benchmarks.contenders import Route, load
from benchmarks.database import pool_of, read
from benchmarks.processes import run_processes

POOL_SIZE = 5
POOL_TIMEOUT_SECONDS = 1.0
QUICK_PATH = "/quick"
SLOW_PATH = "/slow"

_CHUNK = b"." * 65536
# More than the sockets' buffers hold, and than a slow reader takes in the time that it is given.
_CHUNKS = 512
_START_TIMEOUT_SECONDS = 30.0


@asynccontextmanager
async def serve(names: Sequence[str], url: str) -> AsyncIterator[dict[str, int]]:
    """Serve each of these contenders in a process of its own, and yield their ports.

    Raises:
        RuntimeError: one of them does not start.
    """
    with run_processes(_run, {name: (name, url) for name in names}) as connections:
        yield {name: await _port(name, connection) for name, connection in connections.items()}


async def _port(name: str, connection: Connection[None, int]) -> int:
    try:
        if await asyncio.to_thread(connection.poll, _START_TIMEOUT_SECONDS):
            return connection.recv()
    except EOFError:
        pass
    raise RuntimeError(f"The server of {name} did not start.")


def _run(name: str, url: str, connection: Connection[int, None]) -> None:
    # Some contenders are expected to exhaust their pool: the tracebacks tell nothing new, and cost time.
    logging.disable(logging.CRITICAL)
    asyncio.run(_serve(name, url, connection))


async def _serve(name: str, url: str, connection: Connection[int, None]) -> None:
    contender = load(name)(url, pool_of(POOL_SIZE, POOL_TIMEOUT_SECONDS))
    app = contender.app([Route(QUICK_PATH, partial(Response, b"ok"), read), Route(SLOW_PATH, _slow_response, read)])
    # asyncio turns Nagle's algorithm off for sockets whose protocol says that they are TCP.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(connection.fileno())
        server.should_exit = server.force_exit = True

    # Nothing is ever sent here: it becomes readable when the parent closes it, or ends.
    loop.add_reader(connection.fileno(), stop)
    gc.freeze()
    connection.send(listener.getsockname()[1])
    try:
        await server.serve(sockets=[listener])
    finally:
        await contender.close()


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(_CHUNKS):
        yield _CHUNK


def _slow_response() -> Response:
    return StreamingResponse(_chunks())
