"""Log sequence numbers, the WAL positions, as PostgreSQL writes them: ``0/3000060``."""

from __future__ import annotations

import re

__all__ = ["format_lsn", "parse_lsn"]

_POSITION = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", re.ASCII)


def format_lsn(position: int) -> str:
    """Return a position in bytes as PostgreSQL writes it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Return the position in bytes.

    Raises:
        ValueError: `text` is no position.
    """
    match = _POSITION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no WAL position: it has to look like 0/3000060.")
    return (int(match[1], 16) << 32) + int(match[2], 16)
