"""`follow_master` and `follow_replica`: have the sessions of a `DBConnect` go to the master, or to replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import TypeAlias
from weakref import WeakSet, ref

from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core import DBConnect
from ctxdb_core.adapters import LostCommit
from ctxdb_pgstatus._commit_guard import CommitGuard
from ctxdb_pgstatus._following.engine import FollowedEngine
from ctxdb_pgstatus._following.positions import (
    UNKNOWN_POSITION,
    Positions,
    knows_timeline,
    learn_timeline,
    positions_wanted,
    want_positions,
)
from ctxdb_pgstatus._options import check_seconds, check_source, is_number
from ctxdb_pgstatus.errors import NoMasterError, NoReplicaError, OptionError, PgStatusError
from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.source import HostSource, KnowsPromotions, KnowsServers, ReadsByRule
from ctxdb_pgstatus.status import SYNC_CONDITIONS, SyncCondition

__all__ = ["FollowHandler", "follow_master", "follow_replica"]

FollowHandler: TypeAlias = Callable[[DBConnect], Awaitable[None]]
"""A ``before_create_session_handler`` of `DBConnect`."""

# After the master was last read from in the place of a replica, connections to it are kept for so long.
_FALLBACK_SECONDS = 30.0


def follow_master(
    source: HostSource,
    *,
    confirm_commits: bool = True,
    confirm_timeout: float = 5.0,
    connect_timeout: float = 5.0,
) -> FollowHandler:
    """Return a ``before_create_session_handler`` by which the sessions of a `DBConnect` go to the master.

    Without a master, sessions fail at once, also those that are waiting for a connection. When the master changes, a
    session that has no transaction open moves to the new master; its events go on naming the host that it was made for.
    Connections to a host that has died, or that wrongly says that it is the master, are cut off.

    A commit that is made past SQLAlchemy, by a DBAPI connection's own ``commit`` for instance, is not confirmed.

    Args:
        source: knows the master: a ``HostMonitor``, for instance.
        confirm_commits: whether `source` is asked, after each commit that may have written something, whether the host
            is still the master. Commits that wait for the answer at the same time share one question.
        confirm_timeout: how many seconds the answer may take.
        connect_timeout: how many seconds it may take to open a connection.

    Raises:
        OptionError: `source` knows no hosts, or a number of seconds is not positive.
    """
    check_source(source)
    check_seconds("confirm_timeout", confirm_timeout)
    check_seconds("connect_timeout", connect_timeout)
    guard = CommitGuard(source, confirm=confirm_commits, timeout=confirm_timeout)
    return _MasterFollower(source, guard, connect_timeout)


def follow_replica(
    source: HostSource,
    sync: SyncCondition | None = None,
    *,
    wait: float = 0.1,
    connect_timeout: float = 5.0,
    max_lag_ms: int | None = None,
    max_lag_bytes: int | None = None,
    near: Callable[[str], int] | None = None,
    fallback: bool = True,
) -> FollowHandler:
    """Return a ``before_create_session_handler`` by which the sessions of a `DBConnect` go to replicas, in turn.

    The connections to all living replicas are kept. While no replica will do, the master is read from; without
    `fallback`, `NoReplicaError` is raised instead.

    Code that has written through a `follow_master` on the same source reads what it has written. That holds also for a
    session in the middle of a transaction: the transaction goes on on another host, or raises `StaleReaderError` if it
    cannot. A transaction with a snapshot of its own ("REPEATABLE READ") keeps that snapshot.

    Args:
        source: knows the replicas: a ``HostMonitor``, for instance.
        sync: by which lag a replica has to be in sync; by default, every living replica will do.
        wait: how many seconds to wait for a replica that has replayed what the running code has written, before the
            master is read from instead.
        connect_timeout: how many seconds it may take to open a connection.
        max_lag_ms: up to which lag in milliseconds a replica will do, in the place of the source's own limit. Without
            `sync`, this is a condition of its own.
        max_lag_bytes: up to which lag in bytes a replica will do, likewise.
        near: returns how far a host is. Of the replicas that will do, the nearest are read from. ``Locality.distance``
            tells distances by data centres and regions.
        fallback: whether the master is read from where no replica will do. Without that, the master is spared the load
            of replicas that fail or lag.

    Raises:
        OptionError: `source` knows no hosts, `sync` is no such condition, a number is out of its range, or the source
            can find replicas by `sync` alone while a rule asks for more.
    """
    check_source(source)
    if sync not in SYNC_CONDITIONS:
        raise OptionError(f"`sync` is {sync!r}: give 'time', 'bytes', 'time_or_bytes', 'time_and_bytes' or None.")
    if not is_number(wait) or not wait >= 0:
        raise OptionError(f"`wait` is {wait!r}: give seconds, 0 or more.")
    check_seconds("connect_timeout", connect_timeout)
    for name, limit in (("max_lag_ms", max_lag_ms), ("max_lag_bytes", max_lag_bytes)):
        if limit is not None and not (is_number(limit) and limit >= 0):
            raise OptionError(f"`{name}` is {limit!r}: give a number, 0 or more, or None.")
    if near is not None and not callable(near):
        raise OptionError(f"`near` is {near!r}: give a function that is given a host, and returns how far it is.")
    rule = ReadRule(sync, max_lag_ms, max_lag_bytes, near, fallback)
    if not rule.is_plain and not isinstance(source, ReadsByRule):
        raise OptionError(
            f"{type(source).__name__} finds replicas by `sync` alone: leave `max_lag_ms`, `max_lag_bytes`, `near` and "
            "`fallback` out, or give it a method `find_reader` (see `ReadsByRule`)."
        )
    want_positions(source)
    return _ReplicaFollower(source, rule, wait, connect_timeout)


class _Follower:
    """A ``before_create_session_handler``: what following the master and following replicas have in common."""

    def __init__(self, source: HostSource, guard: CommitGuard | None, connect_timeout: float) -> None:
        self.source = source
        self.guard = guard
        self.connect_timeout = connect_timeout
        self.servers: KnowsServers | None = source if isinstance(source, KnowsServers) else None
        self._dbs: WeakSet[DBConnect] = WeakSet()
        self._engines: WeakSet[FollowedEngine] = WeakSet()

    async def __call__(self, db: DBConnect) -> None:
        """Have the next session of `db` go to the right host."""
        await self.choose(db, None)

    async def choose(self, db: DBConnect, positions: Positions | None) -> FollowedEngine | None:
        """Change the host of `db` to the right one, and return its engine on this event loop.

        Args:
            db: the database whose sessions follow.
            positions: the positions of the running code, if the caller has them at hand.

        Returns:
            the engine; ``None`` if this is the engine of a test's `shared_transaction`, which follows no host.

        Raises:
            NoMasterError, NoReplicaError: no host will do.
        """
        raise NotImplementedError

    def is_fit(self, host: str, positions: Positions, server: datetime | None = None) -> bool:
        """Return whether `host` has replayed what the running code has written (see `Follower`)."""
        raise NotImplementedError

    async def review(self) -> None:
        """Have each engine leave its host if sessions must not go there any more, or return to it if they may again."""
        in_use, alive = await self._hosts()
        for engine in list(self._engines):
            if engine.host in in_use:
                engine.return_to_host()
            else:
                engine.leave(abort=engine.host not in alive)

    async def _note_no_host(self) -> None:
        """Do what is to be done before a session is told that there is no host for it."""
        # Sessions that wait for a connection to an old host are told by this that they wait in vain.
        await self.review()
        # Code that tries again without a pause waits for nothing else: the monitor has to get its turn.
        await asyncio.sleep(0)

    def report_failure(self, host: str) -> None:
        """Have the source ask a host now, as something has failed on it."""
        self.source.report_failure(host)

    async def has_seen(self, host: str, lost: LostCommit) -> bool:
        """Return whether `host` had replayed at least all of a transaction but its commit when it was promoted.

        Then the host knows the transaction's identifier, and has not given it to another transaction: it can tell
        whether the transaction was committed. `lost.position` is in the WAL of `lost.timeline`: only a promotion that
        has left this very timeline can be compared with it.
        """
        promotion = await self.source.promotion_of(host) if isinstance(self.source, KnowsPromotions) else None
        return (
            promotion is not None
            and promotion.timeline == int(lost.timeline, 16)
            and promotion.position >= lost.position
        )

    def forget_position(self, host: str, positions: Positions) -> None:
        """Forget how far `host` has replayed, so that it is asked anew before the running code reads from it."""
        positions.see_on(self.source, host, -1, None)

    def no_server(self, host: str) -> PgStatusError:
        """Return the error for a host of which each connection leads to another server than the source knows."""
        raise NotImplementedError

    async def _hosts(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the hosts that sessions may go to, and the hosts whose open connections may be used to their end."""
        raise NotImplementedError

    def _accompany(self, db: DBConnect) -> None:
        """Follow all engines of `db`, now and in the future."""
        if db not in self._dbs:
            self._dbs.add(db)
            db.on_engine(partial(self._follow, ref(db)))

    def _follow(self, db: ref[DBConnect], host: str, engine: AsyncEngine) -> None:
        # In a test's `shared_transaction`, all sessions are on one connection, which must stay where it is.
        if engine.dialect.driver != "shared" and FollowedEngine.of(engine.sync_engine) is None:
            self._engines.add(FollowedEngine(engine, host, db, self))


