"""`Response`: what is known of the response to a request that has used a session, or asked for anything else.

`ResponseStart` keeps the messages of other tasks back while the start waits for its transactions to end;
`check_headers` sees to it before that that a server sends the start.
"""

from __future__ import annotations

import asyncio
import re
from contextvars import ContextVar
from itertools import chain
from typing import NamedTuple

from ctxdb_core.asgi.body import Body
from ctxdb_core.asgi.types import Message
from ctxdb_core.errors import ArgumentValueError

__all__ = ["ANSWERED", "Refusal", "Response", "ResponseStart", "check_headers"]

_current: ContextVar[ResponseStart | None] = ContextVar("ctxdb_response_start", default=None)
"""The start that the running code is part of. Callbacks of the commit inherit it: the start waits for them."""


class ResponseStart:
    """The start of a response, from the end of its transactions to its way to the server.

    Another task may send something in the meantime. Litestar's ``websocket_stream`` accepts in one task and sends in
    another; sse-starlette pings its client in a task of its own. A client must not get that before the start.
    """

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


def check_headers(start: Message) -> None:
    """Have the headers of a response be such that a server sends them: behind a commit, that would be too late.

    Whitespace around a value, which is no part of it (RFC 9110, "Field Values"), is dropped: h11 refuses it. What are
    no headers as ASGI has them is left to the server, which may take them all the same.

    Raises:
        ArgumentValueError: a value has a control character, or a name is no token (RFC 9110, "Tokens").
    """
    headers = start.get("headers", ())
    if not isinstance(headers, (list, tuple)):
        # The headers may be there to be read once.
        return
    try:
        lines = b"\n".join(chain.from_iterable(headers))
        if _are_plain(lines) and lines.count(b"\n") < 2 * len(headers):
            # The common case, at one look.
            return
        wrong_values = [repr(name) for name, value in headers if _find_control_character(value)]
        wrong_names = [repr(name) for name, _ in headers if not _is_token(name)]
        stripped = [(name, value.strip()) for name, value in headers]
    except (TypeError, ValueError, AttributeError):
        # They are not as ASGI has them, which some servers let pass.
        return
    if wrong_values:
        raise ArgumentValueError(
            f"The value of the response header {', '.join(wrong_values)} has a control character, such as a line "
            "break, which HTTP does not allow. What the request has written is rolled back. Encode the value."
        )
    if wrong_names:
        raise ArgumentValueError(
            f"The name of the response header {', '.join(wrong_names)} is empty, or has a character that HTTP "
            "does not allow in it. What the request has written is rolled back. Encode the name."
        )
    start["headers"] = stripped


_find_control_character = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
_is_token = re.compile(rb"[\w!#$%&'*+\-.^`|~]+").fullmatch
# Names and values in turn, one a line: without separators, control characters, and whitespace around. A value with a
# line break makes more lines.
_are_plain = re.compile(
    rb"(?: [\w!\#$%&'*+\-.^`|~]++ \n (?![\x20\t]) [^\x00-\x08\x0a-\x1f\x7f]*+ (?<![\x20\t]) (?: \n | \Z ) )*+",
    re.VERBOSE,
).fullmatch
