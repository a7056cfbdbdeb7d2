"""Monitors of a cluster, and what tests wait for on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ctxdb_pgstatus import ClusterStatus, HostMonitor, HostStatus
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

HOUR = 3600.0
PATIENCE = 20


def monitor_of(cluster: PostgresCluster, **options: Any) -> HostMonitor:
    options = {"port": cluster.port, "user": "postgres", "poll_interval": HOUR, **options}
    return HostMonitor(options.pop("hosts", cluster.hosts), **options)


async def until(monitor: HostMonitor, condition: Callable[[], bool]) -> None:
    """Wait, without a poll of one's own, until what is known fulfils a condition."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await monitor.wait_for_change()


async def until_received(standby: PostgresNode, position: int) -> None:
    """Wait until a standby has received the WAL up to a position, whether it replays that or not."""
    async with asyncio.timeout(PATIENCE):
        while await standby.fetch_value("SELECT pg_last_wal_receive_lsn()") < position:
            await asyncio.sleep(0.01)


def status_of(monitor: HostMonitor, node: PostgresNode) -> HostStatus:
    return next(host for host in monitor.hosts() if host.host == node.host)


def changes_of(monitor: HostMonitor) -> list[ClusterStatus]:
    changes: list[ClusterStatus] = []
    monitor.on_change(lambda old, new: changes.append(new))
    return changes
