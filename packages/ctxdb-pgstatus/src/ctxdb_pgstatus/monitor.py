"""`HostMonitor`: polls every host of a cluster, and answers from memory which host is the master.

What the hosts say, and what follows from it, is the work of `_probing`. This module has what applications call: answers
from memory, questions to the hosts, news, and the life of the tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, TypeVar

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus._options import check_name, check_number
from ctxdb_pgstatus._probing.account import Account, Password
from ctxdb_pgstatus._probing.changes import ChangeCallback, Changes
from ctxdb_pgstatus._probing.cluster import Cluster
from ctxdb_pgstatus._probing.judge import TRANSIT_SECONDS, Judge
from ctxdb_pgstatus._probing.link import LogicalRole
from ctxdb_pgstatus._probing.member import Member
from ctxdb_pgstatus._probing.pace import Pace
from ctxdb_pgstatus._probing.probe import TimeLimits
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.addresses import HostAddress, parse_hosts
from ctxdb_pgstatus.discovery import DiscoveredHost, HostDiscovery
from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.source import KnownMaster
from ctxdb_pgstatus.status import SYNC_CONDITIONS, ClusterStatus, HostStatus, Promotion, SyncCondition, responsive

__all__ = ["HostMonitor"]

logger: logging.Logger = logging.getLogger("ctxdb_pgstatus")

_T = TypeVar("_T")
_HIGHEST_PORT = 65535
# A dead host is asked so many times in each `poll_interval`, and so are all hosts while there is no master; the pause
# is within these limits.
_HASTE = 10
_LONGEST_HASTE_SECONDS = 0.5
_SHORTEST_HASTE_SECONDS = 0.1
# The pause between two questions to replicas that a caller waits for.
_REPLAY_POLL_SECONDS = 0.01
# The least time between two calls of `HostDiscovery.find`.
_DISCOVERY_SECONDS = 1.0


class HostMonitor:
    """Knows which PostgreSQL host is the master, and how far the replicas are behind.

    An async context manager. While it is entered, each host is polled by a task of its own, over a connection of its
    own that is kept: so a host that hangs delays no other. All that is known is in `status`, which is replaced as a
    whole, and from which all plain methods answer at once. These methods, and the coroutines as well, may be called
    from any thread and event loop.

    A host that ends is noticed at once, by its broken connection. A host that hangs counts as dead after `max_fails`
    attempts that have failed, or after a `poll_interval` without an answer, whatever comes first: so within two polls.
    Until then, its last answer stands. An attempt goes on for as long as its time-outs allow, so that a distant host is
    reached at any `poll_interval`; a host whose answers usually take long is given three times its usual time before it
    counts as dead. A server that runs, and refuses the monitor (it has too many connections, its password was changed,
    it is starting up), is alive, in the role that it had last, and is asked less and less often. A replica that takes
    no connection at all, as while it is starting up, counts as dead. Replicas whose last poll has failed are read from
    only if there are no others.

    A server is known by its system identifier, its start and its address, and not by its name. While the monitor runs,
    names are resolved anew and connections are replaced, so that a name is followed when it comes to lead to another
    server. If several servers take turns behind one name, the log says so, and that name is never the master.

    Args:
        hosts: the hosts of the cluster, each as ``name``, ``name:port``, an IPv4 address, an IPv6 address, or the
            directory of a Unix socket; or as a `HostAddress`, by whose name answers call the host. Or an object that
            finds the hosts, also later while the monitor runs: `PatroniDiscovery`, `SRVDiscovery`, `FileDiscovery`, or
            a `HostDiscovery` of your own.
        port: the port of a host that names none.
        user: the PostgreSQL role to connect as. It needs no privileges. With those of ``pg_monitor``, replicas tell at
            once which timeline they follow after a failover; without them, only after their next restartpoint, and
            until then they do not count as in sync. With these privileges, replicas also tell a monitor that has just
            been started of a promotion, so that it does not take an old primary for the master while the new one is
            away.
        password: the role's password, or a function (also a coroutine function) that returns the password of the moment
            and is called for each connection. Without a password, libpq's ``PGPASSWORD`` and password file
            (``PGPASSFILE``, ``~/.pgpass``) are used.
        database: the database to connect to.
        poll_interval: how often each host is asked, in seconds.
        connect_timeout: how long connecting may take at most, in seconds.
        max_fails: how many failures in a row make a host a dead one.
        sync_max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        sync_max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
        ssl: the option `ssl` of ``asyncpg.connect``: a context, or a mode such as ``"require"``; by default "prefer".
        query_timeout: how long an answer may take at most, in seconds; by default as long as `connect_timeout`.
        password_file: a file that holds the password and nothing else, in the place of `password`; read for each
            connection.
        conn_max_age: how old a connection to a host may get before it is replaced, in seconds. If a name comes to lead
            to another server while its address stays the same, it takes so long until that is noticed; a change of the
            address is noticed at the next poll. If no other host of the list would tell of a promotion, the connection
            is replaced every `poll_interval`, but not more than once a second: that is so if there is one name only,
            and for `conn_max_age` after a primary has lost a standby that may be at none of the names. Within that time
            `confirm_master` asks over connections that are opened after the call. With 0, it always does.
        nofailover: the hosts that are never promoted. None of them is ever taken for the master, and no commit waits
            for their answers: name a slow or distant replica here.
        noloadbalance: the hosts that take no reads.
        subscribers: the hosts that receive the data by logical replication, in `database`. They count as replicas, and
            are never the master. How far such a host is behind is told by what it has applied of the master's WAL
            (`pg_replication_origin_status`, which takes ``GRANT SELECT ON pg_replication_origin_status`` and ``GRANT
            EXECUTE ON FUNCTION pg_show_replication_origin_status()``) and has confirmed to the master's slots.

    Attributes:
        status: all that is known of the cluster.

    Raises:
        HostListError: `hosts` cannot be read.
        OptionError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        hosts: Iterable[str | HostAddress] | HostDiscovery,
        *,
        port: int = 5432,
        user: str,
        password: Password | None = None,
        database: str = "postgres",
        poll_interval: float = 5.0,
        connect_timeout: float = 2.0,
        max_fails: int = 3,
        sync_max_lag_ms: int = 1000,
        sync_max_lag_bytes: int = 1_000_000,
        ssl: SSLContext | str | bool | None = None,
        query_timeout: float | None = None,
        password_file: str | PathLike[str] | None = None,
        conn_max_age: float = 30.0,
        nofailover: Iterable[str] = (),
        noloadbalance: Iterable[str] = (),
        subscribers: Iterable[str] = (),
    ) -> None:
        check_number("port", port, 1, _HIGHEST_PORT, whole=True)
        check_number("poll_interval", poll_interval, 0.01)
        check_number("connect_timeout", connect_timeout, 0.01)
        if query_timeout is not None:
            check_number("query_timeout", query_timeout, 0.01)
        check_number("conn_max_age", conn_max_age, 0)
        check_number("max_fails", max_fails, 1, whole=True)
        check_number("sync_max_lag_ms", sync_max_lag_ms, 0, whole=True)
        check_number("sync_max_lag_bytes", sync_max_lag_bytes, 0, whole=True)
        check_name("user", user)
        check_name("database", database)
        self._discovery: HostDiscovery | None = None
        self._addresses: tuple[HostAddress, ...] = ()
        # `HostDiscovery` is told by its method `find`, which strings have as well.
        if not isinstance(hosts, str) and isinstance(hosts, HostDiscovery):
            self._discovery = hosts
        else:
            self._addresses = parse_hosts(hosts, port)
        if password is not None and password_file is not None:
            raise errors.OptionError("`password` and `password_file` are both given: give one of them.")
        self._nofailover = self._check_names("nofailover", nofailover)
        self._noloadbalance = self._check_names("noloadbalance", noloadbalance)
        self._subscribers = self._check_names("subscribers", subscribers)
        file = None if password_file is None else Path(password_file)
        self._account = Account(user, password, database, ssl, file)
        self._interval = poll_interval
        self._limits = TimeLimits(connect_timeout, query_timeout or connect_timeout, conn_max_age)
        self._pace = Pace(poll_interval, self._limits.connect + self._limits.query, max_fails)
        self._judge = Judge(sync_max_lag_ms, sync_max_lag_bytes)
        self._turns = {condition: itertools.count() for condition in SYNC_CONDITIONS}
        self._reader_turns = itertools.count()
        self._changes = Changes()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._discovery_problem: str | None = None
        self._forget()

    def _check_names(self, option: str, names: Iterable[str]) -> frozenset[str]:
        if isinstance(names, str):
            raise errors.OptionError(f"`{option}` is the string {names!r}: give a list of hosts.")
        given = frozenset(names)
        unknown = sorted(given - {address.name for address in self._addresses})
        if unknown and self._discovery is None:
            raise errors.OptionError(f"`{option}` names {', '.join(unknown)}: give names as they stand in `hosts`.")
        return given

    def __repr__(self) -> str:
        status = self.status
        roles = [
            (host.host, "master" if host.host == status.master else host.role or ("unknown" if host.alive else "dead"))
            for host in status.hosts
        ]
        return f"<HostMonitor {', '.join(f'{host} ({role})' for host, role in roles)}>"

    # --- answers from memory ------------------------------------------------------------------------------------------

    def master(self) -> str | None:
        """Return the master's name; ``None`` if there is no master."""
        return self.status.master

    def replica(self) -> str | None:
        """Return the name of a living replica, each in its turn; the master's without a replica."""
        return self._choose(None)

    def sync_by_time(self) -> str | None:
        """Return the name of a replica whose lag in time is within the limit, each in its turn; else the master's."""
        return self._choose("time")

    def sync_by_bytes(self) -> str | None:
        """Return the name of a replica whose lag in bytes is within the limit, each in its turn; else the master's."""
        return self._choose("bytes")

    def sync_by_time_or_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by time or by bytes, each in its turn; else the master's."""
        return self._choose("time_or_bytes")

    def sync_by_time_and_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by time and by bytes, each in its turn; else the master's."""
        return self._choose("time_and_bytes")

    def hosts(self) -> tuple[HostStatus, ...]:
        """Return the status of each host, in the order in which they were named."""
        return self.status.hosts

    def replayed(self, position: int) -> frozenset[str]:
        """Return the names of the living replicas that are known to have replayed a WAL position in bytes."""
        return frozenset(replica.host for replica in self._cluster.replayed(self.status.replicas(), position))

    @staticmethod
    def _in_turn(turns: itertools.count[int], hosts: Sequence[str | HostStatus]) -> str | None:
        if not hosts:
            return None
        host = hosts[next(turns) % len(hosts)]
        return host if isinstance(host, str) else host.host

    def _choose(self, condition: SyncCondition | None) -> str | None:
        status = self.status
        return self._in_turn(self._turns[condition], responsive(status.replicas(condition))) or status.master

    # --- a `HostSource` -----------------------------------------------------------------------------------------------

    async def find_master(self) -> str | None:
        """Return the master's name, out of memory; ``None`` if there is no master.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()
        return self.status.master

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name, each in its turn; the master's if no replica will do; ``None`` without a master.

        Args:
            sync: by which lag the replica has to be in sync.
            min_position: a WAL position in bytes that the replica must have replayed.
            max_wait: how long to wait for a replica that has replayed `min_position`, in seconds. The replicas are
                asked every 10 milliseconds meanwhile.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()
        if min_position is None:
            return self._choose(sync)

        def choose() -> str | None:
            replayed = self._cluster.replayed(self.status.replicas(sync), min_position)
            return self._in_turn(self._turns[sync], replayed)

        return await self._find_replayed(choose, max_wait) or self.status.master

    async def find_reader(
        self, rule: ReadRule, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return the name of a replica that suits a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: which replicas will do.
            min_position: a WAL position in bytes that the replica must have replayed.
            max_wait: how long to wait for a replica that has replayed `min_position`, in seconds.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()

        def choose() -> str | None:
            replicas: Sequence[HostStatus] = self.status.replicas()
            if min_position is not None:
                replicas = self._cluster.replayed(replicas, min_position)
            return self._in_turn(self._reader_turns, rule.best(replicas))

        found = await self._find_replayed(choose, 0.0 if min_position is None else max_wait)
        return self.status.master if found is None and rule.fallback else found

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()
        return frozenset(host.host for host in self.status.replicas())

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master after all that happened before the call.

        ``False`` also if `host` does not answer until it counts as dead, and so cannot be shown to be the master. Of
        the other hosts, the answers of those that may be the master are waited for: not those of the `nofailover`
        hosts, of hosts of another cluster, of hosts that have just failed, or of hosts whose answer is late (by a share
        of the poll interval, or by three times their usual time). While `host` lacks a standby that it had, late hosts,
        and those that have refused the monitor, are waited for as well: one of these may be the standby that was
        promoted.

        Raises:
            MasterUncertainError: the name may lead to another server by now, and no new connection could be opened that
                would tell (see `conn_max_age`).
            PgStatusError: the monitor is not running; or `host` is the master as far as is known, and refuses the
                monitor, so that only a caller who has a connection to it can ask it (see `known_master`).
        """
        return await self._on_own_loop(lambda: self._confirm_master(host))

    def known_master(self) -> KnownMaster | None:
        """Return the master if its server refuses the monitor at the moment; else ``None``.

        A caller who has a connection to that server can ask it whether it still is a primary. ``None`` also if the name
        may lead to another server by now (see `conn_max_age`): then an older connection would ask the wrong server.
        """
        master = self.status.master
        member = None if master is None else self._cluster.members.get(master)
        if member is None or self._cluster.may_have_moved(member):
            return None
        watch = member.watch
        if not watch.refusals or watch.answer is None:
            return None
        return KnownMaster(watch.address.name, watch.answer.timeline)

    def report_failure(self, host: str) -> None:
        """Have a host asked now, as something failed on it. Does not wait; may be called from any thread."""
        loop = self._loop
        member = self._cluster.members.get(host)
        # A dead host is asked often anyway.
        if loop is not None and member is not None and member.watch.alive:
            with contextlib.suppress(RuntimeError):
                # The loop may be closed by now.
                loop.call_soon_threadsafe(member.watch.hurry)

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that answers by the name `host`.

        ``None`` if that is not known: if the monitor has no connection to the server at the moment, so that it may have
        been restarted; or if several servers take turns behind the name.
        """
        member = self._cluster.members.get(host)
        if member is None or not member.watch.has_same_server or member.watch.server is None:
            return None
        return member.watch.server.started_at

    async def ask_server_of(self, host: str) -> datetime | None:
        """Ask one host over a new connection, and return what `server_of` does after that.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(lambda: self._ask_server_of(host))

    async def promotion_of(self, host: str) -> Promotion | None:
        """Return how much a host had replayed when it was promoted last; ``None`` if the monitor has not seen that."""
        member = self._cluster.members.get(host)
        return None if member is None else member.watch.promotion

    # --- an operator's decisions --------------------------------------------------------------------------------------

    async def accept_lower_timeline(self) -> ClusterStatus:
        """Accept what the living hosts say now, though a higher timeline was seen before.

        This is for an operator who has undone a promotion, or made the cluster anew in a way that no host tells. It
        holds for the present only: timelines that are seen later count as ever. A warning is logged.

        Returns:
            the status after that.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(self._accept_lower_timeline)

    # --- news ---------------------------------------------------------------------------------------------------------

    async def poll(self) -> ClusterStatus:
        """Ask all hosts now, and return the status after that.

        Returns when every host that was alive has answered or failed once; if no host was alive, when every host has.
        Callers share a poll, but only one that begins after all of them have called.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(self._poll)

    async def wait_for_change(
        self, timeout: float | None = None, *, since: ClusterStatus | None = None
    ) -> ClusterStatus:
        """Wait until the status changes, and return the new status.

        A change is another master; or that a host dies or comes back, has another role, timeline, server or fault, or
        is in sync or no longer so. Positions and lags do not count.

        Args:
            timeout: how long to wait, in seconds; ``None`` for as long as it takes.
            since: an earlier status. If the present status differs from that, it is returned at once.

        Raises:
            TimeoutError: the status has not changed.
            PgStatusError: the monitor is not running, or was closed meanwhile.
        """
        before = since or self.status
        return await self._on_own_loop(lambda: self._changes.wait(timeout, before, lambda: self.status))

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Have ``callback(old, new)`` called at each change (see `wait_for_change`); return a function that ends this.

        The callback is called on the monitor's event loop and must not block. An error that it raises is logged.
        """
        return self._changes.on_change(callback)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Begin to poll. Returns when each host has answered or failed once; a host that cannot be reached is no error.

        Raises:
            PgStatusError: the monitor is running already.
        """
        if self._loop is not None:
            raise errors.PgStatusError("This HostMonitor is running already: enter it once, and share it.")
        self._loop = asyncio.get_running_loop()
        try:
            if self._discovery is None:
                self._set_hosts([DiscoveredHost(address) for address in self._addresses])
            else:
                await self._discover(self._discovery)
                self._tasks.append(asyncio.create_task(self._run_discovery(self._discovery), name="HostMonitor hosts"))
            self._tasks.append(asyncio.create_task(self._run_clock(), name="HostMonitor"))
            # The first election waits for all hosts, as it must not depend on which of them answers first.
            await asyncio.gather(*(member.watch.ask() for member in self._cluster.members.values()))
            self._cluster.settle()
            self._publish()
            await self._confirm_lags()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """End all tasks and connections."""
        self._loop = None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for member in self._cluster.members.values():
            tasks += member.stop()
        try:
            await asyncio.gather(*tasks, *self._leaving, return_exceptions=True)
        finally:
            self._changes.end(lambda: errors.PgStatusError("The HostMonitor was closed while a change was waited for."))
            self._forget()

    def _forget(self) -> None:
        """Forget all that is known, as before the first poll."""
        self._judge.forget()
        self._cluster = Cluster(self._judge, self._limits.age, self._publish)
        self._cluster.members = {address.name: self._new_member(address) for address in self._addresses}
        self._leaving: set[asyncio.Task[None]] = set()
        self.status: ClusterStatus = ClusterStatus(
            tuple(member.dead_status() for member in self._cluster.members.values()), None, _now()
        )

    def _new_member(self, address: HostAddress) -> Member:
        is_subscriber = address.name in self._subscribers
        logical: LogicalRole = None
        if self._subscribers:
            logical = "subscriber" if is_subscriber else "publisher"
        member = Member(Watch(address, self._account, self._pace, self._limits, self._cluster.reported, logical))
        member.is_subscriber = is_subscriber
        return member

    # --- which hosts there are ----------------------------------------------------------------------------------------

    async def _run_discovery(self, discovery: HostDiscovery) -> None:
        while True:
            is_urgent = self.status.master is None
            await asyncio.sleep(_DISCOVERY_SECONDS if is_urgent else max(_DISCOVERY_SECONDS, self._interval))
            await self._discover(discovery)

    async def _discover(self, discovery: HostDiscovery) -> None:
        """Find the hosts of the cluster. If they cannot be found, the hosts that are known stay."""
        try:
            async with asyncio.timeout(self._limits.connect):
                found = await discovery.find()
            parse_hosts([host.address for host in found])
        except Exception as exc:  # noqa: BLE001 - whatever the error is, the hosts that are known stay
            problem = str(exc) or type(exc).__name__
            if problem != self._discovery_problem:
                logger.warning("The hosts could not be found; the hosts that are known stay: %s", problem)
            self._discovery_problem = problem
        else:
            self._discovery_problem = None
            self._set_hosts(found)

    def _set_hosts(self, found: Sequence[DiscoveredHost]) -> None:
        """Watch the hosts that were found, and stop watching all others."""
        before, self._cluster.members = self._cluster.members, {}
        for host in found:
            name = host.address.name
            member = before.get(name)
            if member is None or member.watch.address != host.address:
                member = self._new_member(host.address)
            member.takes_reads = not (host.noloadbalance or name in self._noloadbalance)
            member.may_be_promoted = not (host.nofailover or member.is_subscriber or name in self._nofailover)
            self._cluster.members[name] = member
            if not member.is_started:
                member.start()
                member.watch.hurry()
                if self._cluster.is_settled:
                    logger.info("Host %s has joined the list of hosts.", name, extra={"host": name})
        for member in self._cluster.members.values():
            member.watch.renews_at_each_poll = len(self._cluster.members) == 1
        for name, member in before.items():
            if self._cluster.members.get(name) is not member:
                logger.info("Host %s has left the list of hosts.", name, extra={"host": name})
                for task in member.stop():
                    self._leaving.add(task)
                    task.add_done_callback(self._leaving.discard)
        if self._cluster.is_settled:
            self._cluster.elect()
            self._publish()

    async def _run_clock(self) -> None:
        """Have all hosts asked every `poll_interval`; dead hosts, and all hosts without a master, more often."""
        haste = min(self._interval, max(min(self._interval / _HASTE, _LONGEST_HASTE_SECONDS), _SHORTEST_HASTE_SECONDS))
        loop = asyncio.get_running_loop()
        polled = loop.time()
        while True:
            await asyncio.sleep(haste)
            everyone = self.status.master is None or loop.time() - polled > self._interval - haste / 2
            if everyone:
                polled = loop.time()
            for member in self._cluster.members.values():
                if everyone or not member.watch.alive:
                    member.watch.hurry()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is None or loop.is_closed():
            raise errors.PgStatusError("This HostMonitor is not running: use it inside of `async with monitor:`.")
        return loop

    async def _on_own_loop(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        loop = self._running_loop()
        if loop is asyncio.get_running_loop():
            return await work()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), loop))

    # --- on the monitor's own loop ------------------------------------------------------------------------------------

    async def _poll(self) -> ClusterStatus:
        watches = [member.watch for member in self._cluster.members.values()]
        living = [watch for watch in watches if watch.alive]
        for watch in watches:
            watch.hurry()
        await asyncio.gather(*(watch.ask(patient=False) for watch in living or watches))
        await self._confirm_lags()
        return self.status

    async def _confirm_lags(self) -> None:
        """Ask each replica again that seems to have fallen behind (see `Judge.judge`)."""
        if unconfirmed := [member for member in self._cluster.members.values() if member.unconfirmed is not None]:
            await asyncio.sleep(TRANSIT_SECONDS)
            await asyncio.gather(*(member.watch.ask(patient=False) for member in unconfirmed))

    async def _confirm_master(self, host: str) -> bool:
        cluster = self._cluster
        is_master = await self._ask_for_master(host)
        while not is_master and self.status.master == host and self._is_watched(host):
            # The attempt has failed, and the host is not dead: a kept connection may break while its host is well. The
            # host may have answered a later attempt already, while other hosts were waited for.
            is_master = await self._ask_for_master(host)
        if not is_master and (self._loop is None or self._cluster is not cluster):
            # The end of the monitor has cut the questions off, and has forgotten who the master is.
            raise errors.PgStatusError(f"The HostMonitor was closed while {host!r} was asked whether it is the master.")
        return is_master

    def _is_watched(self, host: str) -> bool:
        member = self._cluster.members.get(host)
        return member is not None and not member.watch.is_over

    async def _ask_for_master(self, host: str) -> bool:
        asked = self._cluster.members.get(host)
        if asked is None:
            return False
        candidates = [member for member in self._cluster.members.values() if self._cluster.may_take_over(member, asked)]
        others = {member: member.watch.ask(patient=False) for member in candidates if member.watch.is_responsive}
        answered = asked.watch.ask()
        await asyncio.gather(answered, *others.values())
        if asked.watch.standbys_before_loss:
            # The standby that has left its primary may have been promoted. Its answer is waited for, however late it
            # is, and also if it has refused the monitor, as one does that is no hot standby.
            heard = {member for member, answer in others.items() if answer.result()}
            unheard = [member for member in candidates if member.watch.alive and member not in heard]
            await asyncio.gather(*(member.watch.ask(insist=True) for member in unheard))
        if self._cluster.may_have_moved(asked) and self.status.master == host:
            return await self._confirm_anew(asked)
        if asked.watch.refusals and self.status.master == host:
            raise errors.PgStatusError(f"{host!r} refuses the monitor, and cannot be asked by it: {asked.watch.error}")
        return answered.result() and self.status.master == host

    async def _confirm_anew(self, asked: Member) -> bool:
        """Ask over new connections, and return whether the host `asked` is the master after that.

        A kept connection leads to the server to which it was opened, wherever the name leads by now.
        """
        candidates = [member for member in self._cluster.members.values() if self._cluster.may_take_over(member, asked)]
        others = [member.watch.ask_anew(patient=False) for member in candidates if member.watch.is_responsive]
        answered, *_ = await asyncio.gather(asked.watch.ask_anew(), *others)
        name = asked.watch.address.name
        if not answered and self.status.master == name:
            raise errors.MasterUncertainError(
                f"No new connection to {name!r} could be opened, so that the name may not lead to the server of the "
                f"master any more: {asked.watch.error or 'see the log, at the level of debug'}."
            )
        return answered and self.status.master == name

    async def _ask_server_of(self, host: str) -> datetime | None:
        member = self._cluster.members.get(host)
        if member is not None:
            await member.watch.look_again()
        return self.server_of(host)

    async def _accept_lower_timeline(self) -> ClusterStatus:
        await self._poll()
        self._cluster.membership.accept(self._cluster.answers(), list(self._cluster.members))
        self._cluster.elect()
        self._publish()
        return self.status

    async def _find_replayed(self, choose: Callable[[], str | None], max_wait: float) -> str | None:
        """Return the first host that `choose` returns, or ``None`` when `max_wait` is over."""
        found = choose()
        if found is None and max_wait > 0:
            found = await self._on_own_loop(lambda: self._wait_for_replay(choose, max_wait))
        return found

    async def _wait_for_replay(self, choose: Callable[[], str | None], max_wait: float) -> str | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait
        while self._loop is loop:
            asked = [self._cluster.members[replica.host].watch.ask(patient=False) for replica in self.status.replicas()]
            if not asked:
                return None
            # A replica that hangs does not keep the caller from taking another one.
            await asyncio.wait(asked, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            found = choose()
            left = deadline - loop.time()
            if found is not None or left <= 0:
                return found
            await asyncio.sleep(min(_REPLAY_POLL_SECONDS, left))
        return None

    def _publish(self) -> None:
        """Put the status together anew, and tell of changes."""
        old, self.status = self.status, ClusterStatus(self._cluster.statuses(), self._cluster.master, _now())
        self._changes.tell(old, self.status)


def _now() -> datetime:
    return datetime.now(UTC)
