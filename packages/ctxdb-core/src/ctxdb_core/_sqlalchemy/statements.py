"""Tells, before a statement is sent, whether it only reads."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import TextClause

__all__ = ["only_reads", "only_sets"]

_READING = re.compile(r"\s*(?:SELECT|SHOW|VALUES|TABLE|PRAGMA\s+\w+\s*(?:;|\(|$)|EXPLAIN(?!\s+ANALY))\b", re.IGNORECASE)
_WITH = re.compile(r"\s*WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b)", re.IGNORECASE | re.DOTALL)
_SETTING = re.compile(r"\s*(?:SET|RESET)\b[^;]*;?\s*$", re.IGNORECASE)


def only_reads(clause: Any) -> bool:
    """Return whether `clause` writes nothing; ``None``, as in a flush, may write anything.

    A ``SELECT`` counts as reading, although it may call a function that writes.
    """
    if isinstance(clause, TextClause):
        return _READING.match(clause.text) is not None or _WITH.match(clause.text) is not None
    return getattr(clause, "is_select", False)


def only_sets(clause: Any) -> bool:
    """Return whether `clause` only sets something for its transaction or connection, such as a role."""
    return isinstance(clause, TextClause) and _SETTING.match(clause.text) is not None
