"""One request of an ASGI application as a unit of work, ended by what the application sends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from threading import get_ident
from types import MappingProxyType
from typing import Any
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.door import StatementObserver
from ctxdb_core._sqlalchemy.doors import (
    observe_statements,
    prepare_next_call,
    wait_for_calls,
)
from ctxdb_core._units import session_end
from ctxdb_core._units.abandonment import follow_calls
from ctxdb_core._units.callbacks import WaitingCallback
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.session_end import in_transaction, report
from ctxdb_core._units.unit import CreateSession, UnitOfWork
from ctxdb_core.asgi.types import Message, Receive, Send
from ctxdb_core.errors import ContextClosedError
from ctxdb_core.policy import CommitPolicy

__all__ = ["Exchange", "HTTPExchange", "WebSocketExchange"]

# How much of a request's body is kept in case that a handler of errors reads it.
_KEPT_BYTES = 1 << 20

# What a body is sent in (ASGI, "Response Body", "Path Send" and "Zero Copy Send").
_BODY_MESSAGES = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")

# WebSocket close codes that say that all went well (RFC 6455, section 7.4.1).
_NORMAL_CLOSURE, _GOING_AWAY, _INTERNAL_ERROR = 1000, 1001, 1011


class Exchange(UnitOfWork):
    """The unit of work of one request, together with the `send` that ends it in time."""

    responded = False
    """Whether a response has begun."""
    receive_again: Receive | None = None
    """Where a handler of errors receives the request from, if not where the application did."""
    can_answer = True
    """Whether a response for an error can still be sent."""
    failure: Exception | None = None
    """Why the response that the application began was not sent."""
    refused: Send
    """Where that response would have gone to."""
    may_be_abandoned = True
    """Whether an `ASGIStreamBoundary` may be beneath, which tells of calls that a middleware gives up on."""

    def __init__(self, before_commit: BeforeCommit | None, commit_policy: CommitPolicy, forward: Send) -> None:
        # UnitOfWork.__init__ is spelled out here: on a request without database use, the call would be felt.
        self.sessions = {}
        self.before_commit = before_commit
        self.thread = get_ident()
        self.commit_policy = commit_policy
        self.forward = forward

    @property
    def is_cut_off(self) -> bool:
        """Whether what is open was left in the middle, although nothing was raised."""
        return False

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message of the application, after what has to happen before it."""
        raise NotImplementedError

    def start_over(self, forward: Send) -> None:
        """Take another response: the one of the error."""
        self.failure = None
        self.responded = False
        self.forward = forward

    def refuse_messages(self, exc: Exception) -> None:
        """Send nothing more of what the application sends, because of `exc`."""
        self.failure = exc
        self.refused, self.forward = self.forward, _discard

    def answer_failure(self, raised: Exception | None) -> None:
        """Take another response in place of the refused one, the last: the one of the error.

        Args:
            raised: what the application has raised since.
        """
        if raised is not None and self.failure is not None and not _is_caused_by(raised, self.failure):
            report(raised, self.failure, "the application failed on top of it")
        self.can_answer = False
        self.start_over(self.refused)

    async def refuse_response(self, exc: Exception) -> None:
        """Send nothing more of what the application sends, as `exc` kept its transactions from being ended."""
        self.refuse_messages(exc)
        await self.roll_back(exc)

    async def respond(self, message: Message) -> None:
        """End the transactions as the status of the response demands, then let it start."""
        # After a refused response, the application may try one of its own for the error: it is not sent either.
        if self.failure is None:
            await self.settle(message["status"])
        await self.forward(message)

    async def settle(self, status: int) -> None:
        """End the transactions as `status` demands; if that fails, the response is refused."""
        try:
            if self.commit_policy(status):
                await self.commit()
            else:
                # A body that is made already may be using the session: it shall not be interrupted.
                await wait_for_calls(self.sessions.values())
                await self.roll_back()
        except Exception as exc:
            await self.refuse_response(exc)
            raise

    async def app_raised(self, exc: BaseException) -> bool:
        """Roll back for an exception of the application; return whether it is the one to raise.

        It is not where a commit failed: then that error surfaces, and not what the application made of it.
        """
        failure = self.failure
        if failure is None:
            await self.finish(commit=False, error=exc)
            return True
        if isinstance(exc, Exception):
            if not _is_caused_by(exc, failure):
                report(exc, failure, "the application failed on top of it")
            return False
        report(failure, exc, "nothing was committed, as that had failed")
        await self.finish(commit=False, error=exc)
        return True


