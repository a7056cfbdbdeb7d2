"""The phases of a request, and which phase may follow which.

Adapters move a request from phase to phase as their framework tells them of its events; what becomes of the
transactions then is said by the table here alone::

                 +-------- answer, once ---------+
                 v                               |
      o--->  HANDLING ------ commit fails -> REFUSED <- commit fails, or
          start|    |  start, handler working -> ABANDONED -> AbandonedWorkError
               |    +- boundary sees a stream -> AHEAD -- error instead -> OVERRULED
               |                        start |     (also -> ABANDONED, REFUSED; HANDLING, if called again)
               v                              v
              BODY <--------------------------+       websocket: a close that fails -> REFUSED
          last|    +- start cancelled, another one comes -> HANDLING
              |    +- last chunk, commit fails -> BROKEN <- AFTER, OVERRULED
              v
            AFTER

When the application returns, work that is still open is committed in the phases of `FINISHING`, unless a body was cut
off; in `HANDLING` and `AHEAD` it is rolled back, as no client was promised anything. An exception rolls back in every
phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from ctxdb_core.errors import CtxDBError

__all__ = ["FINISHING", "TRANSITIONS", "IllegalTransitionError", "Phase", "check_transition"]


class Phase(Enum):
    """Where a request is on its way from its first event to the return of its connection."""

    HANDLING = "handling"
    """The application is at work, and nothing of a response has come from it."""
    AHEAD = "ahead"
    """A boundary has seen a streamed response begin and has ended its transactions; the start is still on its way
    through middlewares, while the body runs already."""
    BODY = "body"
    """The start of the response was let through, its transactions have ended, and its body is being sent."""
    AFTER = "after"
    """The last of the body was let through: what runs now is background work."""
    REFUSED = "refused"
    """The transactions of the response could not be ended: nothing of it is let through."""
    ABANDONED = "abandoned"
    """A middleware has answered in the place of a handler that goes on."""
    OVERRULED = "overruled"
    """A middleware has sent an error of its own in the place of a streamed success, whose transactions had ended."""
    BROKEN = "broken"
    """A commit failed when a part of the response had left: the response breaks off, so that no client takes it for
    complete."""

    # Each member is made once. `Enum` hashes its name by a Python function, which each look-up in the table would call.
    # Type checkers would take the assignment for a method of another signature.
    if not TYPE_CHECKING:
        __hash__ = object.__hash__


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.HANDLING: frozenset({Phase.AHEAD, Phase.BODY, Phase.REFUSED, Phase.ABANDONED}),
    # A middleware may drop the response, and call the handler once more.
    Phase.AHEAD: frozenset({Phase.HANDLING, Phase.BODY, Phase.REFUSED, Phase.ABANDONED, Phase.OVERRULED}),
    # If the task that was to send the start is cancelled, a middleware may answer in its place. A websocket is in its
    # body from the handshake to its close frame, which may have to be refused.
    Phase.BODY: frozenset({Phase.HANDLING, Phase.AFTER, Phase.BROKEN, Phase.REFUSED}),
    Phase.AFTER: frozenset({Phase.BROKEN}),
    # The response for the error is begun anew.
    Phase.REFUSED: frozenset({Phase.HANDLING}),
    # By `AbandonedWorkError`, where the handler's work and that of others cannot be told apart.
    Phase.ABANDONED: frozenset({Phase.REFUSED}),
    Phase.OVERRULED: frozenset({Phase.BROKEN}),
    Phase.BROKEN: frozenset(),
}
"""The phases that may follow each one. A phase may not follow itself: that an event comes twice is no transition."""

FINISHING = frozenset({Phase.BODY, Phase.AFTER, Phase.OVERRULED, Phase.BROKEN, Phase.ABANDONED})
"""The phases in which the return of the application commits what is open."""


class IllegalTransitionError(CtxDBError, RuntimeError):
    """An adapter has moved a request to a phase that cannot follow the one that it is in: a defect of the adapter."""

    def __init__(self, current: Phase, following: Phase) -> None:
        super().__init__(
            f"A request that is {current.value} cannot become {following.value}. This is a defect of the adapter that "
            "serves it, or of ctxdb: please report it with this traceback."
        )


def check_transition(current: Phase, following: Phase) -> None:
    """Raise an error if `following` may not follow `current`.

    Raises:
        IllegalTransitionError: the table has no such transition.
    """
    if following not in TRANSITIONS[current]:
        raise IllegalTransitionError(current, following)
