"""Log sequence numbers (LSNs), which are WAL positions, as PostgreSQL writes them: ``0/3000060``.

The two hexadecimal numbers are the upper and the lower 32 bits of a position in bytes (PostgreSQL, "pg_lsn Type").
"""

from __future__ import annotations

import re

__all__ = ["format_lsn", "parse_lsn"]

_POSITION = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", re.ASCII)


def format_lsn(position: int) -> str:
    """Return the LSN of a position in bytes."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Return the position in bytes that the LSN `text` stands for.

    Raises:
        ValueError: `text` is no LSN.
    """
    match = _POSITION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no WAL position: give one that looks like 0/3000060.")
    return (int(match[1], 16) << 32) + int(match[2], 16)
