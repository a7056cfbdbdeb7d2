"""What is served beside the live data: the page, its policy, and the form of the updates."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

__all__ = ["Content", "as_event", "as_json", "page", "security_headers"]

UPDATE_SECONDS = 1.0
"""How long the page waits for what is new."""

STREAM_SECONDS = 10.0
"""How long one stream of updates lasts; the browser asks for the next one then.

A server that shuts down waits for its responses to end.
"""


class Content(NamedTuple):
    """A response."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@cache
def _part(name: str) -> str:
    return files("ctxdb_inspector").joinpath("page", name).read_text(encoding="utf-8")


@cache
def page() -> bytes:
    """Return the page: one document, with its style and script inside."""
    html = _part("page.html")
    return html.replace("{style}", _part("page.css")).replace("{script}", _part("page.js")).encode()


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def security_headers() -> tuple[tuple[str, str], ...]:
    """Return what every response is sent with: nothing but the page's own style and script counts."""
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_hash(_part('page.css'))}; "
        f"script-src {_hash(_part('page.js'))}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return (
        ("content-security-policy", policy),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("cache-control", "no-store"),
    )


def as_json(value: Any) -> bytes:
    """Return `value` as JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def as_event(snapshot: dict[str, Any]) -> bytes:
    """Return an update as a server-sent event, whose id is where the next stream goes on."""
    return b"id: %d\nretry: 300\ndata: %s\n\n" % (snapshot["sequence"], as_json(snapshot))
