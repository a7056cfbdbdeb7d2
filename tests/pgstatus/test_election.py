from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest

from ctxdb_pgstatus._probing.answer import Server
from ctxdb_pgstatus.election import Claim, Election, elect

STARTED = datetime(2024, 1, 1, tzinfo=UTC)


def test_without_claims_there_is_no_master() -> None:
    assert elect([]) == Election(None)
    assert elect([], highest_timeline=3) == Election(None)


def test_the_only_claim_wins() -> None:
    assert elect([Claim("n2", 1)]) == Election("n2", preferred="n2")


def test_the_higher_timeline_wins_wherever_it_is_listed() -> None:
    for claims in permutations([Claim("n1", 4, position=9), Claim("n2", 5), Claim("n3", 3, standbys=2)]):
        election = elect(claims)
        assert election.master == "n2"
        assert set(election.stale) == {"n1", "n3"}


def test_no_claim_wins_while_two_take_writes_on_one_timeline() -> None:
    assert elect([Claim("n1", 4), Claim("n2", 4)]) == Election(None, rivals=("n2",), preferred="n1")


def test_of_equal_timelines_the_claim_that_takes_writes_wins() -> None:
    claims = [Claim("n1", 4, position=9, standbys=2, takes_writes=False), Claim("n2", 4)]
    assert elect(claims) == Election("n2", rivals=("n1",), preferred="n2")


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Claim("n3", 4, position=9), Claim("n1", 4, position=8, standbys=2)),
        (Claim("n3", 4, position=9, standbys=1), Claim("n1", 4, position=9)),
    ],
)
def test_rivals_are_preferred_by_their_wal_and_then_by_their_standbys(better: Claim, worse: Claim) -> None:
    assert elect([worse, better]).preferred == elect([better, worse]).preferred == "n3"


def test_of_equal_rivals_the_first_of_the_list_is_preferred() -> None:
    assert elect([Claim("n3", 4), Claim("n1", 4)]).preferred == "n3"


def test_two_names_of_one_server_are_one_claim() -> None:
    server = Server(STARTED, 7, "10.0.0.1", 5432)
    by_another_way = Server(STARTED, 7, "::1", 5432)
    claims = [Claim("n1", 4, server=server), Claim("vip", 4, server=by_another_way)]
    assert elect(claims) == Election("n1", preferred="n1")
    restarted = Server(STARTED + timedelta(seconds=1), 7, "10.0.0.2", 5432)
    assert elect([Claim("n1", 4, server=server), Claim("n2", 4, server=restarted)]).master is None


def test_a_claim_below_a_timeline_seen_before_is_stale_also_if_it_is_the_only_one() -> None:
    assert elect([Claim("n1", 1)], highest_timeline=2) == Election(None, stale=("n1",))
    assert elect([Claim("n1", 2)], highest_timeline=2) == Election("n1", preferred="n1")
