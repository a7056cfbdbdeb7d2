"""`HandlerCalls`: which handlers a unit of work waits for, and what becomes of it when a middleware gives up on one.

A middleware may answer in the place of a handler that goes on, as one does around a call that took too long. What such
a handler has written is not whole, so it is not committed, while the work of the middleware itself may be. To tell them
apart, each statement is noted with the call of the handler that it was made in, which costs something. So this is an
object of its own, which `follow_calls` installs in a unit of work where handlers may be given up on: in any other unit,
`UnitOfWork.calls` is ``None``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, Token, copy_context
from typing import Any

from sqlalchemy.orm import Session

from ctxdb_core._units.authorship import Authors, find_authors, has_written, note_author
from ctxdb_core._units.unit_end import UnitEnd
from ctxdb_core.errors import AbandonedWorkError, ContextClosedError

__all__ = ["Call", "HandlerCalls", "current_call"]


class Call:
    """The call of a handler, which a middleware may give up on while it goes on.

    Args:
        calls: those of the unit of work that it is made in. Tasks and servers inherit the call through contextvars,
            whichever unit of work they have then.
    """

    __slots__ = ("calls", "is_innermost", "outer", "token")

    token: Token[Call | None]

    def __init__(self, calls: HandlerCalls) -> None:
        self.calls: HandlerCalls = calls
        self.is_innermost: bool = True
        """Whether no further call of the same unit of work was made in this one: then this is the handler's own."""
        self.outer: Call | None = current_call.get()
        if self.outer is not None and self.outer.calls is calls:
            self.outer.is_innermost = False


current_call: ContextVar[Call | None] = ContextVar("ctxdb_call", default=None)
"""The innermost call that the running code is a part of, as far as an adapter can tell."""


_UNSET = object()
"""Stands for the value of a context variable that has none."""


class HandlerCalls:
    """The calls of handlers that are made in one unit of work."""

    __slots__ = ("at_work", "before", "left_open", "variables")

    def __init__(self, before: Context) -> None:
        self.at_work: set[Call] = set()
        """The calls that have not returned, and of whose response nothing has been sent: each may be given up on."""
        self.left_open: Authors | None = None
        """The authors of the work that was open when a middleware answered for a handler; ``None`` before that."""
        self.before: Context = before
        """The context variables at the beginning of the unit of work, outside of all middlewares beneath it."""
        self.variables: tuple[tuple[ContextVar[Any], Any, object], ...] = ()
        """The context variables that were set for the handler which has answered, each with its value there, and with
        the one that it had at the beginning (see `note_variables`).
        """

    def begin(self) -> Call:
        """Begin the call of a handler in the running context; `end` ends it there."""
        call = Call(self)
        self.at_work.add(call)
        call.token = current_call.set(call)
        return call

    def end(self, call: Call) -> None:
        """End `call`: the handler has returned or raised."""
        self.at_work.discard(call)
        current_call.reset(call.token)
        # A token keeps its context: a request that is known there, and knows the call, would be in a cycle.
        del call.token

    def note_response(self, call: Call) -> None:
        """Note that a response begins in `call`: no other one can come in its place any more."""
        self.at_work.discard(call)

    def note_variables(self, call: Call) -> None:
        """Note the context variables of the running code, if it belongs to a handler whose `call` this is.

        A middleware may call the application in a task of its own, as Starlette's ``BaseHTTPMiddleware`` does. What the
        handler and its dependencies set in context variables, such as the user or the tenant, is not seen outside of
        that task, where the transactions end.
        """
        if call.is_innermost:
            before = self.before
            self.variables = tuple(
                (each, value, before.get(each, _UNSET))
                for each, value in copy_context().items()
                # Those of ctxdb say where the running code is, and not what the handler wants to be known.
                if value is not before.get(each, _UNSET) and not each.name.startswith("ctxdb_")
            )

    @contextmanager
    def variables_of_handler(self) -> Iterator[None]:
        """Let the code in the block see the context variables that were noted, as if the handler had run it itself.

        A variable that a middleware outside of the handler's task has set by itself keeps that value.
        """
        tokens = [(each, each.set(value)) for each, value, before in self.variables if each.get(_UNSET) is before]
        try:
            yield
        finally:
            for each, token in reversed(tokens):
                # Where the coroutine is thrown away, this is another context, and the block's own has gone.
                with suppress(ValueError):
                    each.reset(token)

    def forget_variables(self) -> None:
        """Forget the variables that were noted: one of them may know the request, which would be in a cycle."""
        self.variables = ()

    def note_running_response(self) -> None:
        """Note that a response begins in the running call, and so in each call around it."""
        call = self.running()
        while call is not None and call.calls is self:
            self.note_response(call)
            call = call.outer

    def running(self) -> Call | None:
        """Return the innermost call of this unit that the running code is a part of; ``None`` outside of any."""
        call = current_call.get()
        return call if call is not None and call.calls is self else None

    def are_given_up(self) -> bool:
        """Return whether the running code, which is about to end the unit, does so in the place of a handler."""
        return bool(self.at_work) and self.running() not in self.at_work

    def is_running_given_up(self) -> bool:
        """Return whether the running code is part of a handler in whose place a response has come."""
        return self.left_open is not None and self.running() in self.at_work

    def have_left_all_work(self, unit: UnitEnd) -> bool:
        """Return whether all open work of `unit` was done in calls of handlers, and none of it by middlewares.

        If the handlers have returned, it is that of tasks which they have left behind.
        """
        return not has_written(unit.sessions.values(), None)

    def observe(self, session: Session, clause: Any) -> None:
        """Note whose work `session` is going to hold: a `StatementObserver`.

        Raises:
            ContextClosedError: the statement is one of a handler that was given up on.
        """
        call = self.running()
        if self.is_running_given_up():
            # `before_commit` is running for the middleware's work: the abandoned handler must not add to it.
            raise ContextClosedError
        note_author(session, clause, call)

    async def finish(self, unit: UnitEnd, *, commit: bool, error: BaseException | None = None) -> None:
        """End `unit` for a response in the place of a handler that goes on.

        What the handler has written is rolled back: it is not whole, and the handler is not told of the answer. What
        middlewares have written is committed, if the handler has written nothing.

        Args:
            unit: the unit of work of these calls.
            commit: whether the response calls for a commit.
            error: as for `UnitOfWork.finish`.

        Raises:
            AbandonedWorkError: it does, and a middleware's work was rolled back with the handler's.
            BaseException: as `UnitOfWork.finish`.
        """
        authors = self.left_open = find_authors(unit.sessions.values(), self.at_work)
        refused = AbandonedWorkError() if commit and authors.handlers and authors.others else None
        await unit.finish(commit=commit and authors.others and not authors.handlers, error=refused or error)
        if refused is not None:
            raise refused
