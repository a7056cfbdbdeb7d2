"""`Link`: one connection to a host, and the questions that it is asked over it."""

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
"""What a host is asked about logical replication: for its slots, for its subscriptions, or nothing."""

_T = TypeVar("_T")

_APPLICATION_NAME = "ctxdb-pgstatus"

_REFUSED_FUNCTIONS = (
    asyncpg.FeatureNotSupportedError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedFunctionError,
)


class PooledError(Exception):
    """A prepared statement is gone, or there already: a pooler is in between, and gives each transaction another
    connection to the server.
    """


class Link:
    """One connection to a host.

    Attributes:
        server: which server it leads to.
        opened_at: when it was opened, by the event loop's clock.
        addresses: what the host's name was resolved to then.
    """

    def __init__(self, connection: Any, *, is_pooled: bool, addresses: frozenset[str], logical: LogicalRole) -> None:
        self.server: Server | None = None
        self.opened_at = asyncio.get_running_loop().time()
        self.addresses = addresses
        self._connection = connection
        self._is_pooled = is_pooled
        self._lost: Callable[[], None] | None = None
        # The last timeline that was received over this connection, for the moments in which nothing is.
        self._received: int | None = None
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
            address: where it is.
            account: as whom to connect.
            connect_timeout: how long connecting may take, in seconds.
            query_timeout: how long it may take to find out, in seconds.
            is_pooled: whether a pooler is in between that gives each transaction another connection.
            addresses: what the host's name was resolved to.
            logical: what is asked about logical replication.

        Raises:
            TimeoutError: there was no answer in time.
            PooledError: there is such a pooler, and `is_pooled` is false.
            Exception: whatever the driver and the operating system have to say.
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
        """Whether the connection still stands: its server has not restarted since."""
        return not self._connection.is_closed()

    def on_loss(self, callback: Callable[[], None]) -> None:
        """Have a function called when the connection breaks, which is when its server ends; not at `close`."""
        self._lost = callback
        self._connection.add_termination_listener(self._terminated)

    def close(self) -> None:
        """Drop the connection, without waiting for anything."""
        if self._lost is not None:
            self._connection.remove_termination_listener(self._terminated)
            self._lost = None
        self._connection.terminate()

    async def ask(self, timeout: float) -> Answer:
        """Ask what the host is.

        Args:
            timeout: how long the answer may take, in seconds.

        Raises:
            TimeoutError: there was no answer in time; the connection is closed then.
            PooledError: a pooler is in between.
            Exception: whatever the driver and the operating system have to say.
        """
        return await self._within(timeout, self._ask)

    async def _within(self, timeout: float, question: Callable[[], Awaitable[_T]]) -> _T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        # Instead of the driver's own timeout, or a cancelled query: either would ask a frozen server to cancel.
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
        timeline, heard_of = row["timeline"], None
        if row["in_recovery"]:
            if timeline is None:
                timeline, heard_of = await self._find_timeline()
            else:
                self._received = timeline
        takes_writes = not (row["is_read_only"] and (await self._fetch_row(queries.IS_FENCED))[0])
        if self.server is None or self.server.started_at != row["started_at"]:
            # A pooler has gone to another server, or its server has restarted.
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
            heard_of=heard_of,
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
        """Return the timeline of a replica that receives nothing now, and the highest that it has heard of."""
        if self._is_limited or not self._may_read_control:
            return self._received, None
        try:
            control = await self._fetch_row(queries.CONTROL)
        except _REFUSED_FUNCTIONS:
            self._may_read_control = False
            return self._received, None
        timeline = max(control["timeline"], self._received or 0)
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
        # Outside of a transaction, a pooler may send the parts of one query to several connections.
        async with self._connection.transaction(readonly=True):
            return await self._connection.fetch(query)

    def _terminated(self, _connection: Any) -> None:
        if self._lost is not None:
            self._lost()
