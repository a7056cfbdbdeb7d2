"""A soak: a mixed load for minutes, and a plot in the terminal of the resources that the serving process takes.

``python -m benchmarks.soak --minutes 30``; ``--help`` tells its options. The application runs behind uvicorn in a
process of its own. Once a second that process tells its memory, file descriptors, tasks, objects and connections; at
the end each is plotted, and compared with what it was before. Connections are ended by the server on and on, and
clients leave in the middle: what these leave behind would add up.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import asyncpg
import httpx
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.clients import HOST
from ctxdb_core import (
    DBConnect,
    TransactionContext,
    db_session,
    gather_in_new_ctx,
    retry_on_conflict,
)
from ctxdb_pgstatus.testing import EmbeddedPostgres
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown

_TABLE = "soak_items"
_APPLICATION_NAME = "ctxdb soak"
_PAUSE_BETWEEN_KILLS_SECONDS = 3.0
_HEIGHT, _WIDTH = 6, 64
_BARS = " ▁▂▃▄▅▆▇█"

# By how much a median of the last quarter may be above the one of the second quarter: the first one warms up.
_MOST_GROWTH = {"memory, MiB": 0.05, "descriptors": 0.2, "tasks": 0.2, "objects": 0.03, "connections in use": 0.5}


# --- the application --------------------------------------------------------------------------------------------------


def application(url: str) -> Starlette:
    """Return the application, with a path for each kind of request."""
    db = DBConnect.from_url(
        url,
        pool_size=10,
        max_overflow=0,
        # Only these connections are ended by the server.
        connect_args={"server_settings": {"application_name": _APPLICATION_NAME}},
    )
    context = TransactionContext(db)

    async def insert() -> None:
        await (await db_session(db)).execute(text(f"INSERT INTO {_TABLE} (name) VALUES ('soaked')"))

    async def select() -> int:
        result = await (await db_session(db)).execute(text(f"SELECT count(*) FROM {_TABLE} WHERE id < 100"))
        return int(result.scalar_one())

    async def read(request: Request) -> Response:
        return PlainTextResponse(str(await select()))

    async def write(request: Request) -> Response:
        await insert()
        return PlainTextResponse("written")

    async def refuse(request: Request) -> Response:
        await insert()
        return PlainTextResponse("refused", status_code=409)

    async def fail(request: Request) -> Response:
        await insert()
        with suppress(ZeroDivisionError):
            async with (await db_session(db)).begin_nested():
                raise ZeroDivisionError
        raise RuntimeError("as it should")

    async def stream(request: Request) -> Response:
        async def chunks() -> AsyncGenerator[str, None]:
            for _ in range(5):
                yield str(await select()) * 1000
            await insert()

        await insert()
        return StreamingResponse(chunks())

    async def background(request: Request) -> Response:
        await insert()
        return PlainTextResponse("later", background=BackgroundTask(insert))

    async def gather(request: Request) -> Response:
        await gather_in_new_ctx(select, insert, select, max_concurrent=2)
        return PlainTextResponse("gathered")

    @retry_on_conflict()
    async def attempt() -> None:
        async with context.transaction() as session:
            await session.execute(text(f"UPDATE {_TABLE} SET name = name WHERE id = 1"))

    async def retry(request: Request) -> Response:
        await attempt()
        return PlainTextResponse("done")

    async def wait(request: Request) -> Response:
        await (await db_session(db)).execute(text("SELECT pg_sleep(0.2)"))
        return PlainTextResponse("slept")

    async def measure(request: Request) -> Response:
        gc.collect()
        return JSONResponse(
            {
                "memory, MiB": _memory(),
                "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,  # noqa: PTH208, PTH112 - once a second
                "tasks": len(asyncio.all_tasks()),
                "objects": len(gc.get_objects()),
                "connections in use": sum(pool.in_use for pool in db.status().pools),
            }
        )

    handlers: list[Callable[[Request], Awaitable[Response]]] = [
        *(read, write, refuse, fail, stream, background, gather, retry, wait, measure)
    ]
    app = Starlette(
        routes=[Route(f"/{handler.__name__}", handler) for handler in handlers], lifespan=close_on_shutdown(db)
    )
    app.add_middleware(DBSessionMiddleware)
    return app


def _memory() -> float:
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    # Where there is no /proc: the most that it ever was, in KiB, on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


# --- the clients ------------------------------------------------------------------------------------------------------

_EXPECTED = {
    **dict.fromkeys(("read", "write", "stream", "background", "gather", "retry", "wait"), 200),
    "refuse": 409,
    "fail": 500,
}


@dataclass
class _Load:
    """Counts the clients' requests, by their kinds and their answers."""

    port: int
    dice: random.Random
    answers: Counter[str]
    is_over: bool = False

    async def ask_on(self) -> None:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{self.port}", timeout=60, verify=False) as client:
            while not self.is_over:
                path = self.dice.choice(list(_EXPECTED))
                if self.dice.random() < 0.1:
                    await self._leave(path)
                else:
                    await self._ask(client, path)

    async def _ask(self, client: httpx.AsyncClient, path: str) -> None:
        try:
            # uvicorn closes the connection on which an error was answered, and the next request would meet that.
            headers = {"connection": "close"} if path == "fail" else {}
            status = (await client.get(f"/{path}", headers=headers)).status_code
        except httpx.HTTPError as exc:
            # A streamed response whose connection to the database was ended breaks off.
            self.answers[f"{path}: {type(exc).__name__}"] += 1
        else:
            self.answers["as expected" if status == _EXPECTED[path] else f"{path}: {status}"] += 1

    async def _leave(self, path: str) -> None:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, self.port)
            writer.write(f"GET /{path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode())
            await asyncio.sleep(self.dice.random() * 0.02)
            writer.close()
        self.answers["left"] += 1


async def _kill_connections(dsn: str, load: _Load) -> None:
    """End a connection of the application's, whatever it does, every few seconds."""
    connection = await asyncpg.connect(dsn)
    try:
        while not load.is_over:
            await asyncio.sleep(_PAUSE_BETWEEN_KILLS_SECONDS)
            killed = await connection.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = $1 ORDER BY random() LIMIT 1",
                _APPLICATION_NAME,
            )
            load.answers["connections ended by the server"] += len(killed)
    finally:
        await connection.close()


