"""`Exchange`: a request and its response as one unit of work, in one phase at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from contextvars import Context

from ctxdb_core._units.ids import process, unit_id_givers, unit_numbers
from ctxdb_core._units.watcher import UnitWatcher, report_failure
from ctxdb_core.asgi.commit_errors import AnswerableUnit
from ctxdb_core.asgi.response import ResponseStart
from ctxdb_core.asgi.types import Message, Receive, Send
from ctxdb_core.phases import FINISHING, Phase

__all__ = ["CONTEXT_KEY", "Exchange"]

CONTEXT_KEY = "ctxdb.context"
"""Where the scope of a request has the context variables of its beginning, if a stream boundary may be beneath."""

_SWITCHING_PROTOCOLS = 101

_SILENT = (Phase.REFUSED, Phase.BROKEN)

# Bound once: to look up a member of an enumeration takes as long as several calls (Python 3.11).
_BODY, _AFTER = Phase.BODY, Phase.AFTER


class Exchange(AnswerableUnit):
    """The unit of work of one request, and the `send` that its application is given.

    What the application sends moves the exchange from phase to phase (`ctxdb_core.phases`): each transition ends the
    transactions that it has to, before the message is forwarded to the server.
    """

    server: Send
    """The `send` of the server."""

    @property
    def context(self) -> Context | None:
        found: Context | None = self.origin.get(CONTEXT_KEY)
        return found

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message of the application, after what has to happen before it."""
        raise NotImplementedError

    def request_again(self, receive: Receive) -> Receive:
        """Return where a handler of errors receives the request from, if the application was given `receive`."""
        return receive

    def identify(self) -> tuple[str, str | None]:
        scope, registration = self.origin, self.registration
        if registration is None or registration.id is not None or unit_id_givers or "method" not in scope:
            return super().identify()
        # The common case, without calls.
        registration.id = unit_id = f"{process.name}-{next(unit_numbers)}"
        return unit_id, f"{scope['method']} {scope['path']}"

    async def send_behind(self, start: ResponseStart, message: Message) -> None:
        """Send a message of another task once the response has started."""
        await start.wait()
        await self.send(message)

    def announce(self, message: Message, watchers: Mapping[object, UnitWatcher]) -> Message:
        """Tell the watchers of the start of a response; return it with the header fields that they add.

        They are told of none that is not let through: of two starts at once, the other one may have been refused.
        """
        if self.phase in _SILENT:
            return message
        status = message.get("status", _SWITCHING_PROTOCOLS)
        headers = message.get("headers", ())
        for watcher in watchers.values():
            try:
                headers = [*headers, *watcher.response_starts(status)]
            except (Exception, asyncio.CancelledError):  # noqa: BLE001 - it is logged, and changes nothing
                report_failure(watcher)
        # The application may send its own message again.
        message = {**message}
        message["headers"] = headers
        return message

    def forward(self, message: Message) -> Awaitable[None]:
        """Send a message of the application to the server, or drop it in a phase in which nothing is let through."""
        return _discard(message) if self.phase in _SILENT else self.server(message)

    async def send_last(self, message: Message) -> None:
        """Forward the last part of a body, once all that the body has done is committed.

        If the commit fails, the client sees the response break off.

        Raises:
            Exception: the error of the commit.
        """
        try:
            await self.commit_body()
        except Exception:
            self.move_to(Phase.BROKEN)
            raise
        self.note_body_is_sent()
        await self.forward(message)

    async def commit_body(self) -> None:
        """Commit what the body has done.

        Raises:
            Exception: as `commit`.
        """
        await self.commit(ends_body=True)

    def note_body_is_sent(self) -> None:
        """Note that the last part of the body is let through: what comes now is background work."""
        if self.phase is _BODY:
            self.move_to(_AFTER)

    async def conclude(self) -> None:
        """End the unit, now that the application has returned.

        Raises:
            Exception: why the response was refused, if no other one was sent for that; or the error of a commit.
        """
        if self.failure is not None:
            await self.finish(commit=False, error=self.failure)
            raise self.failure
        if not self.finish_idle():
            await self.finish(commit=self.phase in FINISHING and not self.is_cut_off)

    @property
    def is_cut_off(self) -> bool:
        """Whether the application has returned in the middle of what it was doing, although it has raised nothing."""
        return False


async def _discard(message: Message) -> None:
    """Drop a message of a response that is not sent any more."""
