"""`Judge`: which replicas are in sync, by answers that came before and after the master was asked."""

from __future__ import annotations

import pytest

from ctxdb_pgstatus import HostMonitor
from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.judge import Judge
from ctxdb_pgstatus._probing.member import Member

MASTER = Answer(in_recovery=False, timeline=1, position=500, replay_age_ms=None, asked_at=100.0, answered_at=100.2)


@pytest.fixture
def member() -> Member:
    return HostMonitor(["n1"], user="watcher")._cluster.members["n1"]


def _replica(position: int, answered_at: float, timeline: int = 1) -> Answer:
    return Answer(
        in_recovery=True,
        timeline=timeline,
        position=position,
        replay_age_ms=None,
        asked_at=answered_at - 0.1,
        answered_at=answered_at,
    )


async def test_a_replica_that_answered_after_the_master_was_asked_may_have_more_than_the_master(member: Member) -> None:
    judge = Judge(1000, 1000)
    member.watch.previous, member.watch.answer = _replica(500, 99.9), _replica(600, 100.1)
    judge.compare_with_master(MASTER, [member])
    assert (member.lag.milliseconds, member.lag.bytes) == (0, 0)
    assert judge.has_replayed(member, 0)


@pytest.mark.parametrize("is_latest", [True, False])
async def test_a_replica_that_had_more_before_the_master_was_asked_is_not_in_sync(
    member: Member, *, is_latest: bool
) -> None:
    judge = Judge(1000, 1000)
    ahead = _replica(600, 99.9)
    member.watch.previous, member.watch.answer = (None, ahead) if is_latest else (ahead, _replica(600, 100.1))
    judge.compare_with_master(MASTER, [member])
    assert (member.lag.milliseconds, member.lag.bytes) == (None, None)
    assert not member.in_sync_by_bytes
    assert not judge.has_replayed(member, 0)


async def test_a_replica_of_another_timeline_is_compared_with_the_master_again_when_it_is_on_the_same(
    member: Member,
) -> None:
    judge = Judge(1000, 1000)
    member.watch.previous, member.watch.answer = None, _replica(600, 99.9, timeline=2)
    judge.compare_with_master(MASTER, [member])
    assert (member.lag.milliseconds, member.lag.bytes) == (None, None)
    member.watch.answer = _replica(500, 101)
    judge.judge(member)
    assert (member.lag.milliseconds, member.lag.bytes) == (0, 0)
