"""Commit policies: which responses commit. A policy is a plain callable, ``policy(status) -> bool``.

A policy that has to know more than the status takes the request, too: ``policy(status, request) -> bool``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeAlias, cast, overload

from ctxdb_core._signatures import signature_of
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["CommitPolicy", "RequestPolicy", "commit_2xx", "commit_below_400", "commit_policy", "with_request"]

CommitPolicy: TypeAlias = Callable[[int], bool]
"""Given the status of the response that is about to be sent, returns whether to commit. Exceptions always roll back."""

RequestPolicy: TypeAlias = Callable[[int, Any], bool]
"""A commit policy that is given the request as well: what the framework has for it, an ``aiohttp.web.Request``, say."""


def commit_below_400(status: int) -> bool:
    """Commit every response but an error: the default (RFC 9110, section 15: 4xx and 5xx are the error classes)."""
    return status < 400


def commit_2xx(status: int) -> bool:
    """Commit successes only: a redirect rolls back."""
    return 200 <= status < 300


@overload
def commit_policy(
    base: CommitPolicy = ..., *, commit: Collection[int] = ..., roll_back: Collection[int] = ...
) -> CommitPolicy: ...


@overload
def commit_policy(
    base: RequestPolicy, *, commit: Collection[int] = ..., roll_back: Collection[int] = ...
) -> RequestPolicy: ...


def commit_policy(
    base: CommitPolicy | RequestPolicy = commit_below_400,
    *,
    commit: Collection[int] = (),
    roll_back: Collection[int] = (),
) -> CommitPolicy | RequestPolicy:
    """Return `base` with exceptions either way.

    Args:
        base: decides on every status that is named in neither collection.
        commit: statuses that commit, also if `base` would roll back.
        roll_back: statuses that roll back, also if `base` would commit.

    Returns:
        A policy that takes the request as well, if `base` does.

    Raises:
        TypeError: `base` takes neither a status nor a status and a request; a status is no integer.
        ValueError: a status is named in both collections.
    """
    committing, rolling_back = _statuses("commit", commit), _statuses("roll_back", roll_back)
    if both := committing & rolling_back:
        raise ArgumentValueError(
            f"Statuses {sorted(both)} are named in both `commit` and `roll_back`: name each in one."
        )

    takes_request, decide = _takes_request(base), with_request(base)

    def policy_by_request(status: int, request: Any) -> bool:
        if status in committing:
            return True
        return status not in rolling_back and decide(status, request)

    def policy(status: int) -> bool:
        return policy_by_request(status, None)

    return policy_by_request if takes_request else policy


def with_request(policy: CommitPolicy | RequestPolicy) -> RequestPolicy:
    """Return `policy` as a function of the status and the request, whichever of the two kinds it is.

    An adapter calls it once, when it is set up. `policy` is asked for its signature only then: if it can be called with
    a status alone, it is; so a second argument that has a default is none for the request. The function raises an
    `ArgumentTypeError` if `policy` has returned a coroutine, which would be true whatever it stands for.

    Raises:
        TypeError: it can be called neither with a status nor with a status and a request, or it is asynchronous.
    """
    if _takes_request(policy):
        of_request = cast("Callable[[int, Any], object]", policy)

        def decide_by_request(status: int, request: Any) -> bool:
            decision = of_request(status, request)
            return decision if decision is True or decision is False else _checked(decision, policy)

        return decide_by_request
    of_status = cast("Callable[[int], object]", policy)

    def decide_by_status(status: int, request: Any) -> bool:
        decision = of_status(status)
        return decision if decision is True or decision is False else _checked(decision, policy)

    return decide_by_status


def _takes_request(policy: CommitPolicy | RequestPolicy) -> bool:
    """Return whether `policy` has to be given the request.

    Raises:
        TypeError: it is no policy.
    """
    if inspect.iscoroutinefunction(policy) or inspect.iscoroutinefunction(getattr(policy, "__call__", None)):  # noqa: B004 - it is asked what it is, not whether it is there
        raise _refused(policy)
    try:
        signature = signature_of(policy)
    except TypeError:
        # The policy cannot be called at all.
        raise _refused(policy) from None
    except ValueError:
        # Some functions that are written in C have no signature.
        return False
    if _takes(signature, 200):
        return False
    if _takes(signature, 200, None):
        return True
    raise _refused(policy)


def _takes(signature: inspect.Signature, *arguments: object) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _checked(decision: object, policy: object) -> bool:
    if inspect.isawaitable(decision):
        if inspect.iscoroutine(decision):
            decision.close()
        raise _refused(policy)
    return bool(decision)


def _statuses(name: str, statuses: Collection[int]) -> frozenset[int]:
    try:
        found = frozenset(statuses)
    except TypeError:
        found = None
    if found is None or not all(isinstance(status, int) for status in found):
        raise ArgumentTypeError(f"{name}={statuses!r}: give a collection of statuses, `{name}=[409]` for instance.")
    return found


def _refused(policy: object) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"{_name_of(policy)} is no commit policy: pass a plain function of the response's status, `policy(status) -> "
        "bool`, or of the status and the request, `policy(status, request) -> bool`. It is not awaited."
    )


def _name_of(policy: object) -> str:
    # What is no function at all may show a password in its repr: a URL.
    return repr(policy) if callable(policy) else type_of(policy)
