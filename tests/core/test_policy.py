from __future__ import annotations

import pytest

from ctxdb_core import commit_2xx, commit_below_400, commit_policy


def test_the_default_commits_below_400() -> None:
    assert [status for status in (200, 204, 302, 399, 400, 404, 500) if commit_below_400(status)] == [
        200,
        204,
        302,
        399,
    ]


def test_only_2xx() -> None:
    assert [status for status in (101, 199, 200, 299, 300, 404) if commit_2xx(status)] == [200, 299]


def test_exceptions_either_way() -> None:
    policy = commit_policy(commit={404}, roll_back={202})
    assert [status for status in (200, 202, 302, 404, 500) if policy(status)] == [200, 302, 404]


def test_exceptions_to_another_policy() -> None:
    policy = commit_policy(commit_2xx, commit=[303])
    assert [status for status in (200, 302, 303) if policy(status)] == [200, 303]


def test_a_status_named_both_ways_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[409\]"):
        commit_policy(commit={409, 404}, roll_back={409})
