"""`UnitWatcher`: what an extension is told of a unit of work that it watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

__all__ = ["Headers", "UnitWatcher", "report_failure", "request_line"]

logger = logging.getLogger("ctxdb")

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
"""Names, in lower case, and values of header fields, as ASGI has them."""


class UnitWatcher(Protocol):
    """Is told of what becomes of one unit of work, once `UnitOfWork.watch` was called with it.

    Its methods are plain functions, called in the task that ends the unit, and must not wait for anything. Their
    errors are logged, and change nothing.
    """

    def response_starts(self, status: int) -> Headers:
        """Be told of the response's status; return header fields to be added. Only ASGI adapters call this."""

    def unit_ends(self, error: BaseException | None) -> object:
        """Be told that the unit has ended, and of the error that ended it, if there was one."""


def report_failure(watcher: UnitWatcher) -> None:
    """Log the error that a watcher has raised; it changes nothing.

    That may be a ``CancelledError``, too: a plain call is not cancelled, so it comes from what the watcher has asked.
    """
    logger.error("The watcher of a unit of work failed: %r", watcher, exc_info=sys.exception())


def request_line(origin: Any) -> str | None:
    """Return method and path of a request, which is an ASGI scope, or has `method` and `path` as aiohttp's has.

    The query is left out: it may hold secrets.
    """
    if type(origin) is dict and "method" in origin:
        # An ASGI scope, as most are.
        return f"{origin['method']} {origin['path']}"
    if origin is None:
        return None
    path = getattr(origin, "path", None)
    if path is not None:
        return f"{origin.method} {path}"
    if isinstance(origin, Mapping) and "path" in origin:
        return f"{origin.get('method') or origin.get('type', '').upper()} {origin['path']}"
    return None
