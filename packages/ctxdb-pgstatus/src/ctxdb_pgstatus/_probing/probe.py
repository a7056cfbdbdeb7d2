"""`Probe`: asks one host over a connection that is kept, and replaced before it is too old."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import asyncpg

from ctxdb_pgstatus._probing.account import Account
from ctxdb_pgstatus._probing.answer import Answer, Server
from ctxdb_pgstatus._probing.link import Link, LogicalRole, PooledError
from ctxdb_pgstatus._probing.lookup import Lookup
from ctxdb_pgstatus.addresses import HostAddress

__all__ = ["Probe", "TimeLimits", "is_busy", "is_closed_to_all", "is_refusal"]


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Limits of time for the connection to a host, in seconds.

    Attributes:
        connect: how long it may take to resolve the name and to connect.
        query: how long an answer may take.
        age: how old a connection may get before it is replaced by a new one.
    """

    connect: float
    query: float
    age: float


class Probe:
    """Asks one host.

    Args:
        address: where the host is.
        account: the role and the database to connect by.
        limits: how long the parts of an attempt may take.
        lost: called when the kept connection has broken, as it does when its server ends.
        logical: what the host is asked about logical replication.
    """

    def __init__(
        self,
        address: HostAddress,
        account: Account,
        limits: TimeLimits,
        lost: Callable[[], None],
        logical: LogicalRole = None,
    ) -> None:
        self._address = address
        self._logical = logical
        self._account = account
        self._limits = limits
        self._lost = lost
        self._lookup = Lookup(address.host, address.port)
        self._link: Link | None = None
        # The connection that takes the place of `_link` when the host is asked next. A question may be under way over
        # `_link` when this one is opened.
        self._next: Link | None = None
        self._is_pooled = False

    @property
    def is_connected(self) -> bool:
        """Whether the connection by which the last answer came is open: the server has not been restarted since."""
        return self._link is not None and self._link.is_open

    async def ask(self) -> Answer:
        """Ask the host, over a new connection if none is open.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: an error of the driver or the operating system.
        """
        try:
            try:
                return await (await self._connected_link()).ask(self._limits.query)
            except PooledError:
                self._drop()
                self._is_pooled = True
                return await (await self._connected_link()).ask(self._limits.query)
        except BaseException:
            self._drop()
            raise

    async def renew(self, *, anyway: bool = False, age: float | None = None) -> bool:
        """Replace the kept connection if it is too old, or if the name leads to other addresses by now.

        Args:
            anyway: whether the connection is replaced in any case.
            age: how old the kept connection may get, in seconds, if that is less than the limit.

        Returns:
            whether the connection was replaced (see `replace`).

        Raises:
            TimeoutError: there was no answer in time; the kept connection stays.
            Exception: an error of the driver or the operating system; the kept connection stays.
        """
        link = self._link
        if link is None or not link.is_open or self._next is not None:
            return False
        async with asyncio.timeout(self._limits.connect):
            addresses = await self._lookup.addresses()
        limit = self._limits.age if age is None else min(age, self._limits.age)
        is_young = asyncio.get_running_loop().time() - link.opened_at < limit
        if not anyway and addresses == link.addresses and is_young:
            return False
        await self.replace()
        return True

    async def replace(self) -> None:
        """Open a connection, over which the next question goes.

        Raises:
            TimeoutError: there was no answer in time; the kept connection stays.
            Exception: an error of the driver or the operating system; the kept connection stays.
        """
        following = await self._open()
        try:
            # The first answer over a connection takes more round trips than later ones. It is waited for here, as a
            # `Watch` might take a longer answer for the silence of a host that hangs.
            await following.ask(self._limits.query)
        except BaseException:
            following.close()
            raise
        older, self._next = self._next, following
        if older is not None:
            older.close()

    async def visit(self, times: int) -> list[Server]:
        """Return which servers the name leads to, by `times` connections that are opened one after the other.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: an error of the driver or the operating system.
        """
        servers = []
        for _ in range(times):
            link = await self._open()
            link.close()
            assert link.server is not None, "`Link.open` has found out which server it is"
            servers.append(link.server)
        return servers

    def close(self) -> None:
        """Drop all connections, without waiting for anything."""
        self._drop()
        following, self._next = self._next, None
        if following is not None:
            following.close()

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    async def _connected_link(self) -> Link:
        if self._next is not None:
            self._drop()
            self._link, self._next = self._next, None
            self._link.on_loss(self._lost)
        if self._link is None or not self._link.is_open:
            self._drop()
            self._link = await self._open()
            self._link.on_loss(self._lost)
        return self._link

    async def _open(self) -> Link:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.connect
        try:
            async with asyncio.timeout_at(deadline):
                # asyncpg resolves the name once more, in the event loop's executor. It gets to do so only right after
                # the look-up has succeeded here, so that a name server that hangs does not use up those threads.
                addresses = await self._lookup.addresses()
        except TimeoutError:
            raise TimeoutError(f"its name was not resolved within {self._limits.connect:.3g} s") from None
        try:
            return await self._open_link(deadline, addresses)
        except PooledError:
            self._is_pooled = True
            return await self._open_link(deadline, addresses)
        except TimeoutError as exc:
            raise TimeoutError(str(exc) or f"no answer within {self._limits.connect:.3g} s") from exc

    async def _open_link(self, deadline: float, addresses: frozenset[str]) -> Link:
        return await Link.open(
            self._address,
            self._account,
            connect_timeout=max(deadline - asyncio.get_running_loop().time(), 0.001),
            query_timeout=self._limits.query,
            is_pooled=self._is_pooled,
            addresses=addresses,
            logical=self._logical,
        )


def is_refusal(exc: BaseException) -> bool:
    """Return whether an error tells that a host runs, and refuses the account, as it will at the next try."""
    refusals = (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    )
    return isinstance(exc, refusals)


def is_busy(exc: BaseException) -> bool:
    """Return whether an error tells that a host runs, and takes no connection now: it has too many, or starts up."""
    return isinstance(exc, (asyncpg.InsufficientResourcesError, asyncpg.CannotConnectNowError))


def is_closed_to_all(exc: BaseException) -> bool:
    """Return whether an error tells that a host takes no connection of any client now, as while it starts up."""
    return isinstance(exc, asyncpg.CannotConnectNowError)
