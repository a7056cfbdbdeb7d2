"""`RequestUnit`: the unit of work of a request, which an adapter opens and ends."""

from __future__ import annotations

from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from ctxdb_core._sqlalchemy.door import StatementObserver
from ctxdb_core._sqlalchemy.doors import observe_statements
from ctxdb_core._units.abandonment import HandlerCalls
from ctxdb_core._units.authorship import note_unseen_author
from ctxdb_core._units.ids import id_of_request
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core._units.watcher import request_line

__all__ = ["RequestUnit", "follow_calls"]


class RequestUnit(UnitOfWork):
    """The unit of work of a request: what `begin` returns.

    It has no ``__init__`` in Python: `begin` and the ASGI middleware set all of its attributes, those of `UnitSessions`
    among them. The call would be a quarter of what a request without database use pays.
    """

    if TYPE_CHECKING:

        def __init__(self) -> None:
            """Type checkers are not told of an ``__init__`` by an assignment."""

    else:
        __init__ = object.__init__

    origin: Any
    """The request: an ASGI scope, or the framework's object; ``None`` if the adapter has not told it."""
    calls: HandlerCalls | None
    """The calls of handlers, where a middleware may give up on one of them (see `follow_calls`)."""

    @property
    def context(self) -> Context | None:
        """The context variables at the beginning, where a middleware may call the handler in a task of its own."""
        return None

    def _new_id(self) -> str:
        return id_of_request(self.origin) or super()._new_id()

    @property
    def request(self) -> str | None:
        """Method and path of the request, without its query; ``None`` if the adapter has not told it."""
        return super().request if self.origin is None else request_line(self.origin)

    def statement_observer(self) -> StatementObserver | None:
        """Return what is called before each statement of a session that is opened now."""
        return None if self.calls is None else self.calls.observe

    def is_given_up(self) -> bool:
        """Return whether the running code is part of a handler in whose place a middleware has answered."""
        return self.calls is not None and self.calls.is_running_given_up()


def follow_calls(unit: RequestUnit) -> HandlerCalls:
    """Have it noted, from now on, who writes what in `unit`, and return its calls: the same at each call of this.

    An adapter asks for it where a middleware may give up on a handler; best before anything is done in the unit, as
    what a transaction holds already counts as written by the middlewares.
    """
    calls = unit.calls
    if calls is None:
        calls = unit.calls = HandlerCalls(copy_context() if unit.context is None else unit.context)
        for session in unit.sessions.values():
            note_unseen_author(session.sync_session)
        observe_statements(unit.sessions.values(), unit.statement_observer() or calls.observe)
    return calls
