"""`setup`: the page as routes of an aiohttp application."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ctxdb_core import DBConnect
from ctxdb_core.adapters import give_unit_ids, new_unit_id
from ctxdb_inspector._access import Authorise, check_authorise, is_allowed
from ctxdb_inspector._content import STREAM_SECONDS, UPDATE_SECONDS, Content, as_event, security_headers
from ctxdb_inspector._pages import EVENTS, answer, refusal, since_of
from ctxdb_inspector._recorder import Recorder
from ctxdb_inspector._records import HEADER, UnitRecord

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Handler

__all__ = ["setup"]


def setup(app: web.Application, *dbs: DBConnect, path: str = "/_ctxdb", authorise: Authorise | None = None) -> None:
    """Add to an aiohttp application the page that `inspector` is for ASGI.

    Every response has the header field ``x-ctxdb-unit``, also those of requests that take no connection.

    Args:
        app: the application.
        *dbs: the databases to look at.
        path: where the page is.
        authorise: given the request, returns (or is awaited for) ``True`` if its client may look. Without it, only
            clients on this machine may, and none that come through a proxy: all others get a 403.

    Raises:
        ArgumentTypeError: as `inspector`.
    """
    from aiohttp import web  # noqa: PLC0415 - an ASGI application need not have aiohttp installed

    check_authorise(authorise)
    # Newer versions of aiohttp warn of keys that are strings, older ones have nothing else.
    request_key = web.RequestKey("ctxdb_inspected", UnitRecord) if hasattr(web, "RequestKey") else "ctxdb_inspected"
    id_key = _id_key()
    give_unit_ids(_id_in)
    recorder = Recorder(dbs, request_key)
    root = path.rstrip("/")

    async def show(request: web.Request) -> web.StreamResponse:
        headers = [(name.lower(), value) for name, value in request.headers.items()]
        # The address is asked of the connection itself: a middleware for proxies may have replaced `request.remote`.
        peer = None if request.transport is None else request.transport.get_extra_info("peername")
        client = peer[0] if isinstance(peer, tuple) else None
        version = f"{request.version.major}.{request.version.minor}"
        if not await is_allowed(authorise, request, client, headers, version):
            return _response(refusal())
        content = answer(recorder, request.method, request.path.removeprefix(root), request.query_string)
        if content is not None:
            return _response(content)
        return await stream(request)

    def _response(content: Content) -> web.Response:
        headers = dict((*security_headers(), *content.headers, ("content-type", content.content_type)))
        return web.Response(status=content.status, body=content.body, headers=headers)

    async def stream(request: web.Request) -> web.StreamResponse:
        since = since_of(request.headers.get("last-event-id"))
        response = web.StreamResponse(headers={**dict(security_headers()), "content-type": "text/event-stream"})
        await response.prepare(request)
        recorder.readers += 1
        try:
            recorder.sample_while_read()
            end = asyncio.get_running_loop().time() + STREAM_SECONDS
            while asyncio.get_running_loop().time() < end and not stopping.is_set():
                snapshot = recorder.snapshot(since)
                since = snapshot["sequence"]
                # It raises if the client has left.
                await response.write(as_event(snapshot))
                try:
                    async with asyncio.timeout(UPDATE_SECONDS):
                        await stopping.wait()
                except TimeoutError:
                    pass
            await response.write_eof()
        except ConnectionResetError:
            pass
        finally:
            recorder.readers -= 1
        return response

    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPPermanentRedirect(f"{request.path}/")

    @web.middleware
    async def choose_id(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Before the unit of work begins: it has ended when most responses are prepared.
        if id_key not in request:
            request[id_key] = new_unit_id()
        return await handler(request)

    async def tell_unit(request: web.Request, response: web.StreamResponse) -> None:
        if id_key in request:
            response.headers[HEADER] = request[id_key]
        record = request.get(request_key)
        if isinstance(record, UnitRecord):
            for name, value in record.response_starts(response.status):
                response.headers[name.decode()] = value.decode()

    stopping = asyncio.Event()

    async def stop(app: web.Application) -> None:
        stopping.set()

    app.middlewares.insert(0, choose_id)
    app.on_shutdown.append(stop)
    app.on_response_prepare.append(tell_unit)
    app.router.add_get(root, redirect)
    for name in ("", "units.json", EVENTS):
        app.router.add_get(f"{root}/{name}", show)


@cache
def _id_key() -> Any:
    """Return where a request has the id of its unit of work."""
    from aiohttp import web  # noqa: PLC0415 - an ASGI application need not have aiohttp installed

    return web.RequestKey("ctxdb_unit_id", str) if hasattr(web, "RequestKey") else "ctxdb_unit_id"


def _id_in(origin: Any) -> str | None:
    given: str | None = origin.get(_id_key()) if isinstance(origin, MutableMapping) else None
    return given
