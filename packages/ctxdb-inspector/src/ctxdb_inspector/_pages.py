"""`Pages`: what is answered to which path, the same for ASGI and aiohttp."""

from __future__ import annotations

from urllib.parse import parse_qs

from ctxdb_inspector._content import Content, as_json, page
from ctxdb_inspector._recorder import Recorder

__all__ = ["EVENTS", "MOST_READERS", "answer", "refusal", "since_of"]

EVENTS = "events"
"""The path of the stream of updates."""

MOST_READERS = 20
"""How many pages are kept up to date at once: each costs some milliseconds a second."""

_TEXT = "text/plain; charset=utf-8"

_TOO_MANY = Content(503, _TEXT, b"Too many pages are open.\n", (("retry-after", "5"),))


def refusal() -> Content:
    """Return the answer to a client that may not look."""
    return Content(
        403,
        _TEXT,
        b"The inspector answers clients on this machine only, and none that come through a proxy. To look from "
        b"elsewhere, let the application say who may: inspector(db, authorise=...).\n",
    )


def answer(recorder: Recorder, method: str, path: str, query: str) -> Content | None:
    """Return the answer to a request; ``None`` where that is the stream of updates.

    Args:
        recorder: what to show.
        method: of the request.
        path: beneath where the inspector is mounted.
        query: of the request's URL.
    """
    if method not in ("GET", "HEAD"):
        return Content(405, _TEXT, b"GET it.\n", (("allow", "GET, HEAD"),))
    # Litestar ends the path of a mount with a slash.
    name = path.strip("/")
    if name == EVENTS:
        if method == "HEAD":
            return Content(200, "text/event-stream", b"")
        return None if recorder.readers < MOST_READERS else _TOO_MANY
    if name == "units.json":
        wanted = parse_qs(query).get("unit")
        if wanted is None:
            return Content(200, "application/json", as_json(recorder.snapshot()))
        unit = recorder.unit(wanted[0])
        if unit is None:
            return Content(404, "application/json", as_json({"error": "no such unit, or one of another worker"}))
        return Content(200, "application/json", as_json(unit))
    if name == "":
        return Content(200, "text/html; charset=utf-8", page())
    return Content(404, _TEXT, b"The page is at /, its data at /units.json.\n")


def since_of(last_event_id: str | None) -> int:
    """Return where a stream goes on: after what the browser has seen last, which it tells by a header field."""
    return int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() else 0
