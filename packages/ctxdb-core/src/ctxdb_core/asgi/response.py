"""`Response`: what is known of the response to a request that has used a session, or asked for anything else."""

from __future__ import annotations

from typing import NamedTuple

from ctxdb_core.asgi.body import Body
from ctxdb_core.asgi.start import ResponseStart
from ctxdb_core.asgi.types import Message

__all__ = ["ANSWERED", "Refusal", "Response"]


class Refusal(NamedTuple):
    """A response that was refused, as its transactions could not be ended."""

    error: Exception | None
    """Why the transactions could not be ended."""
    can_be_answered: bool
    """Whether another response can be sent for the error."""


ANSWERED = Refusal(None, can_be_answered=False)
"""The refusal of a response in whose place another one is sent: the error is not kept, as it refers to the exchange."""


class Response:
    """The response of an `Exchange`.

    A request that uses no database has none of this: a health check, for instance, is let through without a look.
    """

    __slots__ = ("body", "refusal", "start", "unsent")

    def __init__(self) -> None:
        self.start: ResponseStart | None = None
        """The start of the response while that is on its way; ``None`` before and after."""
        self.body: Body | None = None
        """The body of the response, as far as it has to be followed."""
        self.refusal: Refusal | None = None
        """What has kept the response from being sent; `ANSWERED` once another one is sent for that error."""
        self.unsent: Message | None = None
        """The message that starts the response, if its transactions were ended and its task was cancelled meanwhile."""

    def end_start(self, start: ResponseStart) -> None:
        """Let the messages through that wait for `start`, which was sent or refused."""
        start.end()
        if self.start is start:
            self.start = None
