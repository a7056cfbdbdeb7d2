"""`Body`: what a response's body does with sessions, if it is cut off or begins before the start is sent, too.

A request whose sessions are in use when its response starts has one, and so has a request that a streamed response was
seen in by an `ASGIStreamBoundary`. What the body does with a session is committed when its last chunk leaves, or rolled
back if that never comes. No event says that it will not come: when a client leaves, a framework cancels the task that
sends the chunks, swallows the cancellation, and goes on with background work, which is to be committed. So it is noted
which tasks have sent chunks. If one of them is cancelled in the middle of the body, the open transactions are *parked*:
out of reach for the background work, they wait for one of three things. Another task sends the next chunk: the body
goes on after all, and has its transactions back. The background work asks for a session: they are rolled back before
it gets one. The request ends: they are rolled back, too.

How the start of a response ends the transactions, and leaves the sessions to the body, is decided by `HTTPExchange`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.doors import is_held, prepare_next_call
from ctxdb_core._units import session_end
from ctxdb_core._units.callbacks import WaitingCallback
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.asgi.types import Message

__all__ = ["LAST_MESSAGES", "Body", "StreamedBody", "let_failure_arrive", "running_task"]

LAST_MESSAGES = (
    "http.response.body",
    "http.response.pathsend",
    "http.response.zerocopysend",
    "http.response.trailers",
)
"""The types of messages that a body ends with (ASGI, "Response Body", "Path Send" and "Zero Copy Send"), unless they
announce more of it, and of what comes behind its last part.
"""

# How many turns of the event loop a failed task is given to end, and its task group to cancel the task that sends.
# FastAPI needs one; each further task between the two may need one more.
_TURNS_FOR_A_FAILURE = 3


class Body:
    """The body of a response whose start is let through when it is made.

    The body is told of its unit of work each time. If it knew the unit, the two would be a reference cycle.
    """

    # Defaults are the class's: most bodies are sent at once, and use no session.
    has_used_a_session: bool = False
    """Whether a session was used since the transactions of the response were ended."""
    is_complete: bool = False
    """Whether the last of the body was sent, or nothing more of it is going to be."""
    lacks_start: bool = False
    """Whether the task that was to send the start was cancelled: nothing of the response has left."""
    parked: ParkedSessions | None = None
    """The transactions that the body had open when it was cut off."""
    # Tasks are known by weak reference: the context of a task knows the exchange, and its error the frames of a body
    # that is to be closed.
    users: frozenset[ref[Any]] = frozenset()
    """The tasks that have used a session while the body was not complete, and go on."""
    _followed: frozenset[ref[Any]] = frozenset()
    """The tasks that send the body, and whose end matters."""
    has_cancelled_user: bool = False
    """Whether a task that has used a session was cancelled."""
    has_ended_user: bool = False
    """Whether a task that has used a session has ended otherwise."""

    def __init__(self, *senders: ref[Any]) -> None:
        self.senders: Collection[ref[Any]] = senders
        """The tasks that have sent something of the response, and may be about to send more of it."""

    def note_progress(self, message: Message, unit: UnitOfWork) -> None:
        """Note which task sends the body, and the end of the body."""
        if self.parked is not None and self.parked.recovering is None:
            # The body goes on after all, in another task.
            self.parked.put_back(unit)
            self.parked = None
        if message.get("more_body", False):
            sender = running_task()
            if sender not in self.senders:
                self.senders = {*self.senders, sender}
            # An object that is only added makes no statement by which the use of a session would be noted.
            if sender not in self._followed and (self.has_used_a_session or unit.sessions):
                self._await_end(sender, unit)
        elif message["type"] in LAST_MESSAGES:
            self.is_complete = True

    note_sent = note_progress
    """Note what is about to be forwarded to the server: that is the body's progress, unless a boundary tells of it."""

    def note_use(self, unit: UnitOfWork) -> None:
        """Note that a session is used: from now on, the end of a sender matters."""
        task = running_task()
        if task not in self.users and not self.is_complete:
            # It may be about to send the first of the body.
            self.users |= {task}
            self._follow_end(task, partial(_note_end_of_user, ref(self), task))
        if not self.has_used_a_session:
            self.has_used_a_session = True
            # If no sender is known, as no session was open when the response started, the running task may be one.
            for sender in self.senders or (task,):
                if sender not in self._followed:
                    self._await_end(sender, unit)

    @property
    def has_users_beside_sender(self) -> bool:
        """Whether a task other than the running one, which sends the last of the body, has used a session."""
        return self.has_ended_user or bool(self.users - {running_task()})

    def _await_end(self, sender: ref[Any], unit: UnitOfWork) -> None:
        self._followed |= {sender}
        self._follow_end(sender, partial(_note_end, ref(self), ref(unit)))

    def _follow_end(self, task_ref: ref[Any], callback: Callable[[asyncio.Task[Any]], None]) -> None:
        task: asyncio.Task[Any] | None = task_ref()
        if task is not None and not task.done():
            # A task may live much longer than the request, and must not keep it. The tasks of Granian's
            # `--task-impl rust` are none of asyncio's, and cannot tell of their end: "uninitialized Future object".
            with suppress(RuntimeError):
                task.add_done_callback(callback)

    def park(self, unit: UnitOfWork) -> None:
        """Put the open transactions out of reach, as the body has ended in the middle."""
        if unit.closed or self.is_complete or (self.parked is not None and self.parked.recovering is not None):
            return
        dbs = [db for db, session in unit.sessions.items() if session_end.in_transaction(session)]
        if dbs or unit.callbacks:
            if self.parked is None:
                self.parked = ParkedSessions()
            self.parked.take(dbs, unit)
            # In the middle of the call itself, the session would hold the objects of the body and of what follows it.
            prepare_next_call(self.parked.sessions.values(), partial(self.recover, unit))

    async def recover(self, unit: UnitOfWork) -> None:
        """Roll back what is parked, and put its sessions back to be used again."""
        parked = self.parked
        if parked is None:
            return
        if parked.recovering is None:
            # A task of its own, as the one that asks for a session may be cancelled meanwhile.
            parked.recovering = asyncio.ensure_future(run_to_completion(self._roll_back(parked, unit)))
        await asyncio.shield(parked.recovering)

    async def roll_back_parked(self, unit: UnitOfWork) -> None:
        """Roll back the parked sessions as `recover` does; the running code may have the turn of one of them.

        Another task that recovers these sessions may be waiting for that very turn. It puts the session back later.
        """
        parked = self.parked
        if parked is None or parked.recovering is None or not await parked.roll_back_where_held():
            await self.recover(unit)

    async def _roll_back(self, parked: ParkedSessions, unit: UnitOfWork) -> None:
        try:
            await parked.roll_back(unit)
        finally:
            self.parked = None
            # What they have done is undone.
            self.users, self.has_cancelled_user, self.has_ended_user = frozenset(), False, False

    def is_cut_off(self) -> bool:
        """Return whether the body is not complete, and another task than the running one was to send the rest.

        That task may have been cancelled before it has sent anything. It is taken for such a one if all that was done
        with sessions since the response has started was done in tasks that were cancelled.
        """
        if not self.has_used_a_session or self.is_complete:
            return False
        if self.has_cancelled_user and not self.has_ended_user and not self.users:
            return True
        tasks = [sender() for sender in self.senders]
        return any(task is not None and not task.done() and task is not asyncio.current_task() for task in tasks)