class _MasterFollower(_Follower):
    async def choose(self, db: DBConnect, positions: Positions | None) -> FollowedEngine | None:
        self._accompany(db)
        while True:
            host = await self.source.find_master()
            if host is None:
                await self._note_no_host()
                raise NoMasterError(
                    "The cluster has no master at the moment. Answer 503 and let the client try again: the next "
                    "session after an election goes to the new master."
                )
            if host != db.host:
                # `change_host` closes the idle connections to the old host. If that is dead, its connections have to be
                # cut off before, as the close would wait for the host.
                await self.review()
                await db.change_host(host)
            engine = FollowedEngine.of((await db.engine()).sync_engine)
            if engine is None or engine.host == host:
                break
        if engine is not None:
            engine.return_to_host()
            if positions is None and positions_wanted(self.source):
                Positions.of_task()
        return engine

    def is_fit(self, host: str, positions: Positions, server: datetime | None = None) -> bool:
        return True

    def no_server(self, host: str) -> PgStatusError:
        return NoMasterError(
            f"Several servers take turns behind the name {host!r}, so that a connection cannot be told to lead to the "
            "master. Name each server by a name of its own."
        )

    async def _hosts(self) -> tuple[frozenset[str], frozenset[str]]:
        master = await self.source.find_master()
        masters = frozenset(() if master is None else (master,))
        return masters, masters | await self.source.find_replicas()


