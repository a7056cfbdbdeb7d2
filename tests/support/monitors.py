"""Monitors of a cluster, and what tests wait for on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ctxdb_pgstatus import ClusterStatus, HostMonitor, HostStatus
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

HOUR = 3600.0
PATIENCE = 20
"""For how many seconds a test waits for something that comes soon, unless the machine is slow."""

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ctxdb-pgstatus'"
"""Counts the connections of monitors to a server."""


def monitor_of(cluster: PostgresCluster, **options: Any) -> HostMonitor:
    """Return a monitor of the hosts of a cluster, which polls once an hour unless `options` say otherwise."""
    options = {"port": cluster.port, "user": "postgres", "poll_interval": HOUR, **options}
    return HostMonitor(options.pop("hosts", cluster.hosts), **options)


async def until(monitor: HostMonitor, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds of what a monitor knows, without having it poll."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await monitor.wait_for_change()


async def until_received(standby: PostgresNode, position: int) -> None:
    """Wait until a standby has received the WAL up to a position, whether it replays that or not."""
    async with asyncio.timeout(PATIENCE):
        while await standby.fetch_value("SELECT pg_last_wal_receive_lsn()") < position:
            await asyncio.sleep(0.01)


def address(node: PostgresNode) -> str:
    """Return the name by which a monitor of several ports reaches a node."""
    return f"{node.host}:{node.port}"


def status_by_name(monitor: HostMonitor, name: str) -> HostStatus:
    return next(host for host in monitor.hosts() if host.host == name)


def status_of(monitor: HostMonitor, node: PostgresNode) -> HostStatus:
    """Return the status of a node that is in the monitor's list by its address alone."""
    return status_by_name(monitor, node.host)


async def until_server(monitor: HostMonitor, name: str, node: PostgresNode) -> None:
    """Wait until a monitor knows that a name leads to the server of a node."""
    started_at = await node.fetch_value("SELECT pg_postmaster_start_time()")
    await until(monitor, lambda: monitor.server_of(name) == started_at)


def changes_of(monitor: HostMonitor) -> list[ClusterStatus]:
    """Return a list to which each later status is added that differs by more than positions and lags."""
    changes: list[ClusterStatus] = []
    monitor.on_change(lambda old, new: changes.append(new))
    return changes
