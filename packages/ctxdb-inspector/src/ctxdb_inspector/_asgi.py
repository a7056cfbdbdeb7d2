"""`inspector`: the page as an ASGI application, to be mounted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from ctxdb_core import DBConnect
from ctxdb_inspector._access import Authorise, check_authorise, is_allowed
from ctxdb_inspector._content import STREAM_SECONDS, UPDATE_SECONDS, Content, as_event, security_headers
from ctxdb_inspector._pages import answer, refusal, since_of
from ctxdb_inspector._recorder import Recorder

__all__ = ["Inspector", "inspector"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class Inspector:
    """An ASGI application that shows what databases are used for; `inspector` makes one."""

    def __init__(self, recorder: Recorder, authorise: Authorise | None) -> None:
        self._recorder = recorder
        self._authorise = authorise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        client = scope.get("client")
        method = scope["method"]
        version = scope.get("http_version", "1.1")
        if not await is_allowed(self._authorise, scope, client[0] if client else None, headers, version):
            await _send(send, method, refusal())
            return
        # Some frameworks leave the place of the mount in the path.
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        content = answer(self._recorder, method, path, scope.get("query_string", b"").decode("latin-1"))
        if content is not None:
            await _send(send, method, content)
        else:
            await self._stream(since_of(dict(headers).get("last-event-id")), receive, send)

    async def _stream(self, since: int, receive: Receive, send: Send) -> None:
        await send(_start(200, "text/event-stream"))
        recorder = self._recorder
        recorder.readers += 1
        left = asyncio.ensure_future(_until_left(receive))
        try:
            recorder.sample_while_read()
            end = asyncio.get_running_loop().time() + STREAM_SECONDS
            while not left.done() and asyncio.get_running_loop().time() < end:
                snapshot = recorder.snapshot(since)
                since = snapshot["sequence"]
                await send({"type": "http.response.body", "body": as_event(snapshot), "more_body": True})
                await asyncio.wait([left], timeout=UPDATE_SECONDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            recorder.readers -= 1
            left.cancel()
            await asyncio.wait([left])


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, content_type: str, extra: tuple[tuple[str, str], ...] = ()) -> Message:
    headers = (("content-type", content_type), *security_headers(), *extra)
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }


async def _send(send: Send, method: str, content: Content) -> None:
    length = ("content-length", str(len(content.body)))
    await send(_start(content.status, content.content_type, (*content.headers, length)))
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else content.body})


def inspector(*dbs: DBConnect, authorise: Authorise | None = None) -> Inspector:
    """Return an ASGI application that shows which request holds which connection of `dbs`, as it happens.

    Mount it: ``app.mount("/_ctxdb", inspector(db))``. From the call on, the connections of `dbs` are followed. The
    response of a request that has used one before it started has a header field ``x-ctxdb-unit``, which leads to the
    request on the page. Each worker process shows its own requests.

    Args:
        *dbs: the databases to look at.
        authorise: given the ASGI scope of a request, returns (or is awaited for) ``True`` if its client may look.
            Without it, only clients on this machine may, and none that come through a proxy: all others get a 403.

    Raises:
        ArgumentTypeError: one of `dbs` is no `DBConnect`, there is none, or `authorise` cannot be called.
    """
    check_authorise(authorise)
    return Inspector(Recorder(dbs), authorise)
