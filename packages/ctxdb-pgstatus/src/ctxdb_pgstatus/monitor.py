"""`HostMonitor`: polls every host of a cluster, and answers from memory which is the master and which are in sync."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, TypeVar

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus._probing.account import Account, Password
from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.judge import TRANSIT_SECONDS, Judge
from ctxdb_pgstatus._probing.link import LogicalRole
from ctxdb_pgstatus._probing.member import Member
from ctxdb_pgstatus._probing.membership import Membership
from ctxdb_pgstatus._probing.pace import Pace
from ctxdb_pgstatus._probing.probe import TimeLimits
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.addresses import HostAddress, parse_hosts
from ctxdb_pgstatus.discovery import DiscoveredHost, HostDiscovery
from ctxdb_pgstatus.election import Claim, Election, elect
from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.source import KnownMaster
from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus, Promotion, SyncCondition

__all__ = ["HostMonitor"]

logger: logging.Logger = logging.getLogger("ctxdb_pgstatus")

_T = TypeVar("_T")
_HIGHEST_PORT = 65535
# How often a dead host is asked, and all hosts where there is no master: this share of `poll_interval`.
_HASTE = 10
_LONGEST_HASTE_SECONDS = 0.5
_SHORTEST_HASTE_SECONDS = 0.1
_REPLAY_POLL_SECONDS = 0.01
# How often hosts are looked for, at most.
_DISCOVERY_SECONDS = 1.0

ChangeCallback = Callable[[ClusterStatus, ClusterStatus], object]


class HostMonitor:
    """Knows which PostgreSQL host is the master, and how far the replicas are behind.

    An async context manager. While it is entered, every host is polled over a connection of its own that is kept, each
    by a task of its own, so that one that hangs delays no other. What is known is in `status`, which is replaced as a
    whole; all plain methods answer from it at once. They, and the coroutines too, may be called from any thread and
    event loop.

    A host that ends is noticed by its broken connection at once. One that hangs counts as dead after `max_fails`
    attempts that have failed, or after a `poll_interval` without an answer, whatever comes first: so within two polls.
    Until then its last answer stands. An attempt goes on for as long as its time-outs allow, so that a distant host is
    reached at any `poll_interval`; one whose answers usually take long is given three times as long before it counts
    as dead. A server that is there, but refuses the monitor (too many connections, a rotated password, starting up) is
    alive, in the role that it had last, and asked less and less often.

    A server is known by its system identifier, its start and its address, and not by its name: names are resolved anew
    while the monitor runs, and connections replaced, and a name that has come to lead to another server is followed. A
    name behind which several servers take turns is told in the log; such a name is never the master.

    Args:
        hosts: the hosts of the cluster, each as ``name``, ``name:port``, an IPv4 address, an IPv6 address, or the
            directory of a Unix socket; or as a `HostAddress`, whose name then is what answers call it. Or what finds
            them, while the monitor runs too: `PatroniDiscovery`, `SRVDiscovery`, `FileDiscovery`, or an object of your
            own.
        port: the port of a host that names none.
        user: the PostgreSQL role to connect as. It needs no privileges; with those of ``pg_monitor`` replicas tell at
            once which timeline they follow after a failover, and else only after their next restartpoint, until when
            they do not count as in sync. They then also warn a monitor that has just been started of an old primary,
            while the new one is away.
        password: its password, or a function (also a coroutine function) that returns the one of the moment, and is
            called for each connection; without one, libpq's ``PGPASSWORD`` and password file (``PGPASSFILE``,
            ``~/.pgpass``) are used.
        database: the database to connect to.
        poll_interval: how often each host is asked, in seconds.
        connect_timeout: how long connecting may take at most, in seconds.
        max_fails: how many failures in a row make a host a dead one.
        sync_max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        sync_max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
        ssl: as asyncpg takes it: a context, or a mode such as ``"require"``; by default "prefer".
        query_timeout: how long an answer may take at most, in seconds; by default as long as `connect_timeout`.
        password_file: a file that holds the password and nothing else, in the place of `password`; read for each
            connection.
        conn_max_age: how old a connection to a host may get before it is replaced, in seconds: so long it may take
            until it is noticed that a name, whose address stays the same, leads to another server. A name whose address
            changes is noticed at the next poll. Where no other host of the list would tell of a promotion, the
            connection is replaced every `poll_interval`, but not more than once a second: if there is one name only,
            and for `conn_max_age` after a primary has lost a standby that may be at none of the names. Within that time
            `confirm_master` asks over connections that are opened after it was called; with 0 it always does.
        nofailover: the hosts that are never promoted. None of them is ever taken for the master, and no commit waits
            for their confirmation: name a slow or distant replica here.
        noloadbalance: the hosts that take no reads.
        subscribers: the hosts that receive the data by logical replication, in `database`. They count as replicas, by
            what they have applied of the master's WAL (`pg_replication_origin_status`, which takes ``GRANT SELECT ON
            pg_replication_origin_status`` and ``GRANT EXECUTE ON FUNCTION pg_show_replication_origin_status()``) and
            have confirmed to its slots, and are never the master.

    Attributes:
        status: all that is known.

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
        _check_number("port", port, 1, _HIGHEST_PORT, whole=True)
        _check_number("poll_interval", poll_interval, 0.01)
        _check_number("connect_timeout", connect_timeout, 0.01)
        if query_timeout is not None:
            _check_number("query_timeout", query_timeout, 0.01)
        _check_number("conn_max_age", conn_max_age, 0)
        _check_number("max_fails", max_fails, 1, whole=True)
        _check_number("sync_max_lag_ms", sync_max_lag_ms, 0, whole=True)
        _check_number("sync_max_lag_bytes", sync_max_lag_bytes, 0, whole=True)
        for name, text in (("user", user), ("database", database)):
            if not text:
                raise errors.OptionError(f"`{name}` is {text!r}: give the name of one.")
        self._discovery: HostDiscovery | None = None
        self._addresses: tuple[HostAddress, ...] = ()
        # Strings have a method `find` as well.
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
        self._turns: dict[SyncCondition | None, itertools.count[int]] = {
            condition: itertools.count() for condition in (None, "time", "bytes", "time_or_bytes", "time_and_bytes")
        }
        self._reader_turns = itertools.count()
        self._callbacks: list[ChangeCallback] = []
        self._changed: set[asyncio.Future[None]] = set()
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
        """Return the master's name; ``None`` if there is none."""
        return self.status.master

    def replica(self) -> str | None:
        """Return a living replica's name, each in its turn; the master's if there is none."""
        return self._choose(None)

    def sync_by_time(self) -> str | None:
        """Return the name of a replica whose lag in time is within the limit, each in its turn; else the master's."""
        return self._choose("time")

    def sync_by_bytes(self) -> str | None:
        """Return the name of a replica whose lag in bytes is within the limit, each in its turn; else the master's."""
        return self._choose("bytes")

    def sync_by_time_or_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by either, each in its turn; else the master's."""
        return self._choose("time_or_bytes")

    def sync_by_time_and_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by both, each in its turn; else the master's."""
        return self._choose("time_and_bytes")

    def hosts(self) -> tuple[HostStatus, ...]:
        """Return what is known of each host, in the order in which they were named."""
        return self.status.hosts

    def replayed(self, position: int) -> frozenset[str]:
        """Return the names of the living replicas that are known to have replayed a WAL position in bytes."""
        return frozenset(replica.host for replica in self._replayed(None, position))

    @staticmethod
    def _in_turn(turns: itertools.count[int], hosts: Sequence[str | HostStatus]) -> str | None:
        if not hosts:
            return None
        host = hosts[next(turns) % len(hosts)]
        return host if isinstance(host, str) else host.host

    def _choose(self, condition: SyncCondition | None) -> str | None:
        status = self.status
        return self._in_turn(self._turns[condition], status.replicas(condition)) or status.master

    # --- a `HostSource` -----------------------------------------------------------------------------------------------

    async def find_master(self) -> str | None:
        """Return the master's name, out of memory; ``None`` if there is none.

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
            sync: by which lag it has to be in sync.
            min_position: a WAL position in bytes that it must have replayed.
            max_wait: how long to wait for one that has replayed `min_position`, in seconds. The replicas are asked
                every 10 milliseconds meanwhile.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()
        if min_position is None:
            return self._choose(sync)
        return (
            await self._find_replayed(
                lambda: self._in_turn(self._turns[sync], self._replayed(sync, min_position)), max_wait
            )
            or self.status.master
        )

    async def find_reader(
        self, rule: ReadRule, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name by a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: what it has to be like.
            min_position: a WAL position in bytes that it must have replayed.
            max_wait: how long to wait for one that has replayed `min_position`, in seconds.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()

        def choose() -> str | None:
            known = self.status.replicas() if min_position is None else self._replayed(None, min_position)
            return self._in_turn(self._reader_turns, rule.best(known))

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

        ``False`` also if `host` does not answer, and so cannot be shown to be the master. Of the others, those are
        waited for that may be the master: not the `nofailover` hosts, those of another cluster, those that have just
        failed, or those whose answer is late (by a share of the poll interval, or three times as long as usual). While
        `host` lacks a standby that it had, late ones are waited for as well: it may be the one that was promoted.

        Raises:
            MasterUncertainError: the name may lead to another server by now, and cannot be connected to anew (see
                `conn_max_age`).
            PgStatusError: the monitor is not running; or `host` is the master as far as is known, and refuses the
                monitor, so that it has to be asked over another connection (see `known_master`).
        """
        return await self._on_own_loop(lambda: self._confirm_master(host))

    def known_master(self) -> KnownMaster | None:
        """Return the master whose server refuses the monitor at the moment; ``None`` if there is no such master.

        Who has a connection to it can ask it whether it still is the master. ``None`` also if the name may lead to
        another server by now (see `conn_max_age`): then a connection from before would ask the wrong one.
        """
        master = self.status.master
        member = None if master is None else self._members[master]
        if member is None or not member.watch.refusals or member.watch.answer is None or self._may_have_moved(member):
            return None
        return KnownMaster(member.watch.address.name, member.watch.answer.timeline)

    def report_failure(self, host: str) -> None:
        """Have a host asked now, as something failed on it. Does not wait; may be called from any thread."""
        loop = self._loop
        member = self._members.get(host)
        # A dead one is asked often anyway.
        if loop is not None and member is not None and member.watch.alive:
            with contextlib.suppress(RuntimeError):
                # The loop may be closed by now.
                loop.call_soon_threadsafe(member.watch.hurry)

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that answers by the name `host`: which server it is.

        ``None`` if that is not known: the monitor has no connection to it at the moment, so that it may have restarted,
        or several servers take turns behind the name.
        """
        member = self._members.get(host)
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
        """Return what a host had replayed when it was promoted last; ``None`` if that was not seen."""
        member = self._members.get(host)
        return None if member is None else member.watch.promotion

    # --- an operator's decisions --------------------------------------------------------------------------------------

    async def accept_lower_timeline(self) -> ClusterStatus:
        """Take what the living hosts say now for the truth, though a higher timeline was seen before.

        For an operator who has undone a promotion, or made the cluster anew in a way that no host tells. It holds once:
        timelines that are seen later count as ever. It is logged as a warning.

        Returns:
            what is known then.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(self._accept_lower_timeline)

    # --- news ---------------------------------------------------------------------------------------------------------

    async def poll(self) -> ClusterStatus:
        """Ask all hosts now, and return what is known then.

        Returns when every host that was alive has answered or failed once, or, if none was, every host. Callers share
        polls, but only such that began after they called.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(self._poll)

    async def wait_for_change(
        self, timeout: float | None = None, *, since: ClusterStatus | None = None
    ) -> ClusterStatus:
        """Wait until something changes, and return what is known then.

        A change is another master, or another life, role, timeline, server, fault or being in sync of a host; not a
        position or a lag.

        Args:
            timeout: how long to wait, in seconds; ``None`` for as long as it takes.
            since: return at once if something has changed from this to now.

        Raises:
            TimeoutError: nothing has changed.
            PgStatusError: the monitor is not running, or is closed meanwhile.
        """
        before = since or self.status
        return await self._on_own_loop(lambda: self._wait_for_change(timeout, before))

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Have ``callback(old, new)`` called at each change (see `wait_for_change`), and return what ends that.

        It is called on the monitor's event loop and must not block; what it raises is logged.
        """
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Begin to poll; returns when each host has answered or failed once. That some cannot be reached is no error.

        Raises:
            PgStatusError: it is running already.
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
            # The first election waits for all of them: it must not depend on which one answers first.
            await asyncio.gather(*(member.watch.ask() for member in self._members.values()))
            self._is_settled = True
            self._elect()
            for member in self._members.values():
                self._compare_subscribers(member)
            self._compare_with_standbys()
            for member in self._replicas():
                answer = member.answer
                assert answer is not None, "it is a replica's"
                self._warn_of_missing_timeline(member.watch.address.name, answer)
                self._judge.judge(member)
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
        members = [member.stop() for member in self._members.values()]
        await asyncio.gather(*tasks, *members, *self._leaving, return_exceptions=True)
        for future in self._changed:
            if not future.done():
                future.set_exception(errors.PgStatusError("The HostMonitor was closed meanwhile."))
        self._forget()

    def _forget(self) -> None:
        """Know nothing, as before the first poll."""
        self._members = {address.name: self._new_member(address) for address in self._addresses}
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_settled = False
        self._membership = Membership()
        self._election = Election(None)
        self._last_master: str | None = None
        self._judge.forget()
        self.status: ClusterStatus = ClusterStatus(
            tuple(member.dead_status() for member in self._members.values()), None, _now()
        )

    def _new_member(self, address: HostAddress) -> Member:
        is_subscriber = address.name in self._subscribers
        logical: LogicalRole = None
        if self._subscribers:
            logical = "subscriber" if is_subscriber else "publisher"
        member = Member(Watch(address, self._account, self._pace, self._limits, self._reported, logical))
        member.is_subscriber = is_subscriber
        return member

    # --- which hosts there are ----------------------------------------------------------------------------------------

    async def _run_discovery(self, discovery: HostDiscovery) -> None:
        while True:
            is_urgent = self.status.master is None
            await asyncio.sleep(_DISCOVERY_SECONDS if is_urgent else max(_DISCOVERY_SECONDS, self._interval))
            await self._discover(discovery)

    async def _discover(self, discovery: HostDiscovery) -> None:
        """Take up the hosts that there are now; those that are known stay if that cannot be found out."""
        try:
            async with asyncio.timeout(self._limits.connect):
                found = await discovery.find()
            parse_hosts([host.address for host in found])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the hosts that are known stay
            problem = str(exc) or type(exc).__name__
            if problem != self._discovery_problem:
                logger.warning("The hosts could not be found; those that are known stay: %s", problem)
            self._discovery_problem = problem
        else:
            self._discovery_problem = None
            self._set_hosts(found)

    def _set_hosts(self, found: Sequence[DiscoveredHost]) -> None:
        """Have these hosts be all that there are."""
        before, self._members = self._members, {}
        for host in found:
            name = host.address.name
            member = before.get(name)
            if member is None or member.watch.address != host.address:
                member = self._new_member(host.address)
            member.takes_reads = not (host.noloadbalance or name in self._noloadbalance)
            member.may_be_promoted = not (host.nofailover or member.is_subscriber or name in self._nofailover)
            self._members[name] = member
            if not member.is_started:
                member.start()
                member.watch.hurry()
                if self._is_settled:
                    logger.info("There is another host: %s.", name, extra={"host": name})
        for member in self._members.values():
            member.watch.renews_at_each_poll = len(self._members) == 1
        for name, member in before.items():
            if self._members.get(name) is not member:
                logger.info("Host %s is not there any more.", name, extra={"host": name})
                task = asyncio.create_task(member.stop())
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        if self._is_settled:
            self._elect()
            self._publish()

    async def _run_clock(self) -> None:
        haste = min(self._interval, max(min(self._interval / _HASTE, _LONGEST_HASTE_SECONDS), _SHORTEST_HASTE_SECONDS))
        loop = asyncio.get_running_loop()
        polled = loop.time()
        while True:
            await asyncio.sleep(haste)
            everyone = self.status.master is None or loop.time() - polled > self._interval - haste / 2
            if everyone:
                polled = loop.time()
            for member in self._members.values():
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
        watches = [member.watch for member in self._members.values()]
        living = [watch for watch in watches if watch.alive]
        for watch in watches:
            watch.hurry()
        await asyncio.gather(*(watch.ask(patient=False) for watch in living or watches))
        await self._confirm_lags()
        return self.status

    async def _confirm_lags(self) -> None:
        """Look again at what looks as if it had fallen behind, before it is said."""
        if doubtful := [member for member in self._members.values() if member.unconfirmed is not None]:
            await asyncio.sleep(TRANSIT_SECONDS)
            await asyncio.gather(*(member.watch.ask(patient=False) for member in doubtful))

    async def _confirm_master(self, host: str) -> bool:
        asked = self._members.get(host)
        if asked is None:
            return False
        candidates = [member for member in self._members.values() if self._may_be_promoted(member, asked)]
        others = {member: member.watch.ask(patient=False) for member in candidates if member.watch.is_responsive}
        answered = asked.watch.ask()
        await asyncio.gather(answered, *others.values())
        if asked.watch.standbys_before_loss:
            # The standby that has left may have been promoted: its answer is waited for, however late it is.
            heard = {member for member, answer in others.items() if answer.result()}
            unheard = [member for member in candidates if member.watch.alive and member not in heard]
            await asyncio.gather(*(member.watch.ask() for member in unheard))
        if self._may_have_moved(asked) and self.status.master == host:
            return await self._confirm_anew(asked)
        if asked.watch.refusals and self.status.master == host:
            raise errors.PgStatusError(f"{host!r} refuses the monitor, and cannot be asked by it: {asked.watch.error}")
        return answered.result() and self.status.master == host

    async def _confirm_anew(self, asked: Member) -> bool:
        """Ask over new connections, and return whether a host is the master after that.

        The kept connections go on to the servers that they were opened to, wherever the names lead by now.
        """
        candidates = [member for member in self._members.values() if self._may_be_promoted(member, asked)]
        others = [member.watch.ask_anew(patient=False) for member in candidates if member.watch.is_responsive]
        answered, *_ = await asyncio.gather(asked.watch.ask_anew(), *others)
        name = asked.watch.address.name
        if not answered and self.status.master == name:
            raise errors.MasterUncertainError(
                f"{name!r} cannot be connected to anew, so that it is not certain that the name still leads to the "
                f"server of the master: {asked.watch.error or 'no new connection could be had'}."
            )
        return answered and self.status.master == name

    def _may_have_moved(self, member: Member) -> bool:
        """Return whether the name of a primary may lead elsewhere by now, with no other host of the list to tell."""
        if self._limits.age == 0:
            return True
        lost_one_of = member.watch.standbys_before_loss
        if not lost_one_of or member.watch.server is None:
            return False
        # Where the list has as many other servers as there were standbys, the one that was promoted is among them.
        servers = [member.watch.server]
        for other in self._members.values():
            server = other.watch.server
            if server is not None and other.watch.address.name not in self._membership.strangers:
                servers += [] if any(map(server.is_run_of, servers)) else [server]
        return len(servers) <= lost_one_of

    def _may_be_promoted(self, member: Member, asked: Member) -> bool:
        """Return whether a host may become the master in the place of `asked`."""
        name, server = member.watch.address.name, member.watch.server
        if member is asked or not member.may_be_promoted or name in self._membership.strangers:
            return False
        # Another name of the same server has nothing else to say.
        return server is None or asked.watch.server is None or not server.is_run_of(asked.watch.server)

    async def _ask_server_of(self, host: str) -> datetime | None:
        member = self._members.get(host)
        if member is not None:
            await member.watch.look_again()
        return self.server_of(host)

    async def _accept_lower_timeline(self) -> ClusterStatus:
        await self._poll()
        self._membership.accept(self._answers(), list(self._members))
        self._elect()
        self._publish()
        return self.status

    async def _find_replayed(self, choose: Callable[[], str | None], max_wait: float) -> str | None:
        """Return what `choose` does, as soon as it returns a host, or there is no more time."""
        found = choose()
        if found is None and max_wait > 0:
            found = await self._on_own_loop(lambda: self._wait_for_replay(choose, max_wait))
        return found

    async def _wait_for_replay(self, choose: Callable[[], str | None], max_wait: float) -> str | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait
        while self._loop is loop:
            asked = [self._members[replica.host].watch.ask(patient=False) for replica in self.status.replicas()]
            if not asked:
                return None
            # One that hangs does not keep from taking another.
            await asyncio.wait(asked, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            found = choose()
            left = deadline - loop.time()
            if found is not None or left <= 0:
                return found
            await asyncio.sleep(min(_REPLAY_POLL_SECONDS, left))
        return None

    def _replayed(self, sync: SyncCondition | None, position: int) -> list[HostStatus]:
        replicas = self.status.replicas(sync)
        return [replica for replica in replicas if self._judge.has_replayed(self._members[replica.host], position)]

    async def _wait_for_change(self, timeout: float | None, since: ClusterStatus) -> ClusterStatus:
        async with asyncio.timeout(timeout):
            while not _differ(since, self.status):
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._changed.add(future)
                try:
                    await future
                finally:
                    self._changed.discard(future)
        return self.status

    # --- what the watches report --------------------------------------------------------------------------------------

    def _reported(self, watch: Watch) -> None:
        """Take in an attempt of one host, or that it has kept silent for too long."""
        if watch.failures == 0 or not watch.alive:
            member = self._members.get(watch.address.name)
            if member is None or member.watch is not watch:
                # It has left the cluster meanwhile.
                return
            member.note_server(watch.server)
            watch.renews_at_each_poll = len(self._members) == 1 or self._may_have_moved(member)
            self._elect()
            self._compare_subscribers(member)
            answer = member.answer
            if answer is None or not answer.in_recovery:
                member.forget_lag()
            elif self._is_settled and not watch.refusals:
                self._warn_of_missing_timeline(watch.address.name, answer)
                self._compare_with_standbys()
                self._judge.judge(member)
            if answer is not None and watch.address.name == self._election.master:
                self._judge.compare_with_master(answer, self._members.values())
        self._publish()

    def _compare_subscribers(self, reported: Member) -> None:
        """Compare subscribers with the master: the one that has reported, or all of them if the master has."""
        master = self._members.get(self._election.master or "")
        publisher = None if master is None else master.answer
        for member in self._members.values():
            if member.is_subscriber and (member is reported or reported is master):
                member.compare_with_publisher(publisher)

    def _warn_of_missing_timeline(self, name: str, answer: Answer) -> None:
        member = self._members[name]
        is_silent = answer.timeline is None and answer.position is not None and not member.is_subscriber
        if is_silent and not member.was_warned_of:
            member.was_warned_of = True
            logger.warning(
                "%s does not tell which timeline it is on, so that it is in sync with nobody: the monitor's user may "
                "read neither the control data nor the WAL receiver's. GRANT pg_monitor TO it, or EXECUTE ON FUNCTION "
                "pg_control_checkpoint(), pg_control_recovery().",
                name,
                extra={"host": name},
            )

    def _replicas(self) -> list[Member]:
        """Return the living hosts that say that they are replicas."""
        answers = [(member, member.answer) for member in self._members.values()]
        return [member for member, answer in answers if answer is not None and answer.in_recovery]

    def _answers(self) -> dict[str, Answer]:
        """Return what each living host of the cluster has said last, subscribers apart."""
        answers = {name: member.answer for name, member in self._members.items() if not member.is_subscriber}
        return {name: answer for name, answer in answers.items() if answer is not None}

    def _elect(self) -> None:
        if not self._is_settled:
            return
        answers = self._answers()
        membership = self._membership
        system = membership.system
        membership.update(answers, list(self._members), self._last_master)
        if membership.system != system:
            self._judge.forget()
        claims = [
            Claim(
                name,
                answer.timeline or 0,
                answer.position or 0,
                answer.standbys,
                answer.takes_writes,
                answer.server,
            )
            for name, answer in answers.items()
            if not answer.in_recovery and self._may_be_elected(name)
        ]
        before = self._election
        election = elect(claims, highest_timeline=membership.highest_timeline)
        self._election = election
        self._log_election(before, election)
        if election.master is not None and election.master != before.master:
            self._last_master = election.master
            # What replicas are compared with is another host's now.
            self._judge.compare_with_master(answers[election.master], self._members.values())
            for member in self._replicas():
                self._judge.judge(member)

    def _may_be_elected(self, name: str) -> bool:
        member = self._members[name]
        if not member.may_be_promoted:
            if not member.was_warned_of:
                member.was_warned_of = True
                logger.warning(
                    "%s says that it is the master, and is one of the `nofailover` hosts: it gets no writes. Take it "
                    "out of them if it is to be the master.",
                    name,
                    extra={"host": name},
                )
            return False
        return name not in self._membership.strangers and not member.watch.has_several_servers

    def _log_election(self, before: Election, now: Election) -> None:
        timeline = self._membership.highest_timeline
        if now.master != before.master:
            extra = {"host": now.master, "before": before.master, "timeline": timeline}
            if now.master is None:
                logger.warning("There is no master any more; it was %s.", before.master, extra=extra)
            else:
                logger.info("The master is %s, on timeline %s.", now.master, timeline, extra=extra)
        if now.rivals and {now.preferred, *now.rivals} != {before.preferred, *before.rivals}:
            logger.warning(
                "%s and %s both say that they are the master, on timeline %s; %s. Stop all but one: by its WAL and its "
                "standbys, %s is the one to keep.",
                now.preferred,
                ", ".join(now.rivals),
                timeline,
                "there is none until one is left" if now.master is None else f"{now.master} alone takes writes",
                now.preferred,
                extra={"host": now.preferred, "rivals": now.rivals, "timeline": timeline},
            )
        for host in now.stale:
            if host not in before.stale:
                logger.warning(
                    "%s says that it is the master, on a timeline that a promotion has left: it gets no writes. The "
                    "highest timeline seen is %s. Make it a standby; if it is to be the master, promote it, or have "
                    "its timeline accepted (`accept_lower_timeline`).",
                    host,
                    timeline,
                    extra={"host": host, "timeline": timeline},
                )

    def _fault_of(self, name: str) -> Fault | None:
        election = self._election
        if name in self._membership.strangers:
            return "stranger"
        if self._members[name].watch.has_several_servers:
            return "shared_name"
        if name in election.rivals or (election.rivals and election.master is None and name == election.preferred):
            return "rival"
        return "stale" if name in election.stale else None

    def _compare_with_standbys(self) -> None:
        if self._election.master is None:
            strangers = self._membership.strangers
            self._judge.compare_with_standbys(
                answer for name, answer in self._answers().items() if name not in strangers
            )

    def _publish(self) -> None:
        old = self.status
        master = self._election.master
        hosts = tuple(member.status(master, self._fault_of(name)) for name, member in self._members.items())
        self.status = new = ClusterStatus(hosts, master, _now())
        if not _differ(old, new):
            return
        for future in self._changed:
            if not future.done():
                future.set_result(None)
        for callback in tuple(self._callbacks):
            try:
                callback(old, new)
            except Exception:
                logger.exception("A callback of HostMonitor.on_change failed.")


def _differ(old: ClusterStatus, new: ClusterStatus) -> bool:
    """Return whether something has changed that is more than a position or a lag."""
    return old.master != new.master or [*map(_features, old.hosts)] != [*map(_features, new.hosts)]


def _features(host: HostStatus) -> tuple[object, ...]:
    return (
        host.host,
        host.alive,
        host.role,
        host.timeline,
        host.in_sync_by_time,
        host.in_sync_by_bytes,
        host.fault,
        host.started_at,
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _check_number(name: str, value: float, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most or value == math.inf:
        kind = "a whole number" if whole else "a number"
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise errors.OptionError(f"`{name}` is {value!r}: give {kind} {bounds}.")