class StreamedBody(Body):
    """A body whose start is still on its way through middlewares when it begins.

    The boundary beneath these middlewares tells of its progress: what they make of it later is not the body's doing.

    Args:
        status: the status of its start at the boundary.
        call: the call of the handler that makes it.
        sender: the task that has sent it.
    """

    def __init__(self, status: int, call: object, sender: ref[Any]) -> None:
        super().__init__(sender)
        self.status: int = status
        self.call: object | None = call
        """The call of the handler that makes it; ``None`` once that has returned."""

    def note_sent(self, message: Message, unit: UnitOfWork) -> None:
        """Leave it to the boundary to tell of the progress."""


class ParkedSessions:
    """Sessions in the middle of a transaction that no code may go on with, taken out of their unit of work."""

    __slots__ = ("_rolled_back", "callbacks", "recovering", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[DBConnect, AsyncSession] = {}
        self.callbacks: dict[DBConnect, Sequence[WaitingCallback]] = {}
        """The callbacks that wait for the commits of these transactions."""
        self.recovering: asyncio.Future[None] | None = None
        """The roll-back of these transactions, once it has begun."""
        self._rolled_back: set[DBConnect] = set()
        """Where the transactions are rolled back already: later ones are those of other code."""

    def take(self, dbs: list[DBConnect], unit: UnitOfWork) -> None:
        """Take the sessions on `dbs` out of `unit`, and all callbacks: some may wait for a first statement."""
        self.sessions.update({db: unit.sessions.pop(db) for db in dbs})
        if unit.callbacks is not None:
            self.callbacks.update(unit.callbacks.set_aside())

    def put_back(self, unit: UnitOfWork) -> None:
        """Let `unit` go on with the transactions."""
        prepare_next_call(self.sessions.values(), None)
        unit.sessions.update(self.sessions)
        if unit.callbacks is not None:
            unit.callbacks.take_back(self.callbacks)

    async def roll_back_where_held(self) -> bool:
        """Roll back the transactions of the sessions whose turn the running code has; return whether there are any."""
        held = [db for db, session in self.sessions.items() if is_held(session)]
        for db in held:
            await self._roll_back(db)
        return bool(held)

    async def _roll_back(self, db: DBConnect) -> None:
        session = self.sessions[db]
        async with session_end.turn(session):
            if db not in self._rolled_back:
                self._rolled_back.add(db)
                await session_end.roll_back(session, None, db)

    async def roll_back(self, unit: UnitOfWork) -> None:
        """Roll the transactions back, and let `unit` use the sessions again."""
        prepare_next_call(self.sessions.values(), None)
        # What the code behind the body has asked for is about transactions that are still to come.
        of_others = {} if unit.callbacks is None else unit.callbacks.set_aside()
        try:
            for db in self.sessions:
                await self._roll_back(db)
        finally:
            unit.sessions.update(self.sessions)
            if unit.callbacks is not None:
                unit.callbacks.roll_back(self.callbacks)
                unit.callbacks.take_back(of_others)


def running_task() -> ref[Any]:
    """Return the running task, by a weak reference."""
    return ref(asyncio.current_task())


async def let_failure_arrive() -> None:
    """Give the failure of the task that makes a body the time to cancel the running task, which sends its end.

    FastAPI's server-sent events, for instance, are made in one task and sent in another. If the first one fails, it
    closes the stream between the two, as if the body had come to its end, and its task group cancels the second one
    some turns of the event loop later: without this, the work of a body that has failed would have been committed.
    """
    for _ in range(_TURNS_FOR_A_FAILURE):
        await asyncio.sleep(0)


def _note_end_of_user(body_ref: ref[Body], task_ref: ref[Any], task: asyncio.Task[Any]) -> None:
    body = body_ref()
    if body is None or task_ref not in body.users:
        # What it has done was rolled back meanwhile.
        return
    body.users -= {task_ref}
    if task.cancelled():
        body.has_cancelled_user = True
    else:
        body.has_ended_user = True


def _note_end(body_ref: ref[Body], unit_ref: ref[UnitOfWork], task: asyncio.Task[Any]) -> None:
    """Park what a body has open if one of its senders was cancelled: a callback for the end of that task."""
    if task.cancelled():
        body, unit = body_ref(), unit_ref()
        if body is not None and unit is not None:
            body.park(unit)
