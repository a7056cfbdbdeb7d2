"""``ctxdb-demo --watch``: the inspector over an application under load, with faults to be switched on."""

from __future__ import annotations

import asyncio
import secrets
import sys
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse
from pydantic import BaseModel
from sqlalchemy import text

from ctxdb_core import DBConnect
from ctxdb_demo import cluster_app, fastapi_app
from ctxdb_demo.asgi_server import serve
from ctxdb_demo.cleanup import see_through
from ctxdb_demo.cluster_demo import create_tables, engines_of, fail_over, monitor_of, started
from ctxdb_demo.database import POOL_SIZE, db
from ctxdb_demo.demo import connected
from ctxdb_demo.demo_database import open_database
from ctxdb_demo.faults import BackendKiller, Fault, Faults, Leak, read_slowly, repeat
from ctxdb_demo.kept_log import keep_log
from ctxdb_demo.options import Options
from ctxdb_demo.progress import Progress
from ctxdb_demo.server import HOST, listen
from ctxdb_demo.watch_page import WatchPage
from ctxdb_inspector import inspector

__all__ = ["run_watch"]

PAUSE_SECONDS = 0.2
"""Of each client, between two requests."""

LEFT_TO_OTHERS = 2
"""How many connections of a pool the leak leaves."""

Hosts = Callable[[], Sequence[Mapping[str, str]]]


async def run_watch(options: Options) -> bool:
    """Serve an application under load, and the inspector's page over it, until cancelled.

    Raises:
        DemoError: the demo cannot go on.
    """
    progress = Progress()
    # What goes wrong is on the page.
    with listen(options.port) as listener, keep_log():
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        watched = _watch_cluster(url, progress) if options.cluster else _watch_bank(url, options, progress)
        async with watched as (app, load), serve(app, listener), _under(load, url):
            page = f"{url}/_ctxdb/"
            print(f"Watch it on {page} until Ctrl-C.", flush=True)
            if sys.stdout.isatty():
                # Without a display, this returns that it has opened nothing.
                await asyncio.to_thread(webbrowser.open, page)
            await asyncio.Event().wait()
    return True


Load = Sequence[Callable[[httpx.AsyncClient], Awaitable[object]]]


