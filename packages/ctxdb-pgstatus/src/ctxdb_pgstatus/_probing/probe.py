"""One host, asked for what it is: one query over a connection that is kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from ssl import SSLContext
from typing import Any

import asyncpg

from ctxdb_pgstatus.addresses import HostAddress

__all__ = ["Account", "Answer", "Probe", "is_refusal"]

_APPLICATION_NAME = "ctxdb-pgstatus"

# Recovery may end while this runs, but does not begin again: whoever is told "not in recovery" stays so.
# The control data is behind a promotion, and so serves only where nothing else is known. `pg_stat_wal_receiver` shows
# its row to everybody, and what is in it to those with pg_read_all_stats.
_QUERY = """
SELECT
    host.in_recovery,
    CASE WHEN host.in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END AS position,
    CASE WHEN host.in_recovery THEN (SELECT received_tli FROM pg_stat_wal_receiver)
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END AS timeline,
    CASE WHEN host.in_recovery THEN extract(
        epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 * 1000 END AS replay_age_ms
FROM (SELECT pg_is_in_recovery() AS in_recovery) AS host
"""
_CONTROL_QUERY = """
SELECT
    greatest(checkpoint.timeline_id, recovery.min_recovery_end_timeline) AS timeline,
    has_function_privilege('pg_ls_waldir()', 'EXECUTE') AS may_list_files
FROM pg_control_checkpoint() AS checkpoint, pg_control_recovery() AS recovery
"""
# The history of a timeline is there before anything else of it is received. Of segments, pg_rewind leaves some on a
# host that has gone back to a timeline before; with a history of a later one, PostgreSQL itself would not follow that.
_FILES_QUERY = """
SELECT max(('x' || left(name, 8))::bit(32)::int)
FROM pg_ls_waldir()
WHERE name ~ '^[0-9A-F]{8}[.]history$'
"""


@dataclass(frozen=True, slots=True)
class Account:
    """As whom, and for what database, hosts are connected to."""

    user: str
    password: str | None
    database: str
    ssl: SSLContext | str | bool | None

    def __repr__(self) -> str:
        return f"Account(user={self.user!r}, database={self.database!r})"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said of itself.

    Attributes:
        in_recovery: whether it is a replica.
        timeline: the timeline that it writes, or receives; ``None`` if it does not tell.
        position: the WAL position that it has inserted, or replayed; ``None`` if it has replayed nothing.
        replay_age_ms: how long ago, by the clocks of the servers, the commit was made that a replica replayed last.
        asked_at: when it was asked, by the event loop's clock.
        heard_of: the highest timeline whose history it has, though it may not replay it; ``None`` if not looked for.
    """

    in_recovery: bool
    timeline: int | None
    position: int | None
    replay_age_ms: float | None
    asked_at: float
    heard_of: int | None = None


class Probe:
    """Asks one host.

    Args:
        address: where it is.
        account: as whom to ask.
        lost: called when the kept connection has broken, which is when its server has ended.
    """

    def __init__(self, address: HostAddress, account: Account, lost: Callable[[], None]) -> None:
        self._address = address
        self._account = account
        self._lost = lost
        self._connection: Any = None
        self._is_address = _is_address(address.host)
        self._lookup: asyncio.Future[Any] | None = None
        # The last one that was received over this connection, for the moments in which nothing is.
        self._received: int | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the connection that the last answer came by still stands: the server has not restarted since."""
        return self._connection is not None and not self._connection.is_closed()

    async def ask(self, timeout: float) -> Answer:
        """Ask, connecting first where that is needed.

        Args:
            timeout: for both, in seconds.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: whatever the driver and the operating system have to say.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        if not self.is_connected:
            async with asyncio.timeout_at(deadline):
                await self._look_up()
            await self._connect(max(deadline - loop.time(), 0.001))
        connection = self._connection
        # Instead of the driver's own timeout, or a cancelled query: either would ask a frozen server to cancel.
        limit = loop.call_at(deadline, connection.terminate)
        asked_at = loop.time()
        try:
            row = await connection.fetchrow(_QUERY)
            timeline, heard_of = row["timeline"], None
            if timeline is None and row["in_recovery"]:
                control = await connection.fetchrow(_CONTROL_QUERY)
                timeline = max(control["timeline"], self._received or 0)
                if control["may_list_files"]:
                    heard_of = await connection.fetchval(_FILES_QUERY)
            elif row["in_recovery"]:
                self._received = timeline
        except BaseException as exc:
            self.close()
            if isinstance(exc, Exception) and loop.time() >= deadline:
                raise TimeoutError from exc
            raise
        finally:
            limit.cancel()
        return Answer(row["in_recovery"], timeline, row["position"], row["replay_age_ms"], asked_at, heard_of)

    def close(self) -> None:
        """Drop the connection, without waiting for anything."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.remove_termination_listener(self._terminated)
            connection.terminate()

    async def _look_up(self) -> None:
        """Wait for the host's name to be resolved.

        The driver would begin anew at each attempt; and of each lookup that hangs, a thread is left of the few that all
        of the application shares. So it is told to connect only where a lookup has just succeeded.
        """
        if self._is_address:
            return
        if self._lookup is None or self._lookup.done():
            loop = asyncio.get_running_loop()
            self._lookup = loop.run_in_executor(None, socket.getaddrinfo, self._address.host, self._address.port)
            # Nobody may be waiting any more when it fails.
            self._lookup.add_done_callback(lambda lookup: lookup.cancelled() or lookup.exception())
        await asyncio.shield(self._lookup)

    async def _connect(self, timeout: float) -> None:
        self.close()
        self._received = None
        self._connection = await asyncpg.connect(
            host=self._address.host,
            port=self._address.port,
            user=self._account.user,
            password=self._account.password,
            database=self._account.database,
            ssl=self._account.ssl,
            timeout=timeout,
            server_settings={"application_name": _APPLICATION_NAME},
        )
        self._connection.add_termination_listener(self._terminated)

    def _terminated(self, connection: Any) -> None:
        if connection is self._connection:
            self._lost()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_refusal(exc: BaseException) -> bool:
    """Return whether a host is there, and refuses the account: nothing that time would mend."""
    refusals = (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    )
    return isinstance(exc, refusals)
