"""`ResponseStart`: what other tasks send while the start of a response waits for its transactions to end.

Another task may send something in the meantime. Litestar's ``websocket_stream`` accepts in one task and sends in
another; sse-starlette pings its client in a task of its own. A client must not get that before the start.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

__all__ = ["ResponseStart"]

_current: ContextVar[ResponseStart | None] = ContextVar("ctxdb_response_start", default=None)
"""The start that the running code is part of. Callbacks of the commit inherit it: the start waits for them."""


class ResponseStart:
    """The start of a response, from the end of its transactions to its way to the server."""

    __slots__ = ("_is_over", "_over")

    def __init__(self) -> None:
        self._is_over = False
        self._over: asyncio.Event | None = None
        """Set at the end; ``None`` as long as no task waits for that."""

    def enter(self) -> None:
        """Have what the running code does until `end` be part of the start: it is not kept waiting."""
        _current.set(self)

    def end(self) -> None:
        """Let the tasks go on that wait for the start: it was sent, or refused."""
        self._is_over = True
        if self._over is not None:
            self._over.set()

    def holds_up(self) -> bool:
        """Return whether what the running code sends has to wait until the start is over."""
        return not self._is_over and _current.get() is not self

    async def wait(self) -> None:
        """Wait until the start is over."""
        if not self._is_over:
            if self._over is None:
                self._over = asyncio.Event()
            await self._over.wait()
