"""`UnitHeader`: has every response tell the id of its unit of work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from ctxdb_core.adapters import give_unit_ids, new_unit_id
from ctxdb_inspector._records import HEADER

__all__ = ["UnitHeader"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEY = "ctxdb.inspector.unit_id"
"""Where the ASGI scope of a request has the id of its unit of work."""

_HEADER = HEADER.encode()
_STARTS = {"http.response.start", "websocket.accept", "websocket.http.response.start"}


class UnitHeader:
    """An ASGI application that gives every response of another one the header field ``x-ctxdb-unit``.

    With the inspector alone, responses have it whose request has taken a connection before they started. Around the
    whole application (``app = UnitHeader(app)``), this adds those of requests that take none, and what the framework
    answers outside of all middlewares, as the 500 for an error that nobody handles. The id is that of the log records,
    too.

    Args:
        app: the whole application.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        give_unit_ids(_id_in)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] not in ("http", "websocket") or _KEY in scope:
            await self.app(scope, receive, send)
            return
        scope[_KEY] = unit_id = new_unit_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] in _STARTS:
                headers = message.get("headers", ())
                if not any(name == _HEADER for name, _ in headers):
                    message = {**message, "headers": [*headers, (_HEADER, unit_id.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_id)


def _id_in(origin: Any) -> str | None:
    given: str | None = origin.get(_KEY) if isinstance(origin, MutableMapping) else None
    return given