class HTTPExchange(Exchange):
    """The unit of work of an HTTP request.

    What is open when a task is cancelled that sends the body, and has not sent the last of it, is the body's, which was
    cut off. What comes after that belongs to others.
    """

    source: Receive
    kept_bytes = 0
    kept: list[Message] | None = None
    """The request's body as far as the application has received it; empty once it is too large to be kept."""
    body_is_ahead = False
    """Whether the body has used a session while the start of the response was on its way to us."""
    stream_status: int | None = None
    """The status that a streamed response has beneath the middlewares that may hold its start back."""
    is_replaced = False
    """Whether these have made an error of a streamed response that was a success."""
    is_watched = False
    """Whether it is noted who sends the body, as sessions may be in use."""
    is_used = False
    """Whether one was, since the transactions of the response were ended."""
    # By weak reference: a task's context knows the exchange, and its error the frames of a body that is to be closed.
    senders: frozenset[ref[Any]] = frozenset()
    """The tasks that have sent something of the response, while it was watched."""
    body_sent = False
    """Whether the last of the body was sent."""
    parked: dict[DBConnect, AsyncSession] | None = None
    """Sessions that are to be rolled back before anything else uses them."""
    parked_callbacks: Mapping[DBConnect, Sequence[WaitingCallback]] = MappingProxyType({})
    """What waits for the commits of sessions that were put out of the way."""
    recovering: asyncio.Future[None] | None = None
    """The roll-back of what a body has left open."""

    async def receive(self) -> Message:
        """Pass the request on to the application, and keep it for a handler of errors that wants to read it."""
        message = await self.source()
        if message["type"] == "http.request" and self.kept_bytes <= _KEPT_BYTES:
            self.kept_bytes += len(message.get("body", b""))
            kept = self.kept = self.kept or []
            kept.append(message)
            if self.kept_bytes > _KEPT_BYTES:
                self.kept = [{"type": "http.request", "body": b"", "more_body": False}]
        return message

    async def receive_again(self) -> Message:
        """Return once more what `receive` has passed on, then what follows: an error handler reads from the start."""
        return self.kept.pop(0) if self.kept else await self.source()

    def send(self, message: Message) -> Awaitable[None]:
        # A plain function: most messages cost no coroutine of their own.
        if message["type"] == "http.response.start":
            self.responded = True
            if self.sessions or self.callbacks or self.stream_status or (self.calls is not None and self.calls.at_work):
                return self.respond(message)
        elif self.is_watched:
            if self.stream_status is None:
                self.note_progress(message)
            if self.body_sent and any(map(in_transaction, self.sessions.values())):
                return self.end_body(message)
        return self.forward(message)

    async def respond(self, message: Message) -> None:
        if self.calls is not None and self.calls.at_work and self.failure is None:
            try:
                await self.calls.finish(self, commit=self.commit_policy(message["status"]))
            except Exception as exc:
                self.refuse_messages(exc)
                raise
        elif self.failure is None and self.is_replaced_by(message["status"]):
            self.is_replaced = True
            await wait_for_calls(self.sessions.values())
            await self.roll_back()
        # Where the body is ahead, what is open now is the body's, and none of the response's.
        elif not self.body_is_ahead:
            if self.failure is None:
                await self.settle(message["status"])
            self.watch_statements()
        if self.stream_status is None:
            self.senders = frozenset([_current_task()])
        await self.forward(message)

    def is_replaced_by(self, status: int) -> bool:
        """Return whether a middleware sends an error of its own, with `status`, in the place of a streamed success."""
        return (
            self.stream_status is not None and self.commit_policy(self.stream_status) and not self.commit_policy(status)
        )

    async def end_body(self, message: Message) -> None:
        """Commit what the body has done before the last of it is sent: if that fails, the client sees it break off."""
        try:
            await self.commit()
        except Exception:
            self.forward = _discard
            raise
        await self.forward(message)

    async def stream_begins(self, status: int) -> bool:
        """End the transactions before a body begins whose start has a way to go before it is sent.

        Returns:
            Whether the one who asks is to `note_progress`.
        """
        # Of several boundaries, the innermost one has done it: what is open at the others is the body's.
        if self.failure is None and not self.responded and not self.is_watched:
            if self.sessions or self.callbacks:
                await self.settle(status)
            self.stream_status = status
            self.senders = frozenset([_current_task()])
            self.watch_statements()
            return True
        return False

    def watch_statements(self) -> None:
        """Note from now on what is done for the body."""
        self.is_watched = True
        observe_statements(self.sessions.values(), self.note_statement)

    def statement_observer(self) -> StatementObserver | None:
        # What a middleware does before it comes to a boundary is noted, too.
        if self.calls is None and self.may_be_abandoned and not self.responded:
            follow_calls(self)
        return self.note_statement if self.calls is not None or self.responded or self.is_watched else None

    def note_statement(self, session: Session, clause: Any) -> None:
        """Note that the current task uses a session."""
        calls = self.calls
        if not self.is_watched and not (self.responded and (calls is None or calls.left_open is None)):
            if calls is not None:
                calls.observe(session, clause)
            return
        if calls is not None and calls.running() is not None:
            if self.is_replaced:
                raise ContextClosedError
            self.body_is_ahead = self.body_is_ahead or not self.responded
        if not self.is_used:
            self.is_watched = self.is_used = True
            # Where nothing has been sent since it was watched, the body may be what begins here.
            for sender in self.senders or [_current_task()]:
                self.await_end(sender())

    def await_end(self, sender: asyncio.Task[Any] | None) -> None:
        """Be told when `sender` ends."""
        if sender is not None and not sender.done():
            # A task may live much longer than the request.
            sender.add_done_callback(partial(_note_end, ref(self)))

    def park(self) -> None:
        """Put what a body has left open out of the way, as it ended in the middle: others shall not commit it."""
        if self.closed or self.body_sent or self.recovering:
            return
        left = [db for db, session in self.sessions.items() if in_transaction(session)]
        if left:
            if self.callbacks is not None:
                self.parked_callbacks = self.callbacks.set_aside(left)
            self.parked = {**(self.parked or {}), **{db: self.sessions.pop(db) for db in left}}
            prepare_next_call(self.parked.values(), self.recover)

    async def recover(self) -> None:
        """Roll back what a body has left open, and let its sessions be used again."""
        if self.recovering is None:
            self.recovering = asyncio.ensure_future(run_to_completion(self._roll_back_parked()))
        await asyncio.shield(self.recovering)

    async def _roll_back_parked(self) -> None:
        parked = self.parked or {}
        prepare_next_call(parked.values(), None)
        try:
            for db, session in parked.items():
                await session_end.roll_back(session, None, db)
        finally:
            self.sessions.update(parked)
            self.parked = self.recovering = None

    def finish_idle(self) -> bool:
        return not self.parked and super().finish_idle()

    async def open_session(self, db: DBConnect, create: CreateSession | None = None) -> AsyncSession:
        if self.parked:
            await self.recover()
        return await super().open_session(db, create)

    async def _finish(self, *, commit: bool, error: BaseException | None) -> None:
        if self.recovering is not None:
            await asyncio.shield(self.recovering)
        elif self.parked:
            await self._roll_back_parked()
        await super()._finish(commit=commit, error=error)

    async def body_failed(self, error: BaseException) -> None:
        """Roll back for an error of a body, which middlewares may hide: they end the body as if it were complete."""
        if self.stream_status is not None and not self.body_sent:
            await self.roll_back(error)

    def note_progress(self, message: Message) -> None:
        """Note who sends the body, and its end."""
        if self.parked and self.recovering is None:
            # It goes on after all: another task sends the rest.
            self.sessions.update(self.parked)
            prepare_next_call(self.parked.values(), None)
            self.parked = None
            if self.callbacks is not None:
                self.callbacks.take_back(self.parked_callbacks)
        if message.get("more_body", False):
            sender = _current_task()
            if sender not in self.senders:
                self.senders |= {sender}
                if self.is_used:
                    self.await_end(sender())
        elif message["type"] in _BODY_MESSAGES:
            self.body_sent = True

    @property
    def is_cut_off(self) -> bool:
        """Whether the body has not come to its end, and another task was to send the rest."""
        if not self.is_used or self.body_sent:
            return False
        tasks = [sender() for sender in self.senders]
        return any(task is not None and not task.done() and task is not asyncio.current_task() for task in tasks)

    def start_over(self, forward: Send) -> None:
        super().start_over(forward)
        self.body_is_ahead = self.body_sent = self.is_watched = self.is_used = self.is_replaced = False
        self.stream_status = None


