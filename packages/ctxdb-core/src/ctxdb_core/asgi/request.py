"""`KeptRequest`: the body of a request, kept in case that a handler of errors reads it once more."""

from __future__ import annotations

from collections.abc import Awaitable

from ctxdb_core.asgi.types import Message, Receive

__all__ = ["KeptRequest"]

_MAX_BYTES = 1 << 20


class KeptRequest:
    """The messages that the application has received; a request that is too large to be kept looks empty."""

    __slots__ = ("_messages", "_size", "_source")

    def __init__(self, source: Receive) -> None:
        self._source = source
        self._messages: list[Message] = []
        self._size = 0

    def __call__(self) -> Awaitable[Message]:
        """Receive the next message from the server: a `Receive`."""
        return self._source()

    def keep(self, message: Message) -> None:
        """Keep a message of the request."""
        self._size += len(message.get("body", b""))
        self._messages.append(message)
        if self._size > _MAX_BYTES:
            self._messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive_again(self) -> Message:
        """Return the next message of those that were kept, and forget it; or receive one, once there are no more."""
        return self._messages.pop(0) if self._messages else await self._source()
