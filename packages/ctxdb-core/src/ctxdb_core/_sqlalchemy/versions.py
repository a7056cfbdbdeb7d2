"""Warns of a SQLAlchemy below the declared bound, which an installer can be told to ignore, and names what is lost."""

from __future__ import annotations

import re
import warnings

import sqlalchemy

__all__ = ["warn_of_lost_promises"]

_FIRST_RELEASES = ((2, 0, 55), (2, 1, 5))
"""The first release of each minor version that sees the end of a session through when its task is cancelled."""


def warn_of_lost_promises(version: str = sqlalchemy.__version__) -> None:
    """Warn of the promise that ctxdb cannot keep with this version of SQLAlchemy, if there is one."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    # The first good release of the same minor version; for an older minor version, of the oldest one in the table.
    first = next((release for release in _FIRST_RELEASES if release[:2] >= numbers[:2]), None)
    if first is not None and numbers < first:
        warnings.warn(
            f"ctxdb needs SQLAlchemy {'.'.join(map(str, first))}, and this is {version}. With it, a request or task "
            "that is cancelled while its transaction begins or ends may lose its connection, until the pool is empty. "
            "See ctxdb's docs/migration/older-sqlalchemy.md.",
            RuntimeWarning,
            stacklevel=3,
        )
