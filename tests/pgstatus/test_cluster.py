"""`PostgresCluster`: what each of its methods does to a node, as PostgreSQL itself shows it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import eventually

from ctxdb_pgstatus.testing import EmbeddedPostgresError, PostgresCluster, PostgresNode

ANSWER_SECONDS = 0.3


async def _answers(node: PostgresNode) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await node.execute("SELECT 1")
    except (OSError, TimeoutError, asyncpg.PostgresError):
        return False
    return True


async def _is_primary(node: PostgresNode) -> bool:
    return not await node.fetch_value("SELECT pg_is_in_recovery()")


async def _has(node: PostgresNode, table: str) -> bool:
    return await node.fetch_value("SELECT to_regclass($1::text)::text", table) is not None


async def test_a_primary_and_its_standbys_share_a_port_on_addresses_of_their_own(cluster: PostgresCluster) -> None:
    assert [await _is_primary(node) for node in cluster.nodes] == [True, False, False]
    assert len(set(cluster.hosts)) == 3
    assert {node.port for node in cluster.nodes} == {cluster.port}
    assert cluster.primary is cluster.nodes[0]
    assert cluster.standbys == cluster.nodes[1:]


async def test_the_standbys_replicate_a_new_table(cluster: PostgresCluster) -> None:
    await cluster.primary.execute("CREATE TABLE replicated (i int)")
    await cluster.wait_for_replay()
    assert [await _has(node, "replicated") for node in cluster.nodes] == [True, True, True]


async def test_a_url_leads_to_its_node(cluster: PostgresCluster) -> None:
    node = cluster.nodes[2]
    engine = create_async_engine(node.url())
    async with engine.connect() as connection:
        address = await connection.exec_driver_sql("SELECT host(inet_server_addr())")
        assert address.scalar_one() == node.host
    await engine.dispose()


async def test_a_killed_primary_comes_back_as_a_primary(cluster: PostgresCluster) -> None:
    async with cluster.primary.connect() as connection:
        await cluster.primary.kill()
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await connection.fetchval("SELECT 1")
    with pytest.raises(ConnectionRefusedError):
        await cluster.primary.execute("SELECT 1")
    await cluster.primary.start()
    assert await _is_primary(cluster.primary)


async def test_a_stopped_node_restarts(cluster: PostgresCluster) -> None:
    standby = cluster.nodes[1]
    await standby.stop()
    with pytest.raises(ConnectionRefusedError):
        await standby.execute("SELECT 1")
    await standby.start()
    await standby.restart("immediate")
    await standby.wait_for_stream()


async def test_a_frozen_node_accepts_connections_and_answers_only_after_its_thaw(cluster: PostgresCluster) -> None:
    node = cluster.primary
    async with node.connect() as connection:
        await node.freeze()
        query = asyncio.create_task(connection.fetchval("SELECT 1"))
        assert not await _answers(node)
        assert not query.done()
        _, writer = await asyncio.open_connection(node.host, node.port)
        writer.close()
        await node.thaw()
        assert await query == 1


async def test_a_frozen_node_can_be_killed_and_stopped(cluster: PostgresCluster) -> None:
    killed, stopped = cluster.standbys
    for node in (killed, stopped):
        await node.freeze()
    await killed.kill()
    await stopped.stop()
    for node in (killed, stopped):
        await node.start()
        await node.wait_for_stream()


async def test_a_promoted_standby_takes_writes_and_the_other_can_be_pointed_to_it(cluster: PostgresCluster) -> None:
    old, new, other = cluster.nodes
    await old.kill()
    await new.promote()
    assert cluster.primary is new
    assert cluster.standbys == (old, other)
    await other.follow(new)
    await new.execute("CREATE TABLE after_promotion (i int)")
    await cluster.wait_for_replay()
    assert await _has(other, "after_promotion")


async def test_a_former_primary_comes_back_as_a_primary_and_is_rewound_into_a_standby(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    await old.kill()
    await new.promote()
    await old.start()
    assert await _is_primary(old)
    assert await _is_primary(new)
    await old.execute("CREATE TABLE of_the_old (i int)")
    await new.execute("CREATE TABLE of_the_new (i int)")

    await old.rewind(new)

    assert not await _is_primary(old)
    await old.wait_for_replay(await new.position())
    assert await _has(old, "of_the_new")
    assert not await _has(old, "of_the_old")


async def test_a_node_with_wal_of_its_own_cannot_follow(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, _ = cluster.nodes
    await new.promote()
    await new.write_wal(1000)
    await old.write_wal(1_000_000)
    await old.follow(new, wait=False)
    monkeypatch.setattr("ctxdb_pgstatus.testing.cluster.TIMEOUT_SECONDS", 1.0)
    with pytest.raises(EmbeddedPostgresError, match=r"n1 does not stream from n2 after .*\n"):
        await old.wait_for_stream()


async def test_a_node_on_a_later_timeline_than_another_does_not_stream_from_it(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, other = cluster.nodes
    await new.promote()
    await other.follow(new)
    await other.wait_for_replay(await new.write_wal(1000))
    await other.follow(old, wait=False)
    monkeypatch.setattr("ctxdb_pgstatus.testing.cluster.TIMEOUT_SECONDS", 0.5)
    # It tries again every 50 ms, and takes itself for streaming until the answer comes.
    with pytest.raises(EmbeddedPostgresError, match=r"highest timeline \d+ of the primary is behind recovery"):
        await other.wait_for_stream()


async def test_a_standby_that_has_only_received_a_later_timeline_is_rewound(cluster: PostgresCluster) -> None:
    old, new, other = cluster.nodes
    # The standby's last restartpoint is to be on the first timeline. So there is a checkpoint before the promotion, and
    # none after it; nor does any WAL of the second timeline change a page, the write of which would be noted.
    await old.execute("CHECKPOINT")
    await cluster.wait_for_replay()
    checkpointer = await new.fetch_value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
    os.kill(checkpointer, signal.SIGSTOP)
    try:
        await new.promote()
        await new.execute("SELECT pg_logical_emit_message(false, 'ctxdb', repeat('x', 100000))")
        await other.follow(new)
        await other.wait_for_replay(await new.position())
        await other.stop()
    finally:
        os.kill(checkpointer, signal.SIGCONT)

    await other.rewind(old)

    await old.execute("CREATE TABLE after_no_rewind (i int)")
    await other.wait_for_replay(await old.write_wal(1_000_000))
    assert await _has(other, "after_no_rewind")


async def test_a_running_primary_can_be_made_a_standby(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    # A primary that is shut down waits until its standbys have received all of its WAL: so it can follow without a
    # rewind.
    await old.stop()
    await new.promote()
    await old.follow(new)
    await old.start()
    await old.wait_for_stream()
    assert not await _is_primary(old)


async def test_a_paused_standby_lags_in_bytes(cluster: PostgresCluster) -> None:
    standby, other = cluster.standbys
    await cluster.wait_for_replay()
    before = await standby.position()
    await standby.pause_replay()
    written = await cluster.primary.write_wal(2_500_000)
    await other.wait_for_replay(written)
    assert written - before >= 2_500_000
    assert await standby.position() == before
    await standby.resume_replay()
    await standby.wait_for_replay(written)


async def test_a_delayed_standby_lags_in_time(cluster: PostgresCluster) -> None:
    standby, other = cluster.standbys
    await standby.set_apply_delay(3600)
    written = await cluster.primary.write_wal(10)
    await other.wait_for_replay(written)
    # The standby has received the commit, and does not replay it yet.
    await _until(standby, f"SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn >= {written}")
    assert await standby.position() < written
    await standby.set_apply_delay(0)
    await standby.wait_for_replay(written)


async def _until(node: PostgresNode, query: str) -> None:
    async with asyncio.timeout(20):
        while not await node.fetch_value(query):
            await asyncio.sleep(0.005)


async def test_synchronous_commits_wait_for_a_standby(cluster: PostgresCluster) -> None:
    await cluster.set_synchronous("ANY 1 (*)")
    await cluster.primary.write_wal(10)
    for node in cluster.standbys:
        await node.freeze()
    commit = asyncio.create_task(cluster.primary.write_wal(10))
    await _until(cluster.primary, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')")
    assert not commit.done()
    await cluster.standbys[0].thaw()
    await commit
    await cluster.set_synchronous(None)
    await cluster.primary.write_wal(10)


async def test_a_restored_cluster_has_its_first_roles_and_the_first_nodes_data(cluster: PostgresCluster) -> None:
    first, second, third = cluster.nodes
    await first.kill()
    await second.promote()
    await third.follow(second)
    await second.execute("CREATE TABLE written_by_the_second (i int)")
    await cluster.wait_for_replay()
    await third.pause_replay()
    await third.set_apply_delay(60)
    await second.freeze()

    await cluster.restore()

    assert cluster.primary is first
    assert [await _is_primary(node) for node in cluster.nodes] == [True, False, False]
    await first.execute("CREATE TABLE after_restoring (i int)")
    await cluster.wait_for_replay()
    assert [await _has(node, "after_restoring") for node in cluster.nodes] == [True, True, True]
    assert [await _has(node, "written_by_the_second") for node in cluster.nodes] == [False, False, False]


async def test_a_cluster_whose_first_node_became_a_standby_is_restored(cluster: PostgresCluster) -> None:
    first, second, _ = cluster.nodes
    await second.promote()
    await first.rewind(second)
    await cluster.restore()
    assert [await _is_primary(node) for node in cluster.nodes] == [True, False, False]
    for node in cluster.standbys:
        await node.wait_for_stream()


async def test_a_cluster_of_which_two_nodes_were_promoted_apart_is_restored(cluster: PostgresCluster) -> None:
    first, second, third = cluster.nodes
    await second.promote()
    await first.rewind(second)
    await third.promote()
    await third.write_wal(1_000_000)

    await cluster.restore()

    await first.execute("CREATE TABLE after_two_promotions (i int)")
    await first.write_wal(2_000_000)
    await cluster.wait_for_replay()
    assert [await _has(node, "after_two_promotions") for node in cluster.nodes] == [True, True, True]


async def test_a_reset_cluster_is_empty(cluster: PostgresCluster) -> None:
    first, second, _ = cluster.nodes
    await first.execute("CREATE TABLE before_reset (i int)")
    await second.promote()
    await first.freeze()
    await cluster.reset()
    assert [await _is_primary(node) for node in cluster.nodes] == [True, False, False]
    assert [await _has(node, "before_reset") for node in cluster.nodes] == [False, False, False]


async def test_an_order_to_a_node_in_the_wrong_state_is_an_error_that_says_so(cluster: PostgresCluster) -> None:
    await cluster.nodes[2].kill()
    with pytest.raises(EmbeddedPostgresError, match="n3 is not running"):
        await cluster.nodes[2].freeze()
    with pytest.raises(EmbeddedPostgresError, match="n1 is running"):
        await cluster.nodes[0].start()


async def test_a_cluster_with_a_password_asks_clients_and_standbys_for_it() -> None:
    password = "it's \\ a secret"
    async with PostgresCluster(standbys=1, password=password) as cluster:
        primary, standby = cluster.nodes
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(host=primary.host, port=primary.port, user="postgres", password="wrong", ssl=False)
        await standby.promote()
        await primary.rewind(standby)
        engine = create_async_engine(standby.url())
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
        await engine.dispose()


async def test_addresses_and_settings_can_be_chosen() -> None:
    async with PostgresCluster(hosts=["::1"], settings={"work_mem": "1234kB"}) as cluster:
        assert await cluster.primary.fetch_value("SHOW work_mem") == "1234kB"
        engine = create_async_engine(cluster.primary.url())
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
        await engine.dispose()


async def test_the_error_of_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(EmbeddedPostgresError, match="no_such_setting"):
        await PostgresCluster(standbys=0, settings={"no_such_setting": "1"}).start()


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"192\.0\.2\.1 is no address of this machine"):
        await PostgresCluster(hosts=["192.0.2.1"]).start()


async def test_an_order_to_a_cluster_that_is_not_running_is_an_error_that_says_so() -> None:
    cluster = PostgresCluster()
    with pytest.raises(EmbeddedPostgresError, match="start it"):
        await cluster.nodes[0].kill()
    await cluster.stop()


async def test_a_stopped_cluster_leaves_nothing() -> None:
    async with PostgresCluster(standbys=1) as cluster:
        directory = Path(cluster._directory)
        left = await _left_of(cluster)
        await cluster.nodes[0].kill()
        await cluster.nodes[1].freeze()
    assert not directory.exists()
    assert left() == []


async def _left_of(cluster: PostgresCluster) -> _Left:
    pids = [
        int((Path(cluster._directory) / node.name / "postmaster.pid").read_text().split()[0]) for node in cluster.nodes
    ]
    return _Left(pids)


class _Left:
    """The processes of servers and their children, and segments of shared memory, that are left when it is called."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids + [pid for pid, (parent, _) in _processes().items() if parent in pids]
        # Numbers of processes are given again: a segment that is left of an earlier run is used by nobody.
        self.segments = {segment: pid for segment, pid in _used_shared_memory().items() if pid in self.pids}

    def __call__(self) -> list[str]:
        processes = _processes()
        return [f"process {pid}" for pid in self.pids if processes.get(pid, (0, "Z"))[1] != "Z"] + [
            f"shared memory of {self.segments[segment]}" for segment in self.segments.keys() & _shared_memory()
        ]


