"""Commit policies: those of ctxdb, those that name exceptions, and those that are given the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from ctxdb_core import ArgumentTypeError, commit_2xx, commit_below_400, commit_policy
from ctxdb_core.adapters import RequestPolicy, with_request


def test_the_default_commits_below_400() -> None:
    assert [status for status in (200, 204, 302, 399, 400, 404, 500) if commit_below_400(status)] == [
        200,
        204,
        302,
        399,
    ]


def test_commit_2xx_rolls_back_all_but_successes() -> None:
    assert [status for status in (101, 199, 200, 299, 300, 404) if commit_2xx(status)] == [200, 299]


def test_a_policy_can_name_exceptions_from_the_default_both_ways() -> None:
    policy = commit_policy(commit={404}, roll_back={202})
    assert [status for status in (200, 202, 302, 404, 500) if policy(status)] == [200, 302, 404]


def test_a_policy_can_name_exceptions_from_another_policy() -> None:
    policy = commit_policy(commit_2xx, commit=[303])
    assert [status for status in (200, 302, 303) if policy(status)] == [200, 303]


def test_a_status_named_both_ways_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[409\]"):
        commit_policy(commit={409, 404}, roll_back={409})


# --- policies that take the request -----------------------------------------------------------------------------------


def commit_reads(status: int, request: Any) -> bool:
    return status < 400 and request == "a read"


class OfRequest:
    def __call__(self, status: int, request: Any) -> bool:
        return commit_reads(status, request)

    def method(self, status: int, request: Any) -> bool:
        return commit_reads(status, request)


@pytest.mark.parametrize(
    "policy",
    [commit_reads, OfRequest(), OfRequest().method, partial(commit_reads)],
    ids=["function", "object", "method", "partial"],
)
def test_a_policy_of_two_arguments_is_given_the_request(policy: RequestPolicy) -> None:
    decide = with_request(policy)
    assert [decide(status, asked) for status in (200, 404) for asked in ("a read", "a write")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "policy",
    [commit_2xx, lambda status, limit=300: status < limit, lambda *arguments: arguments == (200,), {200}.__contains__],
    ids=["function", "default", "variadic", "built_in"],
)
def test_a_policy_that_can_be_called_with_the_status_alone_is_given_no_request(policy: Callable[[int], bool]) -> None:
    decide = with_request(policy)
    assert [decide(status, "a request") for status in (200, 404)] == [True, False]


async def commit_asynchronously(status: int) -> bool:
    return True


class Asynchronous:
    async def __call__(self, status: int) -> bool:
        return True


@pytest.mark.parametrize(
    "wrong",
    [
        Asynchronous(),
        lambda: True,
        lambda *, status: True,
        lambda status, request, more: True,
        200,
        None,
        commit_asynchronously,
    ],
)
def test_value_that_is_no_policy_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="commit policy"):
        with_request(wrong)


@pytest.mark.parametrize(
    "policy",
    [lambda status: asyncio.sleep(0, status < 400), lambda status, request: asyncio.sleep(0, status < 400)],
    ids=["of_the_status", "of_the_request"],
)
def test_a_policy_whose_decision_would_have_to_be_awaited_commits_nothing(policy: Any) -> None:
    decide = with_request(policy)
    with pytest.raises(ArgumentTypeError, match="commit policy"):
        decide(200, "a request")


@pytest.mark.parametrize("statuses", [409, ["409"], "409", None, [[409]]])
def test_exceptions_that_are_no_statuses_are_refused_at_once(statuses: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"roll_back=\[409\]"):
        commit_policy(roll_back=statuses)


def test_exceptions_may_be_named_by_an_iterator() -> None:
    policy = commit_policy(roll_back=cast("Any", iter([202])))
    assert [policy(status) for status in (200, 202)] == [True, False]


def test_a_policy_can_name_exceptions_from_a_policy_of_the_request() -> None:
    policy = commit_policy(commit_reads, commit=[404], roll_back=[202])
    assert [policy(status, "a read") for status in (200, 202, 404)] == [True, False, True]
    assert [policy(status, "a write") for status in (200, 202, 404)] == [False, False, True]