@asynccontextmanager
async def _under(load: Load, url: str) -> AsyncIterator[None]:
    """Have a client for each of `load` call it again and again, for the length of a block."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        tasks = [asyncio.ensure_future(repeat(partial(call, client), PAUSE_SECONDS)) for call in load]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await see_through(asyncio.wait(tasks))


# --- the bank ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _watch_bank(url: str, options: Options, progress: Progress) -> AsyncIterator[tuple[FastAPI, Load]]:
    killer = BackendKiller(db)
    async with (
        open_database(options.database_url, progress) as database,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
        connected(database),
    ):
        leak = Leak(db, POOL_SIZE - LEFT_TO_OTHERS)
        faults = {
            "slow_reader": Fault(
                "slow reader",
                "A client reads a large response little by little: it holds no connection meanwhile.",
                lambda: read_slowly(client, "/accounts/alice/statement"),
            ),
            **_leak_fault(leak, client),
            "failing_commit": Fault(
                "failing commit",
                "Transfers to an account that there is not: the database refuses them at COMMIT.",
                lambda: repeat(
                    lambda: client.post("/transfers", json={"source": "alice", "target": "nobody", "amount": 1}), 0.5
                ),
            ),
        }
        if database.observer.dialect.name == "postgresql":

            async def kill(pid: int) -> None:
                async with database.observer.connect() as connection:
                    await connection.execute(_KILL, {"pid": pid})

            faults |= _kill_fault(killer, kill)
        app = fastapi_app.create_app()
        async with Faults(faults) as switches:
            _add_watch(app, (db,), switches, leak, lambda: ())
            yield app, _BANK_LOAD


_KILL = text("SELECT pg_terminate_backend(:pid)")

_BANK_LOAD: Load = (
    lambda client: client.get("/accounts"),
    lambda client: client.post("/transfers", json={"source": "alice", "target": "bob", "amount": 1}),
    lambda client: client.post("/transfers", json={"source": "bob", "target": "alice", "amount": 1}),
    lambda client: client.post("/accounts/carol/interest"),
    lambda client: client.post("/transfers", json={"source": "carol", "target": "bob", "amount": 1_000_000_000}),
)


# --- the cluster ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _watch_cluster(url: str, progress: Progress) -> AsyncIterator[tuple[FastAPI, Load]]:
    async with started(progress) as cluster, httpx.AsyncClient(base_url=url, timeout=30) as client:
        await create_tables(cluster)
        monitor = monitor_of(cluster)
        names = {node.host: node.name for node in cluster.nodes}

        def hosts() -> Sequence[Mapping[str, str]]:
            status = monitor.status
            return [
                {
                    "name": names[host.host],
                    "host": host.host,
                    "role": "dead" if not host.alive else ("master" if host.host == status.master else "replica"),
                    "lag": "" if host.lag_bytes is None else f"{host.lag_bytes} bytes",
                }
                for host in status.hosts
            ]

        app = cluster_app.create_app(monitor, engines_of(cluster, pool_size=POOL_SIZE), secrets.token_hex(16))
        master: DBConnect = app.state.master
        leak = Leak(master, POOL_SIZE - LEFT_TO_OTHERS)

        async def kill(pid: int) -> None:
            await cluster.primary.fetch_value("SELECT pg_terminate_backend($1)", pid)

        faults = {
            **_leak_fault(leak, client),
            **_kill_fault(BackendKiller(master), kill),
            "failing_commit": Fault(
                "failing commit",
                "The same payment twice: the database refuses the second one when it is committed.",
                lambda: repeat(lambda: client.post("/payments", json={"id": "twice", "amount": 1}), 0.5),
            ),
            "fail_over": Fault(
                "failover",
                "The primary is killed, a replica is promoted, and the old primary comes back as a replica.",
                lambda: see_through(fail_over(cluster)),
            ),
        }
        async with monitor, Faults(faults) as switches:
            _add_watch(app, (master, app.state.replica), switches, leak, hosts)
            yield app, [_pay] * 4


async def _pay(client: httpx.AsyncClient) -> None:
    payment_id = secrets.token_hex(16)
    if (await client.post("/payments", json={"id": payment_id, "amount": 1})).status_code == 201:
        await client.get(f"/payments/{payment_id}")


# --- what both have ---------------------------------------------------------------------------------------------------


def _leak_fault(leak: Leak, client: httpx.AsyncClient) -> dict[str, Fault]:
    description = "A bad handler opens sessions of its own, and never closes them."
    return {"leak": Fault("leak by a bad handler", description, lambda: leak.run(client, "/_watch/bad"))}


def _kill_fault(killer: BackendKiller, kill: Callable[[int], Awaitable[object]]) -> dict[str, Fault]:
    description = "The server's processes behind the pool are killed, one each second."
    return {"killed_backend": Fault("killed backends", description, lambda: killer.run(kill))}


class _Switch(BaseModel):
    on: bool


def _add_watch(app: FastAPI, dbs: Sequence[DBConnect], switches: Faults, leak: Leak, hosts: Hosts) -> None:
    """Add the page, what its buttons call, and the bad handler."""

    @app.get("/")
    async def index() -> RedirectResponse:
        return RedirectResponse("/_ctxdb/")

    @app.get("/_watch/state.json")
    async def tell_state() -> dict[str, Any]:
        return {"faults": switches.states(), "hosts": list(hosts())}

    @app.post("/_watch/faults/{name}", status_code=204)
    async def switch(name: str, wanted: _Switch, request: Request) -> None:
        # A page of another site may not press the buttons.
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise HTTPException(403)
        if name not in switches.faults:
            raise HTTPException(404)
        await switches.switch(name, on=wanted.on)

    @app.post("/_watch/bad")
    async def bad_handler() -> dict[str, int]:
        return {"forgotten": await leak.forget_one()}

    app.mount("/_ctxdb", WatchPage(inspector(*dbs), switches.faults))
