"""One run of the demo: a database, a server, the scenarios, the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core import run_in_new_ctx
from ctxdb_demo import domain
from ctxdb_demo.cleanup import see_through
from ctxdb_demo.database import POOL_SIZE, db
from ctxdb_demo.demo_database import DemoDatabase, open_database
from ctxdb_demo.errors import DemoError
from ctxdb_demo.kept_log import keep_log
from ctxdb_demo.options import Options
from ctxdb_demo.probe import watch_pool
from ctxdb_demo.progress import Progress
from ctxdb_demo.report import print_report
from ctxdb_demo.scenarios import SCENARIOS, SEED, Outcome, connect, play
from ctxdb_demo.server import HOST, listen

__all__ = ["connected", "run"]


async def run(options: Options) -> bool:
    """Run the demo, and print its table; with ``options.serve``, go on serving until cancelled.

    Returns:
        Whether every promise was kept.

    Raises:
        DemoError: the demo cannot go on.
    """
    progress = Progress()
    framework = options.framework
    with listen(options.port) as listener, keep_log() as log:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        async with (
            open_database(options.database_url, progress) as database,
            connected(database),
            framework.serve(listener),
        ):
            outcomes = await _play_all(url, database, progress)
            kept = not any(outcome.broken_promises() for outcome in outcomes)
            print_report(f"{framework.title} {framework.version} on {database.title}", outcomes)
            if not kept:
                log.show()
            if options.serve:
                log.show_from_now_on()
                _print_invitation(url)
                await asyncio.Event().wait()
    return kept


@asynccontextmanager
async def connected(database: DemoDatabase) -> AsyncIterator[None]:
    """Connect the application's `db` to the database, and open some accounts."""
    await db.connect(database.url)
    try:
        for owner, balance in SEED.items():
            await run_in_new_ctx(domain.open_account, owner, balance)
        yield
    finally:
        # The application has done so when it shut down, unless it never started.
        await see_through(db.close())


async def _play_all(base_url: str, database: DemoDatabase, progress: Progress) -> list[Outcome]:
    engine = await db.engine()
    outcomes = []
    with watch_pool(engine) as holds, progress.step("Playing the scenarios ...") as update:
        async with connect(base_url) as client:
            await _warm_up(engine, client)
            for number, scenario in enumerate(SCENARIOS, 1):
                update(f"{number}/{len(SCENARIOS)} {scenario.title}: {scenario.request}")
                try:
                    outcomes.append(await play(scenario, client, database, holds))
                except httpx.HTTPError as exc:
                    raise DemoError(f"{scenario.request} got no response: {type(exc).__name__} {exc}") from exc
    return outcomes


async def _warm_up(engine: AsyncEngine, client: httpx.AsyncClient) -> None:
    """Open what is opened once: no scenario's time shall be the time it takes to log in at the database."""
    async with AsyncExitStack() as stack:
        for _ in range(POOL_SIZE):
            await stack.enter_async_context(engine.connect())
    await client.get("/accounts")


def _print_invitation(url: str) -> None:
    json = "-H 'content-type: application/json'"
    print(
        f"\nServing on {url} until Ctrl-C. For instance:\n"
        f"  curl {url}/accounts\n"
        f'  curl {url}/accounts {json} -d \'{{"owner": "dave", "balance": 10}}\'\n'
        f'  curl {url}/transfers {json} -d \'{{"source": "alice", "target": "bob", "amount": 10}}\'\n'
        f'  curl {url}/transfers {json} -d \'{{"source": "alice", "target": "nobody", "amount": 10}}\'\n'
        f"  curl --limit-rate 500k {url}/accounts/alice/statement -o /dev/null",
        flush=True,
    )
