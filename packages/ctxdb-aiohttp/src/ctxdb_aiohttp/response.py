"""What becomes of a response: whether it is whole, the status that it will have, and how it is taken back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType
from typing import Any, NoReturn

from aiohttp import web

from ctxdb_core import ArgumentValueError

__all__ = ["check_response", "is_complete", "status_of", "take_back"]

_WHOLE_BODIES = (bytes, bytearray, NoneType)


def check_response(response: object) -> None:
    """Raise an error if aiohttp would refuse to send the head of `response`: behind a commit, that would be too late.

    Raises:
        ArgumentValueError: the reason, a header or a cookie has a control character (RFC 9110, "Field Values").
    """
    if isinstance(response, web.StreamResponse):
        _check_values({"status line": response.reason})
        _check_values(response.headers)
        # There is a public name, which makes a jar for cookies where there are none.
        if cookies := response._cookies:  # noqa: SLF001 - see above
            _check_values({name: cookie.output(header="") for name, cookie in cookies.items()})


def _check_values(parts: Mapping[str, str]) -> None:
    for name, value in parts.items():
        # Most are printable, which takes no regular expression to find out.
        if not (value.isprintable() and name.isprintable()):
            _refuse_control_characters(parts)


def _refuse_control_characters(parts: Mapping[str, str]) -> None:
    for name, value in parts.items():
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", name + value):
            raise ArgumentValueError(
                f"The {name} of a response has a control character, such as a line break: aiohttp does not send it. "
                "What the request has written is rolled back. Encode the value."
            )


def is_complete(response: object) -> bool:
    """Return whether `response` has all of its body: no code of the application runs while it is sent."""
    kind: Any = type(response)
    if kind is web.Response:
        return type(response.body) in _WHOLE_BODIES  # type: ignore[attr-defined]  # `kind` says so
    return (
        getattr(kind, "write_eof", None) is web.Response.write_eof
        and kind.prepare is web.Response.prepare
        and isinstance(getattr(response, "body", None), _WHOLE_BODIES)
    )


async def status_of(response: web.StreamResponse | web.HTTPException, request: web.Request) -> int:
    """Return the status that `response` will be sent with.

    A `FileResponse` finds out while it is prepared: it may become a 206, a 304 or, where there is no file, a 404.
    """
    if not isinstance(response, web.FileResponse) or response.prepared:
        return response.status
    trial = _Trial(response)
    with suppress(_Prepared):
        await trial.prepare(request)
    return trial.status


class _Prepared(Exception):  # noqa: N818 - not an error
    """Ends a trial: the status is known."""


class _Trial(web.FileResponse):
    """A file's response that is prepared up to the point where it would start."""

    def __init__(self, response: web.FileResponse) -> None:
        # There is no public name for the path.
        super().__init__(response._path, status=response.status, headers=response.headers)  # noqa: SLF001

    async def _start(self, request: web.BaseRequest) -> NoReturn:
        raise _Prepared


def take_back(response: web.StreamResponse) -> None:
    """Make it as if `response`, which was refused while it was prepared, had not been: it cannot be written to.

    aiohttp takes a response for started before it asks the signal handlers. There are no public names for this.
    """
    response._payload_writer = None  # noqa: SLF001
    response._req = None  # noqa: SLF001
