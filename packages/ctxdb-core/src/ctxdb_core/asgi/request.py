"""`KeptRequest`: the body of a request, kept in case that a handler of errors reads it once more."""

from __future__ import annotations

from ctxdb_core.asgi.types import Message

__all__ = ["KeptRequest"]

_MAX_BYTES = 1 << 20


class KeptRequest:
    """The messages that the application has received; a request that is too large to be kept looks empty."""

    __slots__ = ("_messages", "_size")

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._size = 0

    def keep(self, message: Message) -> None:
        """Keep a message of the request."""
        if self._size > _MAX_BYTES:
            return
        self._size += len(message.get("body", b""))
        self._messages.append(message)
        if self._size > _MAX_BYTES:
            self._messages = [{"type": "http.request", "body": b"", "more_body": False}]

    def take(self) -> Message | None:
        """Return the next message, and forget it; ``None`` once there are no more."""
        return self._messages.pop(0) if self._messages else None
