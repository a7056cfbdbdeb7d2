"""What stops the demo, said in one sentence."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the message says why, and what to do, and holds no password."""
