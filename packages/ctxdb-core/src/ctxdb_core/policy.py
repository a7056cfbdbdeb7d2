"""Commit policies: which response statuses commit. A policy is a plain callable, ``policy(status) -> bool``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from ctxdb_core.errors import ArgumentValueError

__all__ = ["CommitPolicy", "commit_2xx", "commit_below_400", "commit_policy"]

CommitPolicy: TypeAlias = Callable[[int], bool]
"""Given the status of the response that is about to be sent: whether to commit. An exception always rolls back."""


def commit_below_400(status: int) -> bool:
    """Commit every response but an error: the default (RFC 9110, section 15: 4xx and 5xx are the error classes)."""
    return status < 400


def commit_2xx(status: int) -> bool:
    """Commit successes only: a redirect rolls back."""
    return 200 <= status < 300


def commit_policy(
    base: CommitPolicy = commit_below_400, *, commit: Collection[int] = (), roll_back: Collection[int] = ()
) -> CommitPolicy:
    """Return `base` with exceptions either way.

    Args:
        base: decides on every status that is named in neither collection.
        commit: statuses that commit, whatever `base` says of them.
        roll_back: statuses that roll back, whatever `base` says of them.

    Raises:
        ValueError: a status is named in both collections.
    """
    committing, rolling_back = frozenset(commit), frozenset(roll_back)
    if both := committing & rolling_back:
        raise ArgumentValueError(
            f"Statuses {sorted(both)} are named in both `commit` and `roll_back`: name each in one."
        )

    def policy(status: int) -> bool:
        if status in committing:
            return True
        return status not in rolling_back and base(status)

    return policy
