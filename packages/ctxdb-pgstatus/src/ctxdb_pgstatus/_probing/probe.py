"""`Probe`: asks one host over a connection that is kept, and renewed before it is too old."""

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

__all__ = ["Probe", "TimeLimits", "is_busy", "is_refusal"]


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long things may take, in seconds.

    Attributes:
        connect: resolving a name, and connecting.
        query: an answer.
        age: how old a connection may get before it is replaced by a new one.
    """

    connect: float
    query: float
    age: float


class Probe:
    """Asks one host.

    Args:
        address: where it is.
        account: as whom to ask.
        limits: how long it may take.
        lost: called when the kept connection has broken, which is when its server has ended.
        logical: what it is asked about logical replication.
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
        # The one that replaces it when the host is asked next: not while a question is under way.
        self._next: Link | None = None
        self._is_pooled = False

    @property
    def is_connected(self) -> bool:
        """Whether the connection that the last answer came by still stands: the server has not restarted since."""
        return self._link is not None and self._link.is_open

    async def ask(self) -> Answer:
        """Ask, connecting first where that is needed.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: whatever the driver and the operating system have to say.
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
        """Open another connection if the kept one is too old, or the name leads elsewhere by now.

        The next question goes over it. If it cannot be had, the kept one stays.

        Args:
            anyway: do so in any case.
            age: how old the kept one may get, in seconds, if that is less than the limit.

        Returns:
            whether there is another one.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: whatever the driver and the operating system have to say.
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
        """Have the next question go over a connection that is opened now. If it cannot be had, the kept one stays.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: whatever the driver and the operating system have to say.
        """
        following = await self._open()
        try:
            # The first answer takes more round trips than later ones: it is not to be taken for a host that hangs.
            await following.ask(self._limits.query)
        except BaseException:
            following.close()
            raise
        older, self._next = self._next, following
        if older is not None:
            older.close()

    async def visit(self, times: int) -> list[Server]:
        """Return which servers the name leads to, by so many connections that are opened one after the other.

        Raises:
            TimeoutError: there was no answer in time.
            Exception: whatever the driver and the operating system have to say.
        """
        servers = []
        for _ in range(times):
            link = await self._open()
            link.close()
            assert link.server is not None, "it was identified"
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
                # The driver resolves the name once more, in the threads that the whole application shares: so only
                # where that has just succeeded.
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
    """Return whether a host is there, and refuses the account: nothing that time would mend."""
    refusals = (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    )
    return isinstance(exc, refusals)


def is_busy(exc: BaseException) -> bool:
    """Return whether a host is there, and takes no connections at the moment: too many, or it starts up."""
    return isinstance(exc, (asyncpg.InsufficientResourcesError, asyncpg.CannotConnectNowError))