def _processes() -> dict[int, tuple[int, str]]:
    from ctxdb_core.testing.postgres._supervisor import _processes

    return _processes()


def _shared_memory() -> dict[int, tuple[int, int]]:
    """Return who has made each segment of shared memory, and by how many processes it is used."""
    table = Path("/proc/sysvipc/shm")
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    return {int(row[1]): (int(row[4]), int(row[6])) for row in rows}


def _used_shared_memory() -> dict[int, int]:
    return {segment: creator for segment, (creator, users) in _shared_memory().items() if users}


_PROGRAM = """\
import asyncio, json, sys
from pathlib import Path
from ctxdb_pgstatus.testing import PostgresCluster

async def main():
    async with PostgresCluster(standbys=1) as cluster:
        files = [Path(cluster._directory, node.name, "postmaster.pid") for node in cluster.nodes]
        pids = [int(file.read_text().split()[0]) for file in files]
        await cluster.nodes[1].freeze()
        print(json.dumps([cluster._directory, pids]), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_cluster_leaves_no_process_and_no_file_when_its_program_is_killed(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        directory, pids = json.loads(await asyncio.to_thread(program.stdout.readline))
        left = _Left(pids)
        os.kill(program.pid, number)
        await asyncio.to_thread(program.wait)
    # The supervisor gives the frozen server time to stop, before it kills it.
    await eventually(lambda: not left() and not Path(directory).exists(), lambda: f"left: {left()}, {directory}", 60)
