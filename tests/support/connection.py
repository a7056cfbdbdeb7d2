"""An ASGI server's side of one request, message by message."""

from __future__ import annotations

import asyncio
from typing import Any

from ctxdb_core.asgi import ASGIApp, Message, Scope

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"body"}


class Connection:
    """What a server sends for one request, and what it receives."""

    def __init__(self, kind: str = "http", incoming: list[Message] | None = None, **scope: Any) -> None:
        self.scope: Scope = {"type": kind, **scope}
        self.sent: list[Message] = []
        self._incoming = incoming or []

    async def receive(self) -> Message:
        if self._incoming:
            return self._incoming.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: ASGIApp) -> Connection:
        await app(self.scope, self.receive, self.send)
        return self

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.sent]
