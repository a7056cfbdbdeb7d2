"""`HTTPExchange`: an HTTP request as a unit of work, ended by what the application sends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Coroutine
from contextlib import suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import SeenThrough
from ctxdb_core._sqlalchemy.door import StatementObserver
from ctxdb_core._sqlalchemy.doors import observe_statements
from ctxdb_core._units.abandonment import Call, HandlerCalls
from ctxdb_core._units.authorship import find_authors
from ctxdb_core._units.request_unit import follow_calls
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.unit_hooks import UnitHooks
from ctxdb_core._units.unit_sessions import CreateSession
from ctxdb_core._units.watcher import UnitWatcher
from ctxdb_core.asgi.body import LAST_MESSAGES, Body, StreamedBody, let_failure_arrive, running_task
from ctxdb_core.asgi.exchange import Exchange
from ctxdb_core.asgi.request import KeptRequest
from ctxdb_core.asgi.response import Response, ResponseStart
from ctxdb_core.asgi.types import Message, Receive
from ctxdb_core.errors import ContextClosedError
from ctxdb_core.phases import Phase

__all__ = ["HTTPExchange"]

_NOT_STARTED = (Phase.HANDLING, Phase.AHEAD)
_STARTED = (Phase.BODY, Phase.AFTER, Phase.OVERRULED)

# Bound once: to look up a member of an enumeration takes as long as several calls (Python 3.11).
_HANDLING, _BODY, _AFTER = Phase.HANDLING, Phase.BODY, Phase.AFTER


class HTTPExchange(Exchange):
    """The unit of work of an HTTP request.

    Two strategies are installed where something asks for them: `calls`, beneath a middleware that may give up on a
    handler, and the `body` of the `response`, once that is sent while sessions are in use.
    """

    source: Receive
    """Where the request comes from: the `receive` of the server, or a `KeptRequest` once the body is being read."""
    # What a base class declares is declared again where it is set: type checkers would infer another type from that.
    phase: Phase

    # --- the request --------------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Pass the request on to the application, and keep it for a handler of errors that wants to read it."""
        message = await self.source()
        if message["type"] == "http.request":
            if not isinstance(self.source, KeptRequest):
                self.source = KeptRequest(self.source)
            self.source.keep(message)
        return message

    def request_again(self, receive: Receive) -> Receive:
        """Return where a handler of errors receives the request from: from its beginning, if that was kept."""
        return self.source.receive_again if isinstance(self.source, KeptRequest) else self.source

    # --- what the application sends -----------------------------------------------------------------------------------

    def send(self, message: Message) -> Awaitable[None]:
        # A plain function: most messages cost no coroutine of their own.
        response = self.response
        if response is None:
            kind = message["type"]
            if kind == "http.response.start":
                self.phase = _BODY
            elif (
                self.phase is _BODY
                and kind in LAST_MESSAGES
                and ("more_body" not in message or not message["more_body"])
            ):
                self.phase = _AFTER
            return self.server(message)
        if message["type"] == "http.response.start":
            return self._start(response, message)
        if response.start is not None and response.start.holds_up():
            return self.send_behind(response.start, message)
        if response.body is not None and self.phase in _STARTED:
            return self._go_on(response.body, message)
        if self.phase is _BODY and message["type"] in LAST_MESSAGES and not message.get("more_body"):
            # The body has asked for a callback, say, and has used no session.
            self.move_to(_AFTER)
        return self.forward(message)

    async def _start(self, response: Response, message: Message) -> None:
        """Forward the start of a response, once the transactions have ended that it stands for."""
        response.start = start = ResponseStart()
        try:
            if response.body is not None and response.body.lacks_start and self.phase is _BODY:
                await self._begin_anew(response, response.body)
            # A second start is the server's to refuse.
            if self.phase in _NOT_STARTED:
                start.enter()
                if self.calls is None:
                    await self._settle_and_start(response, message)
                else:
                    await self._end_transactions_apart(response, message, self.calls)
                registration = self.registration
                if registration is not None and registration.watchers:
                    message = self.announce(message, registration.watchers)
            # Most responses are in their body now, and are let through without a further look.
            await (self.server(message) if self.phase is _BODY else self.forward(message))
        except asyncio.CancelledError as exc:
            if isinstance(exc.__cause__, SeenThrough):
                response.unsent = message
            raise
        finally:
            response.end_start(start)

    def _end_transactions_apart(self, response: Response, message: Message, calls: HandlerCalls) -> Awaitable[None]:
        """End what the start of a response stands for, where handlers or a streamed body may be at work beside it.

        Raises:
            Exception: why it could not be ended; the response is refused.
        """
        body, status = response.body, message["status"]
        if calls.at_work and not self.closed:
            return self._abandon(calls, status)
        if isinstance(body, StreamedBody):
            if self._overrules(status, body):
                return self._overrule(response, body)
            if self._goes_on(body, status):
                return self._start_behind_body()
        return self._settle_as_handler(response, message, calls)

    async def _settle_as_handler(self, response: Response, message: Message, calls: HandlerCalls) -> None:
        with calls.variables_of_handler():
            await self._settle_and_start(response, message)

    def _goes_on(self, body: StreamedBody, status: int) -> bool:
        """Return whether `body` works in the open transactions, and goes on there behind a start with `status`."""
        if not body.has_used_a_session:
            return False
        if body.is_complete or body.call is None:
            # Its start was held back until it was made: a success can wait for the commit of it all.
            return not self.settings.middleware.commits(status, self.origin)
        authors = find_authors(self.sessions.values(), (body.call,))
        return authors.handlers or not authors.others

    async def _start_behind_body(self) -> None:
        """Go over to the body without ending a transaction: this body has begun before its start is sent.

        What is open now is the work of the body, and is committed before its last part.
        """
        self.move_to(Phase.BODY)
        await self.end_reading()

    async def _settle_and_start(self, response: Response, message: Message) -> None:
        """End the transactions for the start of a response, and begin its body."""
        try:
            await self.settle(message)
        except asyncio.CancelledError:
            self.give_up_start()
            raise
        self._begin_body(response, Body(running_task()))

    def give_up_start(self) -> None:
        """Go over to the body of a response whose start was not let through, as the task that sends it was cancelled.

        The client may have gone: the framework swallows that then, and goes on with background work, which is committed
        like that of any response. Or a middleware limits the time, and is going to answer.
        """
        if self.phase in _NOT_STARTED:
            self._begin_body(self.follow_response(), Body()).lacks_start = True

    def _begin_body(self, response: Response, body: Body) -> Body:
        """Go over to the body of the response, and return it: `body`, unless it has begun before."""
        if self.phase in _NOT_STARTED:
            self.move_to(_BODY)
        if response.body is not None:
            return response.body
        self._follow(response, body)
        return body

    async def _begin_anew(self, response: Response, body: Body) -> None:
        """Forget `body`: another response comes in the place of its own. What it has left open is ended by that one."""
        phase = self.phase
        await body.recover(self)
        if self.phase is phase:
            response.body = response.unsent = None
            self.move_to(Phase.HANDLING)

    async def _abandon(self, calls: HandlerCalls, status: int) -> None:
        """End the unit for a response in the place of a handler that goes on."""
        self.move_to(Phase.ABANDONED)
        try:
            await calls.finish(self, commit=self.settings.middleware.commits(status, self.origin))
        except Exception as exc:
            self.refuse(exc)
            raise

    def _overrules(self, status: int, body: StreamedBody) -> bool:
        """Return whether a response with `status` is a middleware's error in the place of a streamed success."""
        commits = self.settings.middleware.commits
        return commits(body.status, self.origin) and not commits(status, self.origin)

    async def _overrule(self, response: Response, body: StreamedBody) -> None:
        """Undo what the streamed body has done since its transactions ended, and refuse its further statements."""
        self.move_to(Phase.OVERRULED)
        body.is_complete = True
        await body.recover(self)
        # The error has a body of its own.
        self._follow(response, Body(running_task()))
        await self.roll_back()

    def _go_on(self, body: Body, message: Message) -> Awaitable[None]:
        """Forward a part of a body, and commit before the last one."""
        body.note_sent(message, self)
        if body.is_complete:
            if any(map(in_transaction, self.sessions.values())):
                return self._end_body(body, message)
            self.note_body_is_sent()
        elif not isinstance(body, StreamedBody) and any(map(in_transaction, self.sessions.values())):
            return self._send_part(message)
        return self.server(message)

    async def _send_part(self, message: Message) -> None:
        """Forward a part of a body, which a client may be slow to read: what has only read holds no connection."""
        await self.end_reading()
        await self.forward(message)

    async def _end_body(self, body: Body, message: Message) -> None:
        """Commit what the body has done before the last of it is sent; if that fails, the client sees it break off."""
        if body.has_users_beside_sender:
            await let_failure_arrive()
        await self.send_last(message)

    async def commit_body(self) -> None:
        if self.calls is None:
            await super().commit_body()
        else:
            with self.calls.variables_of_handler():
                await super().commit_body()

    # --- what a boundary beneath middlewares tells --------------------------------------------------------------------

    def follow_calls(self) -> HandlerCalls:
        """Follow the calls of handlers from now on, as a middleware may give up on one."""
        self.follow_response()
        return follow_calls(self)

    async def begin_stream(self, message: Message, call: Call) -> StreamedBody | None:
        """End the transactions before a streamed body begins whose start is still held back by middlewares.

        Returns:
            The body, whose progress the boundary is to tell; ``None`` if there is nothing to tell: of several
            boundaries, the innermost one has begun the body, and what is open at the others is its work.

        Raises:
            Exception: as `settle`.
        """
        if not self._is_handling():
            return None
        if self.sessions or self.callbacks:
            await self.settle(message)
            if not self._is_handling():
                # Meanwhile, a middleware has begun a response of its own.
                return None
        self.move_to(Phase.AHEAD)
        body = StreamedBody(message["status"], call, running_task())
        self._follow(self.follow_response(), body)
        return body

    def _is_handling(self) -> bool:
        # A method, as the phase may change in each `await`, which type checkers do not expect of an attribute.
        return self.phase is Phase.HANDLING

    async def forget_stream(self) -> None:
        """Begin anew if the streamed body has returned: a middleware has dropped the response, and calls once more."""
        response = self.response
        if response is not None and isinstance(response.body, StreamedBody) and response.body.call is None:
            await self._begin_anew(response, response.body)

    async def fail_stream(self, body: StreamedBody, error: BaseException) -> None:
        """Roll back for an `error` of a streamed body, which middlewares may hide by a proper end of it."""
        if not body.is_complete:
            await self.roll_back(error)

    # --- what is done in the unit -------------------------------------------------------------------------------------

    def _follow(self, response: Response, body: Body) -> None:
        """Install `body` as the strategy for what is done from now on."""
        response.body = body
        observe_statements(self.sessions.values(), self.note_statement)

    def prepare_session(self, db: DBConnect, session: AsyncSession) -> None:
        response = self.follow_response()
        if self.phase is _HANDLING:
            if self.settings.middleware.has_boundary:
                # The statements of middlewares outside of the boundary are noted, too.
                follow_calls(self)
        elif self.phase in _STARTED and response.body is None:
            response.body = Body()
            # What uses the first session behind the whole body is background work, and cannot be cut off with it.
            response.body.is_complete = self.phase is Phase.AFTER
            if self.phase is _BODY:
                response.body.note_use(self)
        super().prepare_session(db, session)

    def watch(self, watcher: UnitWatcher, owner: object = None) -> None:
        # The watcher is to be told of the end, also if there is nothing else to end.
        if self.response is None:
            self.follow_response()
        # `super()` would cost as much as all the rest.
        Exchange.watch(self, watcher, owner)

    def statement_observer(self) -> StatementObserver | None:
        return None if self.calls is None and self._body is None else self.note_statement

    @property
    def _body(self) -> Body | None:
        """The body of the response, as far as it has to be followed."""
        return None if self.response is None else self.response.body

    def note_statement(self, session: Session, clause: Any) -> None:
        """Tell the strategies of a statement that is about to be made on `session`: a `StatementObserver`.

        Raises:
            ContextClosedError: the statement is one of a handler that was given up on, or of an overruled body.
        """
        calls, body = self.calls, self._body
        if body is None or self.phase is Phase.ABANDONED:
            if calls is not None:
                calls.observe(session, clause)
            return
        is_of_handler = calls is not None and calls.running() is not None
        if self.phase is Phase.OVERRULED and is_of_handler:
            raise ContextClosedError
        if self.phase is Phase.AHEAD:
            assert calls is not None
            calls.observe(session, clause)
            if not is_of_handler:
                # A statement outside of the handler is a middleware's, and is committed with the start.
                return
        body.note_use(self)

    def _hooks(self) -> UnitHooks:
        # What is asked for is about the start of the response, also if there is nothing else to end.
        self.follow_response()
        return super()._hooks()

    def open_session(self, db: DBConnect, create: CreateSession | None = None) -> Coroutine[Any, Any, AsyncSession]:
        response = self.response
        if response is not None and response.body is not None and response.body.parked is not None:
            return self._open_session_after_recovery(response.body, db, create)
        return super().open_session(db, create)

    async def _open_session_after_recovery(
        self, body: Body, db: DBConnect, create: CreateSession | None
    ) -> AsyncSession:
        await body.recover(self)
        return await super().open_session(db, create)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def roll_back(self, error: BaseException | None = None, dbs: Collection[DBConnect] | None = None) -> None:
        body = self._body
        if body is not None and body.parked is not None:
            await body.roll_back_parked(self)
        await super().roll_back(error, dbs)

    async def fail(self, exc: BaseException) -> bool:
        response = self.response
        if response is not None and response.unsent is not None:
            # A server answers 500 where nothing of a response has left, as when it cancels the requests that outlast
            # its shutdown. A client would take what is stored for rolled back. With the start, the client sees a
            # response that breaks off.
            message, response.unsent = response.unsent, None
            with suppress(Exception, asyncio.CancelledError):
                await self.forward(self.announce(message, self.watchers))
        return await super().fail(exc)

    def begin_answer(self, raised: Exception | None = None) -> None:
        super().begin_answer(raised)
        response = self.follow_response()
        if response.body is not None:
            response.body.is_complete = True
            response.body = None

    def finish_idle(self) -> bool:
        response = self.response
        if response is not None and response.body is not None and response.body.parked is not None:
            return False
        if not super().finish_idle():
            return False
        if self.calls is not None:
            self.calls.forget_variables()
        return True

    async def finish(self, *, commit: bool, error: BaseException | None = None) -> None:
        if self.calls is None:
            await super().finish(commit=commit, error=error)
        else:
            try:
                with self.calls.variables_of_handler():
                    await super().finish(commit=commit, error=error)
            finally:
                self.calls.forget_variables()

    async def _finish(self, *, commit: bool, error: BaseException | None, latest: float | None = None) -> None:
        body = self._body
        if body is not None:
            await body.recover(self)
        await super()._finish(commit=commit, error=error, latest=latest)

    @property
    def is_cut_off(self) -> bool:
        body = self._body
        return body is not None and body.is_cut_off()