async def _measure_on(load: _Load, seconds: float) -> list[dict[str, float]]:
    samples: list[dict[str, float]] = []
    latest = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{load.port}", timeout=60, verify=False) as client:
        while time.monotonic() < latest:
            await asyncio.sleep(min(1.0, seconds / 20))
            samples.append((await client.get("/measure")).json())
            print(f"\r{max(0, latest - time.monotonic()):.0f} s left ", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return samples


# --- a run ------------------------------------------------------------------------------------------------------------


async def soak(url: str, seconds: float, clients: int, seed: int) -> tuple[list[dict[str, float]], Counter[str]]:
    """Serve the application, load it for so many seconds, and return the samples and what was answered.

    Raises:
        RuntimeError: the server does not start.
    """
    dsn = url.replace("+asyncpg", "")
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"DROP TABLE IF EXISTS {_TABLE}; CREATE TABLE {_TABLE} (id serial PRIMARY KEY, name text)")
    await connection.execute(f"INSERT INTO {_TABLE} (name) VALUES ('first')")
    try:
        with tempfile.TemporaryDirectory() as directory:
            return await _serve_and_ask(url, dsn, Path(directory) / "port", seconds, clients, seed)
    finally:
        await connection.execute(f"DROP TABLE {_TABLE}")
        await connection.close()


async def _serve_and_ask(
    url: str, dsn: str, port_file: Path, seconds: float, clients: int, seed: int
) -> tuple[list[dict[str, float]], Counter[str]]:
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.soak", "--serve", str(port_file), "--url", url),
        # It ends when this closes.
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            while not port_file.exists():
                if server.returncode is not None:
                    raise RuntimeError("The server did not start.")
                await asyncio.sleep(0.05)
        load = _Load(int(port_file.read_text()), random.Random(seed), Counter())
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(load.ask_on())
            tasks.create_task(_kill_connections(dsn, load))
            try:
                samples = await _measure_on(load, seconds)
            finally:
                load.is_over = True
        return samples, load.answers
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            async with asyncio.timeout(20):
                await server.wait()
        except TimeoutError:
            server.kill()
            await server.wait()


async def _serve(url: str, port_file: Path) -> None:
    import uvicorn  # noqa: PLC0415 - for the process that serves alone

    config = uvicorn.Config(application(url), host=HOST, port=0, log_level="critical", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(sys.stdin.fileno())
        server.should_exit = True

    loop.add_reader(sys.stdin.fileno(), stop)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        new = port_file.with_suffix(".new")
        new.write_text(str(server.servers[0].sockets[0].getsockname()[1]))
        new.rename(port_file)
    await serving


# --- the report -------------------------------------------------------------------------------------------------------


def plot(name: str, values: Sequence[float]) -> list[str]:
    """Return the lines of a plot of `values`, the oldest on the left, from the lowest to the highest of them."""
    width = min(_WIDTH, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    columns = [median(values[start:end]) for start, end in itertools.pairwise(edges)]
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    heights = [round((value - low) / span * (_HEIGHT * 8 - 1)) + 1 for value in columns]
    lines = [name]
    for row in reversed(range(_HEIGHT)):
        edge = f"{high:>10,.1f}" if row == _HEIGHT - 1 else f"{low:>10,.1f}" if row == 0 else " " * 10
        lines.append(f"{edge} |{''.join(_BARS[max(0, min(8, height - row * 8))] for height in heights)}")
    return lines


def growth(values: Sequence[float]) -> tuple[float, float]:
    """Return the median of the second quarter of a run, and that of its last quarter."""
    quarter = max(1, len(values) // 4)
    return median(values[quarter : 2 * quarter] or values), median(values[-quarter:])


def report(samples: Sequence[dict[str, float]], answers: Counter[str]) -> bool:
    """Print what a run has shown; return whether nothing has grown by more than it may."""
    is_steady = True
    for name, most in _MOST_GROWTH.items():
        values = [sample[name] for sample in samples]
        before, after = growth(values)
        has_grown = after > before * (1 + most) + 1
        is_steady = is_steady and not has_grown
        print("\n".join(plot(name, values)))
        print(f"{'':>12}{before:,.1f} in the second quarter, {after:,.1f} in the last{': IT GROWS' * has_grown}\n")
    for what, count in sorted(answers.items()):
        print(f"{count:>10,} {what}")
    return is_steady


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long it takes (5)")
    parser.add_argument("--clients", type=int, default=20, help="how many ask at once (20)")
    parser.add_argument("--seed", type=int, default=0, help="what the requests are drawn by (0)")
    parser.add_argument("--url", help="a PostgreSQL of your own: postgresql+asyncpg://...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples to FILE, too")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(_serve(options.url, options.serve))
        return 0

    def run(url: str) -> int:
        samples, answers = asyncio.run(soak(url, options.minutes * 60, options.clients, options.seed))
        if options.json is not None:
            options.json.write_text(json.dumps({"samples": samples, "answers": answers}))
        return 0 if report(samples, answers) else 1

    if options.url is not None:
        return run(options.url)
    with EmbeddedPostgres() as server:
        return run(server.url())


if __name__ == "__main__":
    sys.exit(main())
