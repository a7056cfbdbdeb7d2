"""What two answers tell of a replica's lag."""

from __future__ import annotations

from dataclasses import replace

from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.lag import Lag, Sample


def _replica(position: int | None, age: float | None = None, *, at: float = 100.0, timeline: int | None = 1) -> Answer:
    return Answer(in_recovery=True, timeline=timeline, position=position, replay_age_ms=age, asked_at=at)


def test_one_that_has_replayed_all_is_not_behind_however_long_ago_the_last_commit_was() -> None:
    assert Lag().measure(_replica(500, 3_600_000), Sample(1, 500, 100)) == (0, 0)
    assert Lag().measure(_replica(510, 3_600_000), Sample(1, 500, 100)) == (0, 0)
    assert Lag().measure(_replica(500, None), Sample(1, 500, 100)) == (0, 0)


def test_one_that_is_behind_lags_as_long_as_its_last_commit_is_old() -> None:
    assert Lag().measure(_replica(400, 1234.5), Sample(1, 500, 100)) == (1235, 100)


def test_one_that_is_behind_lags_also_where_the_clocks_of_the_servers_deny_it() -> None:
    assert Lag().measure(_replica(400, -50), Sample(1, 500, 100)) == (1, 100)


def test_one_that_has_replayed_no_commit_and_is_behind_is_not_known_to_be_near() -> None:
    assert Lag().measure(_replica(400, None), Sample(1, 500, 100)) == (None, 100)


def test_one_that_has_replayed_nothing_has_no_lag_that_could_be_told() -> None:
    assert Lag().measure(_replica(None, None), Sample(1, 500, 100)) == (None, None)


def test_one_that_had_all_when_the_master_was_asked_lags_no_longer_than_since_then() -> None:
    lag = Lag()
    lag.measure(_replica(500, 60_000, at=100), Sample(1, 500, 100))
    assert lag.measure(_replica(500, 65_000, at=105), Sample(1, 600, 105)) == (5000, 100)
    # The commit that it replayed since tells more.
    assert lag.measure(_replica(550, 20, at=105), Sample(1, 600, 105)) == (20, 50)


def test_one_on_another_timeline_cannot_be_compared() -> None:
    lag = Lag()
    lag.measure(_replica(500), Sample(1, 500, 100))
    assert lag.measure(_replica(900, 10), Sample(2, 600, 105)) == (None, None)
    assert lag.measure(_replica(900, 10, timeline=None), Sample(2, 600, 105)) == (None, None)
    # What it had of another timeline is no measure on the next one either.
    assert lag.measure(_replica(590, None, at=106, timeline=2), Sample(2, 600, 105)) == (None, 10)


def test_one_that_went_back_has_not_what_it_had() -> None:
    lag = Lag()
    lag.measure(_replica(500), Sample(1, 500, 100))
    assert lag.measure(_replica(300, None, at=101), Sample(1, 500, 101)) == (None, 200)


def test_without_a_master_ever_seen_the_last_commit_tells_what_it_can() -> None:
    assert Lag().measure(_replica(500, 10.2), None) == (11, None)
    assert Lag().measure(_replica(500, None), None) == (None, None)


def test_the_age_of_a_commit_is_told_by_the_clock_that_it_was_made_by() -> None:
    sample = Sample(1, 500, 100, clock=1_000_000.0)
    # Its own clock is an hour fast, or slow: the commit was made 1.5 seconds before the master was asked.
    for age in (3_601_500.0, -3_598_500.0):
        answer = replace(_replica(400, age, at=100.5), replayed_commit_at=999_998.5)
        assert Lag().measure(answer, sample) == (2000, 100)


def test_the_lag_that_a_service_tells_is_taken_as_it_is() -> None:
    answer = replace(_replica(None), lag_ms=12.5)
    assert Lag().measure(answer, None) == Lag().measure(answer, Sample(1, 500, 100)) == (13, None)
