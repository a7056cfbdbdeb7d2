from __future__ import annotations

import pytest

from ctxdb_pgstatus.election import Claim, Election, elect


def test_without_claims_there_is_no_master() -> None:
    assert elect([]) == Election(None)
    assert elect([], current="n1", highest_timeline=3) == Election(None)


def test_the_only_claim_wins() -> None:
    assert elect([Claim("n2", 1)]) == Election("n2")


@pytest.mark.parametrize("current", [None, "n1", "n2", "gone"])
def test_the_higher_timeline_wins_whoever_was_the_master_and_wherever_it_is_listed(current: str | None) -> None:
    claims = [Claim("n1", 4), Claim("n2", 5), Claim("n3", 3)]
    assert elect(claims, current=current) == Election("n2", stale=("n1", "n3"))
    assert elect(claims[::-1], current=current) == Election("n2", stale=("n3", "n1"))


def test_among_equals_the_master_stays() -> None:
    claims = [Claim("n1", 4), Claim("n2", 4)]
    assert elect(claims, current="n2") == Election("n2", rivals=("n1",))
    assert elect(claims, current="n1") == Election("n1", rivals=("n2",))


@pytest.mark.parametrize("current", [None, "gone"])
def test_among_equals_of_which_none_was_the_master_the_first_wins(current: str | None) -> None:
    assert elect([Claim("n3", 4), Claim("n1", 4)], current=current) == Election("n3", rivals=("n1",))


def test_a_claim_below_a_timeline_seen_before_is_stale_also_if_it_is_the_only_one() -> None:
    assert elect([Claim("n1", 1)], current="n1", highest_timeline=2) == Election(None, stale=("n1",))
    assert elect([Claim("n1", 2)], highest_timeline=2) == Election("n1")
