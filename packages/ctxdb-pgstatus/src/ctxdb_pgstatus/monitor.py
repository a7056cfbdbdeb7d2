"""`HostMonitor`: polls every host of a cluster, and answers from memory which is the master and which are in sync."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, TypeVar

from ctxdb_pgstatus._probing.lag import Lag, Sample
from ctxdb_pgstatus._probing.probe import Account
from ctxdb_pgstatus._probing.watch import Pace, Watch
from ctxdb_pgstatus.addresses import HostAddress, parse_hosts
from ctxdb_pgstatus.election import Claim, Election, elect
from ctxdb_pgstatus.errors import OptionError, PgStatusError
from ctxdb_pgstatus.status import ClusterStatus, HostStatus, SyncCondition

__all__ = ["HostMonitor"]

logger = logging.getLogger("ctxdb_pgstatus")

_T = TypeVar("_T")
_HIGHEST_PORT = 65535
# How often a dead host is asked, and all hosts where there is no master: this share of `poll_interval`.
_HASTE = 10
_LONGEST_HASTE_SECONDS = 0.5
_SHORTEST_HASTE_SECONDS = 0.1
# The WAL that is on its way when master and replica are asked at the same time is no lag: this long it may take.
_TRANSIT_SECONDS = 0.02
# What is asked within this time was asked at the same time.
_ROUND_SECONDS = 0.25
_REPLAY_POLL_SECONDS = 0.01

ChangeCallback = Callable[[ClusterStatus, ClusterStatus], object]


class HostMonitor:
    """Knows which PostgreSQL host is the master, and how far the replicas are behind.

    An async context manager. While it is entered, every host is polled over a connection of its own that is kept, each
    by a task of its own, so that one that hangs delays no other. What is known is in `status`, which is replaced as a
    whole; all plain methods answer from it at once. They, and the coroutines too, may be called from any thread and
    event loop.

    A host that ends is noticed by its broken connection at once. One that hangs counts as dead after `max_fails`
    attempts, which take no longer than one `poll_interval` altogether, as long as that leaves 0.2 seconds to each of
    them; until then its last answer stands.

    Args:
        hosts: the hosts of the cluster, each as ``name``, ``name:port``, an IPv4 address, or an IPv6 address; or as a
            `HostAddress`, whose name then is what answers call it.
        port: the port of a host that names none.
        user: the PostgreSQL role to connect as. It needs no privileges; with those of ``pg_monitor`` replicas tell at
            once which timeline they follow after a failover, and else only after their next restartpoint, until when
            they do not count as in sync. They then also warn a monitor that has just been started of an old primary,
            while the new one is away.
        password: its password; without one, libpq's ``PGPASSWORD`` and password file are used.
        database: the database to connect to.
        poll_interval: how often each host is asked, in seconds.
        connect_timeout: how long an attempt may take at most, in seconds.
        max_fails: how many failures in a row make a host a dead one.
        sync_max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        sync_max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
        ssl: as asyncpg takes it: a context, or a mode such as ``"require"``; by default "prefer".

    Attributes:
        status: all that is known.

    Raises:
        HostListError: `hosts` cannot be read.
        OptionError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        hosts: Iterable[str | HostAddress],
        *,
        port: int = 5432,
        user: str,
        password: str | None = None,
        database: str = "postgres",
        poll_interval: float = 5.0,
        connect_timeout: float = 2.0,
        max_fails: int = 3,
        sync_max_lag_ms: int = 1000,
        sync_max_lag_bytes: int = 1_000_000,
        ssl: SSLContext | str | bool | None = None,
    ) -> None:
        _check_number("port", port, 1, _HIGHEST_PORT, whole=True)
        _check_number("poll_interval", poll_interval, 0.01)
        _check_number("connect_timeout", connect_timeout, 0.01)
        _check_number("max_fails", max_fails, 1, whole=True)
        _check_number("sync_max_lag_ms", sync_max_lag_ms, 0, whole=True)
        _check_number("sync_max_lag_bytes", sync_max_lag_bytes, 0, whole=True)
        for name, text in (("user", user), ("database", database)):
            if not text:
                raise OptionError(f"`{name}` is {text!r}: give the name of one.")
        self._addresses = parse_hosts(hosts, port)
        self._account = Account(user, password, database, ssl)
        self._interval = poll_interval
        self._pace = Pace(poll_interval, connect_timeout, max_fails)
        self._max_lag_ms = sync_max_lag_ms
        self._max_lag_bytes = sync_max_lag_bytes
        self._turns: dict[SyncCondition | None, itertools.count[int]] = {
            condition: itertools.count() for condition in (None, "time", "bytes", "time_or_bytes", "time_and_bytes")
        }
        self._callbacks: list[ChangeCallback] = []
        self._changed: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._forget()

    def __repr__(self) -> str:
        status = self.status
        roles = [(host.host, "master" if host.host == status.master else host.role or "dead") for host in status.hosts]
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

    def _choose(self, condition: SyncCondition | None) -> str | None:
        status = self.status
        replicas = status.replicas(condition)
        if not replicas:
            return status.master
        return replicas[next(self._turns[condition]) % len(replicas)].host

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
        found = self._choose_replayed(sync, min_position)
        if found is None and max_wait > 0:
            found = await self._on_own_loop(lambda: self._wait_for_replay(sync, min_position, max_wait))
        return found or self.status.master

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas.

        Raises:
            PgStatusError: the monitor is not running.
        """
        self._running_loop()
        return frozenset(host.host for host in self.status.replicas())

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master after all that happened before the call.

        ``False`` also if `host` does not answer, and so cannot be shown to be the master. Other hosts that have just
        failed are not waited for.

        Raises:
            PgStatusError: the monitor is not running.
        """
        return await self._on_own_loop(lambda: self._confirm_master(host))

    def report_failure(self, host: str) -> None:
        """Have a host asked now, as something failed on it. Does not wait; may be called from any thread."""
        loop = self._loop
        member = self._members.get(host)
        # A dead one is asked often anyway.
        if loop is not None and member is not None and member.watch.alive:
            with contextlib.suppress(RuntimeError):
                # The loop may be closed by now.
                loop.call_soon_threadsafe(member.watch.hurry)

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

        A change is another master, or another life, role, timeline or being in sync of a host; not a position or a lag.

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
            raise PgStatusError("This HostMonitor is running already: enter it once, and share it.")
        self._loop = asyncio.get_running_loop()
        watches = [member.watch for member in self._members.values()]
        self._tasks = [asyncio.create_task(watch.run(), name=f"HostMonitor {watch.address.name}") for watch in watches]
        self._tasks.append(asyncio.create_task(self._run_clock(), name="HostMonitor"))
        try:
            await self._ask(watches)
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
        for member in self._members.values():
            # First, as a query that is cancelled would ask the server to cancel it.
            member.watch.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for future in self._changed:
            if not future.done():
                future.set_exception(PgStatusError("The HostMonitor was closed meanwhile."))
        self._forget()

    def _forget(self) -> None:
        """Know nothing, as before the first poll."""
        self._members = {
            address.name: _Member(Watch(address, self._account, self._pace, self._reported))
            for address in self._addresses
        }
        self._election = Election(None)
        self._highest_timeline = 0
        self._sample: Sample | None = None
        self.status = ClusterStatus(tuple(_dead(member.watch) for member in self._members.values()), None, _now())

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
            raise PgStatusError("This HostMonitor is not running: use it inside of `async with monitor:`.")
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
        await self._ask(living or watches)
        return self.status

    async def _ask(self, watches: Iterable[Watch]) -> None:
        await asyncio.gather(*(watch.ask() for watch in watches))
        # What looks as if it had fallen behind is looked at again before it is said.
        if doubtful := [member for member in self._members.values() if member.doubt is not None]:
            await asyncio.sleep(_TRANSIT_SECONDS)
            await asyncio.gather(*(member.watch.ask() for member in doubtful))

    async def _confirm_master(self, host: str) -> bool:
        asked = self._members.get(host)
        if asked is None:
            return False
        others = [
            member.watch.ask()
            for member in self._members.values()
            if member is not asked and member.watch.alive and not member.watch.failures
        ]
        answered = asked.watch.ask()
        await asyncio.gather(answered, *others)
        return answered.result() and self.status.master == host

    async def _wait_for_replay(self, sync: SyncCondition | None, position: int, max_wait: float) -> str | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait
        while self._loop is loop:
            asked = [self._members[replica.host].watch.ask() for replica in self.status.replicas()]
            if not asked:
                return None
            # One that hangs does not keep from taking another.
            await asyncio.wait(asked, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            found = self._choose_replayed(sync, position)
            left = deadline - loop.time()
            if found is not None or left <= 0:
                return found
            await asyncio.sleep(min(_REPLAY_POLL_SECONDS, left))
        return None

    def _choose_replayed(self, sync: SyncCondition | None, position: int) -> str | None:
        replicas = self._replayed(sync, position)
        return replicas[next(self._turns[sync]) % len(replicas)].host if replicas else None

    def _replayed(self, sync: SyncCondition | None, position: int) -> list[HostStatus]:
        sample = self._sample
        return [
            replica
            for replica in self.status.replicas(sync)
            # Positions of different timelines do not compare.
            if sample is not None
            and replica.timeline == sample.timeline
            and (self._members[replica.host].watch.position or 0) >= position
        ]

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
        """Take in an attempt of one host."""
        if watch.failures == 0 or not watch.alive:
            member = self._members[watch.address.name]
            self._elect()
            answer = watch.answer
            if answer is None or not answer.in_recovery:
                member.forget_lag()
            else:
                self._judge(member)
            if answer is not None and watch.address.name == self._election.master:
                self._take_sample(watch)
        self._publish()

    def _elect(self) -> None:
        answers = {
            name: member.watch.answer for name, member in self._members.items() if member.watch.answer is not None
        }
        for answer in answers.values():
            self._highest_timeline = max(self._highest_timeline, answer.timeline or 0, answer.heard_of or 0)
        claims = [Claim(name, answer.timeline or 0) for name, answer in answers.items() if not answer.in_recovery]
        before = self._election
        election = elect(claims, current=before.master, highest_timeline=self._highest_timeline)
        self._election = election
        self._log_election(before, election)
        if election.master is not None and election.master != before.master:
            # What replicas are compared with is another host's now.
            self._take_sample(self._members[election.master].watch)
            for member in self._members.values():
                if member.watch.answer is not None and member.watch.answer.in_recovery:
                    self._judge(member)

    def _log_election(self, before: Election, now: Election) -> None:
        timeline = self._highest_timeline
        if now.master != before.master:
            extra = {"host": now.master, "before": before.master, "timeline": timeline}
            if now.master is None:
                logger.warning("There is no master any more; it was %s.", before.master, extra=extra)
            else:
                logger.info("The master is %s, on timeline %s.", now.master, timeline, extra=extra)
        if now.rivals and (now.master, now.rivals) != (before.master, before.rivals):
            logger.warning(
                "%s and %s both say that they are the master, on timeline %s; %s is taken for it. Stop the others.",
                now.master,
                ", ".join(now.rivals),
                timeline,
                now.master,
                extra={"host": now.master, "rivals": now.rivals, "timeline": timeline},
            )
        for host in now.stale:
            if host not in before.stale:
                logger.warning(
                    "%s says that it is the master, on a timeline that a promotion has left: it gets no writes. The "
                    "highest timeline seen is %s. Make it a standby; if it is to be the master, promote it.",
                    host,
                    timeline,
                    extra={"host": host, "timeline": timeline},
                )

    def _take_sample(self, watch: Watch) -> None:
        answer = watch.answer
        assert answer is not None
        assert answer.position is not None, "a master has a position"
        self._sample = sample = Sample(answer.timeline or 0, answer.position, answer.asked_at)
        for member in self._members.values():
            replica = member.watch.answer
            # One that was asked long before is not behind because the master has gone on since.
            if replica is not None and replica.in_recovery and replica.asked_at >= sample.at - _ROUND_SECONDS:
                self._judge(member)

    def _judge(self, member: _Member) -> None:
        """Say how far a replica is behind; what is worse than before, only when it is seen again a moment later."""
        answer = member.watch.answer
        sample = self._sample
        doubt = member.doubt
        assert answer is not None
        caught_up = doubt is not None and member.lag.catch_up(answer, doubt)
        milliseconds, size = member.lag.measure(answer, sample)
        by_time = milliseconds is not None and milliseconds <= self._max_lag_ms
        by_bytes = size is not None and size <= self._max_lag_bytes
        worse = (member.in_sync_by_time and not by_time) or (member.in_sync_by_bytes and not by_bytes)
        doubtful = worse or not (member.is_judged or (by_time and by_bytes))
        # Where there is nothing to compare, there is nothing that could be on its way.
        if doubtful and sample is not None and sample.timeline == answer.timeline:
            if doubt is None or caught_up:
                member.doubt = replace(sample, at=max(sample.at, answer.asked_at))
                asyncio.get_running_loop().call_later(_TRANSIT_SECONDS, member.watch.hurry)
                return
            if answer.asked_at < doubt.at + _TRANSIT_SECONDS:
                return
        member.doubt = None
        member.is_judged = sample is not None
        member.lag.milliseconds, member.lag.bytes = milliseconds, size
        member.in_sync_by_time, member.in_sync_by_bytes = by_time, by_bytes

    def _publish(self) -> None:
        old = self.status
        master = self._election.master
        hosts = tuple(member.status(master) for member in self._members.values())
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


class _Member:
    """A host, and how far it is behind if it is a replica."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.forget_lag()

    def forget_lag(self) -> None:
        self.lag = Lag()
        self.in_sync_by_time = False
        self.in_sync_by_bytes = False
        self.is_judged = False
        # What it seems not to have, without being said to lack it; since when.
        self.doubt: Sample | None = None

    def status(self, master: str | None) -> HostStatus:
        watch = self.watch
        answer = watch.answer
        if answer is None:
            return _dead(watch)
        is_master = watch.address.name == master
        return HostStatus(
            host=watch.address.name,
            alive=True,
            role="replica" if answer.in_recovery else "master",
            since=watch.since,
            timeline=answer.timeline,
            position=answer.position,
            lag_ms=0 if is_master else self.lag.milliseconds,
            lag_bytes=0 if is_master else self.lag.bytes,
            error=watch.error,
            in_sync_by_time=is_master or self.in_sync_by_time,
            in_sync_by_bytes=is_master or self.in_sync_by_bytes,
        )


def _dead(watch: Watch) -> HostStatus:
    return HostStatus(host=watch.address.name, alive=False, role=None, since=watch.since, error=watch.error)


def _differ(old: ClusterStatus, new: ClusterStatus) -> bool:
    """Return whether something has changed that is more than a position or a lag."""
    return old.master != new.master or any(
        (a.alive, a.role, a.timeline, a.in_sync_by_time, a.in_sync_by_bytes)
        != (b.alive, b.role, b.timeline, b.in_sync_by_time, b.in_sync_by_bytes)
        for a, b in zip(old.hosts, new.hosts, strict=True)
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _check_number(name: str, value: float, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most or value == math.inf:
        kind = "a whole number" if whole else "a number"
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise OptionError(f"`{name}` is {value!r}: give {kind} {bounds}.")
