"""`Lag`: how far a replica is behind, by its answers and what the master had."""

from __future__ import annotations

from dataclasses import replace

from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.lag import Lag, Reference


def _replica(position: int | None, age: float | None = None, *, at: float = 100.0, timeline: int | None = 1) -> Answer:
    return Answer(in_recovery=True, timeline=timeline, position=position, replay_age_ms=age, asked_at=at)


def test_caught_up_replica_has_no_lag_however_old_the_last_commit_is() -> None:
    assert Lag().measure(_replica(500, 3_600_000), Reference(1, 500, 100)) == (0, 0)
    assert Lag().measure(_replica(510, 3_600_000), Reference(1, 500, 100)) == (0, 0)
    assert Lag().measure(_replica(500, None), Reference(1, 500, 100)) == (0, 0)


def test_lag_of_a_replica_is_the_age_of_its_last_replayed_commit() -> None:
    assert Lag().measure(_replica(400, 1234.5), Reference(1, 500, 100)) == (1235, 100)


def test_replica_that_is_behind_has_lag_although_its_clock_is_ahead() -> None:
    assert Lag().measure(_replica(400, -50), Reference(1, 500, 100)) == (1, 100)


def test_lag_is_unknown_before_the_first_replayed_commit() -> None:
    assert Lag().measure(_replica(400, None), Reference(1, 500, 100)) == (None, 100)


def test_lag_is_unknown_without_a_replay_position() -> None:
    assert Lag().measure(_replica(None, None), Reference(1, 500, 100)) == (None, None)


def test_lag_is_at_most_the_time_since_the_replica_had_caught_up() -> None:
    lag = Lag()
    lag.measure(_replica(500, 60_000, at=100), Reference(1, 500, 100))
    assert lag.measure(_replica(500, 65_000, at=105), Reference(1, 600, 105)) == (5000, 100)
    # The age of the commit that the replica has replayed since then is a closer bound.
    assert lag.measure(_replica(550, 20, at=105), Reference(1, 600, 105)) == (20, 50)


def test_lag_is_unknown_on_another_timeline() -> None:
    lag = Lag()
    lag.measure(_replica(500), Reference(1, 500, 100))
    assert lag.measure(_replica(900, 10), Reference(2, 600, 105)) == (None, None)
    assert lag.measure(_replica(900, 10, timeline=None), Reference(2, 600, 105)) == (None, None)
    # That the replica had caught up on the former timeline does not count on the new one.
    assert lag.measure(_replica(590, None, at=106, timeline=2), Reference(2, 600, 105)) == (None, 10)


def test_lag_is_unknown_after_a_replica_is_rewound() -> None:
    lag = Lag()
    lag.measure(_replica(500), Reference(1, 500, 100))
    assert lag.measure(_replica(300, None, at=101), Reference(1, 500, 101)) == (None, 200)


def test_before_any_master_is_known_lag_is_the_age_of_the_last_replayed_commit() -> None:
    assert Lag().measure(_replica(500, 10.2), None) == (11, None)
    assert Lag().measure(_replica(500, None), None) == (None, None)


def test_the_age_of_a_commit_is_measured_by_the_masters_clock() -> None:
    reference = Reference(1, 500, 100, clock=1_000_000.0)
    # The replica's clock is an hour fast, or slow. The commit was made 1.5 seconds before the master was asked.
    for age in (3_601_500.0, -3_598_500.0):
        answer = replace(_replica(400, age, at=100.5), replayed_commit_at=999_998.5)
        assert Lag().measure(answer, reference) == (2000, 100)


def test_lag_is_unknown_if_the_last_replayed_commit_is_of_the_future() -> None:
    # The clock of the master has been set back, or the commit was made by a former master with another clock.
    reference = Reference(1, 500, 100, clock=1_000_000.0)
    answer = replace(_replica(400, 20, at=100), replayed_commit_at=1_000_010.0)
    lag = Lag()
    assert lag.measure(answer, reference) == (None, 100)
    assert lag.measure(replace(answer, replayed_commit_at=1_000_000.1), reference) == (1, 100)
    # How long ago the replica had caught up is measured by the clock of the monitor alone.
    lag.measure(replace(answer, position=500), reference)
    later = replace(answer, position=500, asked_at=130.0)
    assert lag.measure(later, Reference(1, 600, 130, clock=900_000.0)) == (30_000, 100)


def test_the_lag_that_a_service_tells_is_used_unchanged() -> None:
    answer = replace(_replica(None), lag_ms=12.5)
    assert Lag().measure(answer, None) == Lag().measure(answer, Reference(1, 500, 100)) == (13, None)
