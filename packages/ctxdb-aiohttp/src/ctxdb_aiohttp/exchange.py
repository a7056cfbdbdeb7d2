"""`Exchange`: the phase of a request, and the unit of work that is ended as the phases say."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, TypeAlias

from aiohttp import web

from ctxdb_aiohttp.response import check_response, status_of
from ctxdb_aiohttp.writer import Delivery, WatchedWriter
from ctxdb_core.adapters import Phase, RequestPolicy, RequestUnit, check_transition, finalize

__all__ = ["UNSTARTED", "Exchange", "Opened", "Refusal", "exchange_of"]

logger: logging.Logger = logging.getLogger("ctxdb")

UNSTARTED = frozenset({Phase.HANDLING, Phase.REFUSED})
"""The phases in which nothing of a response has left, so that another one can still come in its place."""

_SWITCHING_PROTOCOLS = 101

Opened: TypeAlias = tuple[RequestUnit, RequestPolicy]
"""What an `Exchange` is made of. Most requests need no exchange: their writers lead to this."""


class Refusal(NamedTuple):
    """A response that no client may take for a success."""

    response: object
    """The response that was not let through, or broke off."""
    error: BaseException
    """The error for which it was refused, or broke off."""


class Exchange:
    """The unit of work of one request, from the first middleware to the last byte of the response.

    Its phases are those of `ctxdb_core.phases`, of which aiohttp tells by calls and returns:

    - ``HANDLING``: the handler and the middlewares are at work. Most requests never leave it: if the middlewares return
      a response with all of its body, the unit of work ends there, and aiohttp sends the response afterwards.
    - ``BODY`` and ``AFTER``: the head of a response, or the end of its body, was let through to the request's writer
      while the unit of work was open, as is the case for a response that the handler has prepared.
    - ``REFUSED``: a commit has failed before the head. The error goes through the middlewares. If one of them answers
      by another response, the request is in ``HANDLING`` again. A websocket is refused by its close frame.
    - ``BROKEN``: a commit has failed behind the head. The body has no end, so that the client sees it break off.
    - ``ABANDONED``: a middleware has answered in the place of a handler that it gave up on; the unit of work has ended.
    - ``AHEAD`` and ``OVERRULED`` are never entered: no middleware of aiohttp can hold the start of a response back.

    Args:
        unit: what `ctxdb_core.adapters.begin` has returned.
        commits: given the status of a response and the request: whether to commit.
        writer: the request's, which is one for all copies of the request, and for this request alone. So its attribute
            ``ctxdb_exchange`` leads to the exchange: it is not inherited by tasks and servers, as a context variable
            would be. It is untyped, as no type knows of that attribute.
    """

    # Defaults are the class's: a request that needs none of these pays for none of them.
    phase: Phase = Phase.HANDLING
    watched: WatchedWriter | None = None
    """The request's writer, once a response is written while code of the application may run; see `Delivery`."""
    refusal: Refusal | None = None
    """The last response that was refused or broke off. It stays so, also if a middleware returns it after all."""
    has_committed: bool = False
    """Whether what the handler has done is committed: it stands, also if what middlewares do behind it fails."""
    attempts: int = 0
    """How many calls of the handler have come to their end. The next call is a new attempt: it undoes their work."""

    def __init__(self, unit: RequestUnit, commits: RequestPolicy, writer: Any) -> None:
        self.unit = unit
        self.commits = commits
        self.writer = writer

    def move_to(self, phase: Phase) -> None:
        """Go over to `phase`; nothing happens if that is the current one.

        Raises:
            IllegalTransitionError: it cannot follow the current one.
        """
        if phase is not self.phase:
            check_transition(self.phase, phase)
            self.phase = phase

    async def end_reading(self) -> None:
        """End the transactions of the body that have only read."""
        if self.unit.sessions and self.phase is Phase.BODY:
            await self.unit.end_reading()

    @property
    def has_work(self) -> bool:
        """Whether there may be something to commit or to roll back."""
        return bool(self.unit.sessions or self.unit.hooks)

    async def begin_attempt(self) -> None:
        """Roll back what earlier calls of the handler have left: a middleware tries again."""
        self.attempts = 0
        await self.roll_back()

    async def commit_success(self, request: web.Request, response: object) -> None:
        """Commit if `response`, which the handler has returned or raised, calls for it.

        A response that does not may still become another one.

        Raises:
            BaseException: as `settle`.
        """
        if self.phase in UNSTARTED:
            self._take(response)
            try:
                if self.has_work and await self._calls_for_commit(request, response):
                    check_response(response)
                    await self._end_transactions(commit=True)
            except BaseException as exc:
                self._note_refusal(response, exc)
                raise

    async def settle(
        self, request: web.Request, response: object, status: int | None = None, *, last: bool = False
    ) -> None:
        """End the transactions as `response` demands, nothing of which has been written.

        Args:
            request: what is answered.
            response: the answer.
            status: its status, if that is known to be final.
            last: whether to end the unit of work with them.

        Raises:
            BaseException: why they could not be ended, or why this very response was refused before. It is refused.
        """
        self._take(response)
        try:
            commit = self.has_work and await self._calls_for_commit(request, response, status)
            if commit:
                check_response(response)
            if last:
                self.leave()
            await self._end_transactions(commit=commit, last=last)
        except BaseException as exc:
            self._note_refusal(response, exc)
            raise

    async def roll_back(self, error: BaseException | None = None) -> None:
        """Roll back what is open, because of `error`; the unit of work goes on."""
        if self.has_work:
            await finalize(self.unit, commit=False, last=False, error=error)

    async def end(self, *, commit: bool, error: BaseException | None = None) -> None:
        """End the unit of work.

        Args:
            commit: whether to commit what is open.
            error: what made the end necessary.

        Raises:
            BaseException: the error of a commit.
        """
        self.leave()
        await finalize(self.unit, commit=commit, error=error)

    async def settle_start(self, request: web.Request, response: web.StreamResponse | None, status: int) -> None:
        """End the transactions before the head of `response` is written, and let it through.

        Raises:
            BaseException: as `settle`.
        """
        self._take(response)
        if self.phase is Phase.BROKEN:
            # A head in the middle of a body would make the client take that for longer than it is.
            assert self.refusal is not None
            raise self.refusal.error
        if self.phase in UNSTARTED:
            await self.settle(request, response, status)
            if self.phase is Phase.HANDLING:
                # The unit of work has ended already if the response comes in the place of an abandoned handler.
                self.move_to(Phase.BODY)

    def refuse(self, response: object, error: BaseException) -> None:
        """Keep `response` from being sent: its transactions could not be ended."""
        self.refusal = Refusal(response, error)
        self.move_to(Phase.REFUSED)

    def break_off(self, response: object, error: BaseException) -> None:
        """Keep the rest of `response` from being sent: what its body has done could not be committed."""
        self.refusal = Refusal(response, error)
        self.move_to(Phase.BROKEN)

    def watch(self, delivery: Delivery) -> None:
        """Have `delivery` told of what is about to be written for the request."""
        if self.watched is None:
            self.watched = WatchedWriter(self.writer, delivery)
        else:
            self.watched.delivery = delivery

    def leave(self) -> None:
        """Leave the request to aiohttp: its writer does not lead here any more, which also ends a reference cycle."""
        if self.watched is not None:
            self.watched.restore()
        if self.writer.ctxdb_exchange is self:
            self.writer.ctxdb_exchange = None

    def _note_refusal(self, response: object, error: BaseException) -> None:
        if self.phase in UNSTARTED or self.phase is Phase.ABANDONED:
            self.refuse(response, error)
        else:
            # Of two responses that were prepared at once, the other one is being sent: this error does not touch it.
            self.refusal = Refusal(response, error)

    def _take(self, response: object) -> None:
        """Take `response` for the one that is going to be sent.

        Raises:
            BaseException: why it was refused, if it was.
        """
        if self.refusal is not None and response is self.refusal.response:
            raise self.refusal.error
        if self.phase is Phase.REFUSED:
            self.move_to(Phase.HANDLING)

    async def _calls_for_commit(self, request: web.Request, response: object, status: int | None = None) -> bool:
        if status == _SWITCHING_PROTOCOLS:
            # A policy is about what requests ask for, and is not asked about websockets.
            return True
        if status is None:
            if not isinstance(response, (web.StreamResponse, web.HTTPException)):
                # aiohttp makes a 500 of anything else, unless a middleware makes a response of it.
                return False
            status = await status_of(response, request)
        return self.commits(status, request)

    async def _end_transactions(self, *, commit: bool, last: bool = False) -> None:
        calls = self.unit.calls
        if calls is not None and calls.are_given_up() and self.phase is Phase.HANDLING:
            self.move_to(Phase.ABANDONED)
        if not (self.has_work or self.phase is Phase.ABANDONED or last):
            return
        is_left_over = self.has_committed and calls is not None and calls.have_left_all_work(self.unit)
        try:
            if last and not commit:
                # The calls of other tasks may end before the roll-back; the end of the unit stops them.
                await finalize(self.unit, commit=False, last=False)
            await finalize(self.unit, commit=commit, last=last)
        except Exception as exc:
            if not self.has_committed:
                raise
            if not is_left_over:
                exc.add_note("ctxdb: what the handler had done was committed before that, and stands")
                raise
            logger.warning("What tasks of a handler had done since its commit was not committed", exc_info=exc)
        self.has_committed |= commit


def exchange_of(request: web.BaseRequest) -> Exchange | None:
    """Return the exchange of `request`, made now if need be; ``None`` if the request is in no unit of work."""
    writer: Any = request.writer
    found: Exchange | Opened | None = getattr(writer, "ctxdb_exchange", None)
    if isinstance(found, tuple):
        found = writer.ctxdb_exchange = Exchange(*found, writer)
    return found