class WebSocketExchange(Exchange):
    accepted = False
    """Whether the handshake was accepted."""

    def send(self, message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "websocket.accept":
            return self._accept(message)
        if kind == "websocket.close":
            return self._close(message)
        if kind == "websocket.http.response.start":
            self.responded = True
            return self.respond(message)
        return self.forward(message)

    async def _accept(self, message: Message) -> None:
        # The upgrade is a success like any other; a policy is about what requests ask for, and is not asked.
        if self.failure is None:
            try:
                await self.commit()
            except Exception as exc:
                await self.refuse_response(exc)
                raise
            self.accepted = self.responded = True
            self.can_answer = False
        await self.forward(message)

    async def _close(self, message: Message) -> None:
        # A close before the handshake is over refuses it: the client gets a 403.
        normal = self.accepted and message.get("code", _NORMAL_CLOSURE) in (_NORMAL_CLOSURE, _GOING_AWAY)
        forward = self.forward
        if self.failure is None:
            try:
                if normal:
                    await self.commit()
                else:
                    await self.roll_back()
            except Exception as exc:
                await self.refuse_response(exc)
                self.can_answer = False
                await forward({"type": "websocket.close", "code": _INTERNAL_ERROR, "reason": ""})
                raise
        await self.forward(message)


def _note_end(exchange: ref[HTTPExchange], task: asyncio.Task[Any]) -> None:
    """Be told of the end of a task that has sent something of a body, or may have been about to."""
    if task.cancelled() and (left := exchange()) is not None:
        left.park()


def _current_task() -> ref[Any]:
    return ref(asyncio.current_task())


async def _discard(message: Message) -> None:
    """Drop a message of an application whose response is not sent any more."""


def _is_caused_by(exc: BaseException | None, cause: BaseException) -> bool:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if exc is cause:
            return True
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__
    return False