class _ReplicaFollower(_Follower):
    def __init__(self, source: HostSource, rule: ReadRule, wait: float, connect_timeout: float) -> None:
        super().__init__(source, None, connect_timeout)
        self._rule = rule
        self._wait = wait
        self._fallback: str | None = None
        self._fallback_until = 0.0

    async def choose(self, db: DBConnect, positions: Positions | None) -> FollowedEngine | None:
        self._accompany(db)
        if positions is None:
            positions = Positions.of_task()
        while True:
            position = positions.required(self.source)
            wait = positions.wait_for(self.source)
            if position is not None and not knows_timeline(self.source, timeline := positions.timeline(self.source)):
                await self._learn_timeline(timeline)
            host = await self._find(position, self._wait if wait is None else wait)
            if host is None:
                await self._note_no_host()
                missing = "answers" if position is None else "that answers has what this code has written"
                if not self._rule.fallback:
                    missing = "is a replica that will do"
                raise NoReplicaError(
                    f"No host of the cluster {missing} at the moment. Answer 503 and let the client try again."
                )
            replicas = await self.source.find_replicas()
            keep = replicas
            if self._fallback is not None or (host not in replicas and replicas):
                keep = self._with_fallback(host, replicas)
            if db.host is not None and db.host != host and db.host not in keep:
                await self.review()
            await db.change_host(host, keep)
            engine = FollowedEngine.of((await db.engine()).sync_engine)
            if engine is None or engine.host == host:
                break
        if engine is not None:
            engine.return_to_host()
            if position is not None:
                server = None if self.servers is None else self.servers.server_of(host)
                positions.see_on(self.source, host, position, server)
        return engine

    async def _learn_timeline(self, timeline: int) -> None:
        """Have the hosts asked, as a client has brought a write along whose timeline the source may not know yet.

        Another process has made that write, behind a promotion. A replica of the older timeline may have replayed a
        higher position all the same, of other WAL; and the old master is not the host to read from.
        """
        source = self.source
        try:
            host = await source.find_master() or next(iter(await source.find_replicas()), None)
            if host is not None:
                await source.confirm_master(host)
        except Exception:  # noqa: BLE001 - the source cannot tell: the next read has it asked again
            return
        learn_timeline(source, timeline)

    async def _find(self, position: int | None, wait: float) -> str | None:
        if position == UNKNOWN_POSITION:
            wait = 0.0
        rule, source = self._rule, self.source
        if not rule.is_plain:
            assert isinstance(source, ReadsByRule), "it was checked when the handler was made"
            return await source.find_reader(rule, min_position=position, max_wait=wait)
        if position is None:
            return await source.find_replica(rule.sync)
        return await source.find_replica(rule.sync, min_position=position, max_wait=wait)

    def _with_fallback(self, host: str, replicas: frozenset[str]) -> frozenset[str]:
        """Return the hosts whose connections are kept: `replicas`, and the master if it was read from a while ago.

        Replicas that lag leave some reads to the master now and then. Without this, the connections to the master would
        be closed after each of them.
        """
        now = asyncio.get_running_loop().time()
        if host not in replicas and replicas:
            self._fallback, self._fallback_until = host, now + _FALLBACK_SECONDS
        elif now > self._fallback_until:
            self._fallback = None
        return replicas if self._fallback is None else replicas | {self._fallback}

    def is_fit(self, host: str, positions: Positions, server: datetime | None = None) -> bool:
        return positions.is_seen_on(self.source, host, server)

    def no_server(self, host: str) -> PgStatusError:
        return NoReplicaError(
            f"Several servers take turns behind the name {host!r}, so that a connection cannot be told to lead to a "
            "server that has what this code has written before. Name each server by a name of its own."
        )

    async def _hosts(self) -> tuple[frozenset[str], frozenset[str]]:
        master = await self.source.find_master()
        alive = await self.source.find_replicas()
        if master is not None:
            alive |= {master}
        return alive, alive
