"""`Link`: one connection to a host, and the queries that the host is asked over it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias, TypeVar

import asyncpg

from ctxdb_pgstatus._probing import queries
from ctxdb_pgstatus._probing.account import Account
from ctxdb_pgstatus._probing.answer import Answer, Server, Slot, Subscription
from ctxdb_pgstatus._probing.deadline import Deadline
from ctxdb_pgstatus.addresses import HostAddress

__all__ = ["Link", "LogicalRole", "PooledError"]

LogicalRole: TypeAlias = Literal["publisher", "subscriber"] | None
"""What a host is asked about logical replication: a publisher for its slots, a subscriber for its subscriptions."""

_T = TypeVar("_T")

_APPLICATION_NAME = "ctxdb-pgstatus"

# How a host says that it does not have a function, or that the monitor's role may not execute it.
_REFUSED_FUNCTIONS = (
    asyncpg.FeatureNotSupportedError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedFunctionError,
)


class PooledError(Exception):
    """A pooler is in between that gives each transaction another connection to the server.

    It shows by a prepared statement that is gone, or one that is there before it was prepared.
    """


class Link:
    """One connection to a host.

    Attributes:
        server: the server that the connection leads to.
        opened_at: when the connection was opened, by the event loop's clock.
        addresses: the addresses that the host's name was resolved to when the connection was opened.
    """

    def __init__(self, connection: Any, *, is_pooled: bool, addresses: frozenset[str], logical: LogicalRole) -> None:
        self.server: Server | None = None
        self.opened_at = asyncio.get_running_loop().time()
        self.addresses = addresses
        self._connection = connection
        self._is_pooled = is_pooled
        self._lost: Callable[[], None] | None = None
        # The timeline that the standby's WAL receiver had last, for the moments in which no WAL receiver runs.
        self._received_timeline: int | None = None
        # What the host has refused is not asked again over this connection.
        self._is_limited = False
        self._has_aurora_lag = False
        self._may_read_system = True
        self._may_read_control = True
        self._may_read_applied = True
        self._logical = logical

    @classmethod
    async def open(
        cls,
        address: HostAddress,
        account: Account,
        *,
        connect_timeout: float,
        query_timeout: float,
        is_pooled: bool,
        addresses: frozenset[str],
        logical: LogicalRole = None,
    ) -> Link:
        """Connect to a host, and find out which server it is.

        Args:
            address: where the host is.
            account: the role and the database to connect by.
            connect_timeout: how long connecting may take, in seconds.
            query_timeout: how long it may take to find out which server this is, in seconds.
            is_pooled: whether a pooler is in between that gives each transaction another connection.
            addresses: the addresses that the host's name was resolved to.
            logical: what the host is asked about logical replication.

        Raises:
            TimeoutError: there was no answer in time.
            PooledError: there is such a pooler, and `is_pooled` is false.
            Exception: an error of the driver or the operating system.
        """
        connection = await asyncpg.connect(
            host=address.host,
            port=address.port,
            user=account.user,
            password=account.driver_password,
            database=account.database,
            ssl=account.ssl,
            timeout=connect_timeout,
            statement_cache_size=0 if is_pooled else 100,
            server_settings={"application_name": _APPLICATION_NAME},
        )
        link = cls(connection, is_pooled=is_pooled, addresses=addresses, logical=logical)
        try:
            await link._within(query_timeout, link._identify)
        except BaseException:
            link.close()
            raise
        return link

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as the driver knows: then its server has not been restarted."""
        return not self._connection.is_closed()

    def on_loss(self, callback: Callable[[], None]) -> None:
        """Have a function called when the connection breaks, as it does when its server ends; not at `close`."""
        self._lost = callback
        self._connection.add_termination_listener(self._terminated)

    def close(self) -> None:
        """Drop the connection, without waiting for anything."""
        if self._lost is not None:
            self._connection.remove_termination_listener(self._terminated)
            self._lost = None
        self._connection.terminate()

    async def ask(self, timeout: float) -> Answer:
        """Ask the host for all that an `Answer` holds.

        Args:
            timeout: how long the answer may take, in seconds.

        Raises:
            TimeoutError: there was no answer in time; the connection is closed then.
            PooledError: a pooler is in between, and the link was not opened for one.
            Exception: an error of the driver or the operating system.
        """
        return await self._within(timeout, self._ask)

    async def _within(self, timeout: float, question: Callable[[], Awaitable[_T]]) -> _T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        # At the deadline, the connection is cut off. By the driver's own timeout, or a cancellation, the driver would
        # ask the server to cancel the query, and wait for a server that may be frozen.
        limit = Deadline(deadline, self._connection.terminate)
        try:
            return await question()
        except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError) as exc:
            raise PooledError from exc
        except Exception as exc:
            if loop.time() >= deadline:
                raise TimeoutError(f"no answer within {timeout:.3g} s") from exc
            raise
        finally:
            limit.cancel()

    async def _identify(self) -> None:
        row = await self._fetch_row(queries.IDENTITY)
        system = await self._fetch_system()
        self.server = Server(row["started_at"], system, row["address"], row["port"])

    async def _ask(self) -> Answer:
        asked_at = asyncio.get_running_loop().time()
        lag_ms = None
        if not self._is_limited:
            try:
                row = await self._fetch_row(queries.STATUS)
            except _REFUSED_FUNCTIONS:
                self._is_limited = True
                self._has_aurora_lag = (await self._fetch_row(queries.HAS_AURORA_LAG))[0]
        if self._is_limited:
            row = await self._fetch_row(queries.LIMITED)
            if self._has_aurora_lag and row["in_recovery"]:
                of_aurora = await self._fetch_row(queries.AURORA_LAG)
                lag_ms = None if of_aurora is None else of_aurora[0]
        timeline, highest_known_timeline = row["timeline"], None
        if row["in_recovery"]:
            if timeline is None:
                timeline, highest_known_timeline = await self._find_timeline()
            else:
                self._received_timeline = timeline
        takes_writes = not (row["is_read_only"] and (await self._fetch_row(queries.IS_FENCED))[0])
        if self.server is None or self.server.started_at != row["started_at"]:
            # A pooler in between has gone to another server, or the server behind the pooler was restarted.
            await self._identify()
        slots: dict[str, Slot] = {}
        subscriptions: tuple[Subscription, ...] = ()
        if self._logical is not None and not row["in_recovery"]:
            if self._logical == "publisher":
                found = await self._fetch(queries.SLOTS)
                slots = {each["slot_name"]: Slot(each["active"], each["confirmed_flush_lsn"]) for each in found}
            else:
                subscriptions = await self._fetch_subscriptions()
        replayed_at = row["replayed_commit_at"]
        return Answer(
            in_recovery=row["in_recovery"],
            timeline=timeline,
            position=row["position"],
            received=row["received"],
            replay_age_ms=None if replayed_at is None else (row["clock"] - replayed_at) * 1000,
            asked_at=asked_at,
            answered_at=asyncio.get_running_loop().time(),
            highest_known_timeline=highest_known_timeline,
            replayed_commit_at=replayed_at,
            clock=row["clock"],
            takes_writes=takes_writes,
            standbys=row["standbys"],
            lag_ms=lag_ms,
            slots=slots,
            subscriptions=subscriptions,
            server=self.server,
        )

    async def _find_timeline(self) -> tuple[int | None, int | None]:
        """Return the timeline of a standby without a WAL receiver, and the highest one that it has a history of."""
        if self._is_limited or not self._may_read_control:
            return self._received_timeline, None
        try:
            control = await self._fetch_row(queries.CONTROL)
        except _REFUSED_FUNCTIONS:
            self._may_read_control = False
            return self._received_timeline, None
        timeline = max(control["timeline"], self._received_timeline or 0)
        return timeline, (await self._fetch_row(queries.FILES))[0] if control["may_list_files"] else None

    async def _fetch_system(self) -> int | None:
        if not self._may_read_system:
            return None
        try:
            return int((await self._fetch_row(queries.SYSTEM))[0])
        except _REFUSED_FUNCTIONS:
            self._may_read_system = False
            return None

    async def _fetch_subscriptions(self) -> tuple[Subscription, ...]:
        found = await self._fetch(queries.SUBSCRIPTIONS)
        applied: dict[str, int] = {}
        if self._may_read_applied:
            try:
                applied = dict(await self._fetch(queries.APPLIED))
            except _REFUSED_FUNCTIONS:
                self._may_read_applied = False
        return tuple(
            Subscription(each["slot_name"], applied.get(each["origin"]), each["reported"], each["has_all_tables"])
            for each in found
        )

    async def _fetch_row(self, query: str) -> Any:
        rows = await self._fetch(query)
        return rows[0] if rows else None

    async def _fetch(self, query: str) -> Any:
        if not self._is_pooled:
            return await self._connection.fetch(query)
        # asyncpg prepares a query and executes it by two messages. Outside of a transaction, the pooler may send these
        # to two connections.
        transaction = self._connection.transaction(readonly=True)
        await transaction.start()
        # Not `async with`: on a connection that is closed by then, its end raises an error in the place of the
        # cancellation that has ended the query, and the task of a monitor that is closed would go on.
        try:
            rows = await self._connection.fetch(query)
        except asyncpg.PostgresError:
            await transaction.rollback()
            raise
        await transaction.commit()
        return rows

    def _terminated(self, _connection: Any) -> None:
        if self._lost is not None:
            self._lost()
