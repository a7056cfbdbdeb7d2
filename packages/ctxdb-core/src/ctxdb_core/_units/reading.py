"""Requests that only read: their methods, and the databases that they read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core.errors import ArgumentTypeError

__all__ = ["SAFE_METHODS", "ReadsFrom", "check_reads_from"]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""The methods of requests that ask for no change (RFC 9110, section 9.2.1)."""

ReadsFrom: TypeAlias = Mapping[DBConnect, DBConnect]
"""Maps a database that is written to, to the database that reads in its place."""


def check_reads_from(reads_from: object) -> ReadsFrom | None:
    """Return a copy of the option of an adapter, a `ReadsFrom`; ``None`` where it has nothing to say.

    Raises:
        ArgumentTypeError: it is no mapping of `DBConnect`s (a ``TypeError``, too).
    """
    if reads_from is None:
        return None
    pairs = list(reads_from.items()) if isinstance(reads_from, Mapping) else [(reads_from, None)]
    if not all(isinstance(db, DBConnect) for pair in pairs for db in pair):
        kinds = "; ".join(sorted({type(db).__name__ for pair in pairs for db in pair} - {DBConnect.__name__}))
        raise ArgumentTypeError(
            f"reads_from= takes a mapping of DBConnects, the database to the one that is read from in its place, and "
            f"there is something else: {kinds}. `reads_from={{master: replica}}`."
        )
    return dict(pairs) or None
