"""One host, watched: when it is asked, and from when on a silence counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from ctxdb_pgstatus._probing.account import Account
from ctxdb_pgstatus._probing.answer import Answer, Server
from ctxdb_pgstatus._probing.deadline import Deadline
from ctxdb_pgstatus._probing.link import LogicalRole
from ctxdb_pgstatus._probing.pace import Pace
from ctxdb_pgstatus._probing.probe import Probe, TimeLimits, is_busy, is_refusal
from ctxdb_pgstatus.addresses import HostAddress
from ctxdb_pgstatus.status import Promotion

__all__ = ["Watch"]

logger = logging.getLogger("ctxdb_pgstatus")

# The usual duration of an answer is that of the last one, or this share of the usual one before it, if that is
# longer.
_MEMORY = 0.9
# How many new connections are opened to see whether several servers take turns behind a name, once it has led to
# another server; and how many are opened at each renewal, to see whether they still do.
_FIRST_VISITS = 3
_LATER_VISITS = 6
# Names are resolved no more often than this: name servers are asked for a while after they were wrong, too.
_LOOKUP_SECONDS = 1.0
# Nor is another connection opened more often because somebody asks where the name leads.
_LOOK_AGAIN_SECONDS = 0.5


class Watch:
    """What is known of one host, and the task that asks it.

    Args:
        address: where the host is.
        account: as whom to ask it.
        pace: how soon to ask again.
        limits: how long the parts of an attempt may take.
        report: called after each attempt, before those who wait for it go on; and when a silence has become too long.
        logical: what the host is asked about logical replication.

    Attributes:
        address: where the host is.
        alive: whether it answers, or has failed less than `max_fails` times since it did, or is there and refuses the
            monitor.
        answer: what it said last; ``None`` if it is not alive, or has said nothing since the monitor began.
        failures: how many attempts have failed since the last answer.
        refusals: how often in a row its server has refused the monitor, and so shown that it is there.
        server: which server answered last.
        is_shared: whether several servers take turns behind its name.
        is_unaided: whether no other host tells if its name comes to lead to another server: the connection is then
            renewed at each poll.
        promotion: what it had replayed of the timeline that it has left, if that was seen.
        error: what the last failure was, without secrets.
        since: since when it has been alive or not, in its role.
    """

    def __init__(
        self,
        address: HostAddress,
        account: Account,
        pace: Pace,
        limits: TimeLimits,
        report: Callable[[Watch], None],
        logical: LogicalRole = None,
    ) -> None:
        self.address = address
        self.alive = False
        self.answer: Answer | None = None
        self.failures = 0
        self.refusals = 0
        self.server: Server | None = None
        self.is_shared = False
        self.is_unaided = False
        self.promotion: Promotion | None = None
        self.error: str | None = None
        self.since = datetime.now(UTC)
        self._account = account
        self._pace = pace
        self._report = report
        self._probe = Probe(address, account, limits, self.hurry, logical)
        self._due = asyncio.Event()
        self._waiting: list[asyncio.Future[bool]] = []
        self._impatient: list[asyncio.Future[bool]] = []
        # What it said last, also if it has been dead since.
        self._last: Answer | None = None
        # Up to where it had replayed its timeline then.
        self._replayed: Promotion | None = None
        # How long answers take, over a connection that is there and over one that is not.
        self._usual = {True: 0.0, False: 0.0}
        self._is_late = False
        # Since when it has been asked without an answer.
        self._silent_since: float | None = None
        self._silence: Deadline | None = None
        # Until when a server that has refused the monitor is left in peace.
        self._not_before = 0.0
        # Whether its name has come to lead to another server, and whether it is the only one is to be looked at.
        self._has_moved = False
        self._upkeep: asyncio.Task[None] | None = None
        self._upkeep_at = 0.0
        self._look_again_at = 0.0
        # The connection that `ask_anew` opens, and the one that it opens next.
        self._opening: asyncio.Task[bool] | None = None
        self._opening_next: asyncio.Task[bool] | None = None
        # How many standbys it had before it lost one, and when that was.
        self._standbys_before = 0
        self._standby_lost_at = 0.0
        self._longest_loss = limits.age

    @property
    def is_certain(self) -> bool:
        """Whether the next question goes to the server that has answered: it has not been restarted since."""
        return self._probe.is_connected and not self.is_shared

    @property
    def is_sound(self) -> bool:
        """Whether its last answer came, and the next one is not late."""
        return self.alive and not self.failures and not self.refusals and not self._is_late

    @property
    def standbys_before_loss(self) -> int:
        """How many standbys this primary had before it lost one that has not come back; 0 if it has lost none of late.

        A standby that is promoted leaves its primary before it takes writes. So if the name of the primary may follow
        the role, this is when it may come to lead elsewhere.
        """
        is_recent = time.monotonic() - self._standby_lost_at < self._longest_loss
        return self._standbys_before if is_recent else 0

    def hurry(self) -> None:
        """Have it asked now, or right after the attempt that is under way."""
        self._due.set()

    def ask(self, *, patient: bool = True) -> asyncio.Future[bool]:
        """Have it asked now; the future tells whether an attempt that began after this call was answered.

        Whoever asks while an attempt is under way shares the next one.

        Args:
            patient: whether to wait for as long as the attempt takes, and not only for as long as answers usually take.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if not patient:
            self._impatient.append(future)
            if self._is_late:
                # The next attempt cannot begin before the one that is late.
                future.set_result(False)
        self._due.set()
        return future

    async def run(self) -> None:
        """Ask whenever it is due, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                if self.refusals and loop.time() < self._not_before:
                    _resolve(self._take_waiting(), result=False)
                    continue
                try:
                    await self._attempt()
                except Exception:
                    # Whatever it is, the next poll may do better.
                    logger.exception("Polling %s failed.", self.address.name, extra={"host": self.address.name})
        finally:
            self._disarm()
            self._probe.close()
            _resolve(self._take_waiting(), result=False)
            openings = [task for task in (self._upkeep, self._opening, self._opening_next) if task is not None]
            for task in openings:
                task.cancel()
            if openings:
                await asyncio.wait(openings)
                # They may have opened connections meanwhile.
                self._probe.close()

    async def look_again(self) -> None:
        """Have it asked over a new connection, and look whether several servers are behind its name."""
        if self.is_shared or not self.is_sound:
            return
        if self._upkeep is not None and not self._upkeep.done():
            await asyncio.wait([self._upkeep])
        now = asyncio.get_running_loop().time()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LOOK_AGAIN_SECONDS
        self._start_upkeep(anyway=True)
        if self._upkeep is not None:
            await asyncio.wait([self._upkeep])

    async def ask_anew(self, *, patient: bool = True) -> bool:
        """Have it asked over a connection that is opened after this call; return whether that was answered.

        Callers share connections, but only such that are opened after they called. If none can be had, that is no
        failure of the host: the connection that there is stays.

        Args:
            patient: whether to wait for as long as that takes, and not only for as long as it usually takes.
        """
        opening = self._opening_next
        if opening is None:
            opening = self._opening_next = asyncio.create_task(
                self._ask_anew(self._opening), name=f"HostMonitor {self.address.name}, anew"
            )
        await asyncio.wait([opening], timeout=None if patient else self._pace.patience(self._usual[False]))
        return opening.done() and not opening.cancelled() and opening.result()

    async def _ask_anew(self, before: asyncio.Task[bool] | None) -> bool:
        if before is not None:
            await asyncio.wait([before])
        self._opening, self._opening_next = self._opening_next, None
        try:
            await self._probe.replace()
        except Exception:
            logger.debug("There is no new connection to %s.", self.address.name, exc_info=True)
            return False
        return await self.ask()

    def close(self) -> None:
        """Drop the connection, so that what waits for an answer ends."""
        self._probe.close()

    # --- an attempt ---------------------------------------------------------------------------------------------------

    async def _attempt(self) -> None:
        loop = asyncio.get_running_loop()
        waiting = self._take_waiting()
        impatient, self._impatient = self._impatient, []
        start = loop.time()
        was_connected = self._probe.is_connected
        usual = self._usual[was_connected]
        self._arm(start, usual)
        late = Deadline(start + self._pace.patience(usual), partial(self._be_late, impatient))
        answered = False
        try:
            try:
                answer = await self._probe.ask()
            except Exception as exc:  # noqa: BLE001 - whatever a driver raises, the host did not answer
                self._failed(exc)
            else:
                answered = True
                self._usual[was_connected] = max(loop.time() - start, usual * _MEMORY)
                self._answered(answer)
            self._report(self)
        finally:
            late.cancel()
            self._is_late = False
            _resolve(waiting, result=answered)
        self._keep_up()
        if 0 < self.failures < self._pace.max_fails:
            await asyncio.sleep(self._pace.pause(self.failures, loop.time() - start))
            self._due.set()

    def _take_waiting(self) -> list[asyncio.Future[bool]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def _be_late(self, impatient: list[asyncio.Future[bool]]) -> None:
        self._is_late = True
        _resolve([*impatient, *self._impatient], result=False)

    def _arm(self, start: float, usual: float) -> None:
        """Have it counted as dead if it keeps silent for too long."""
        if self._silent_since is None:
            self._silent_since = start
            limit = self._pace.silence(usual)
            self._silence = Deadline(start + limit, partial(self._fall_silent, limit))

    def _disarm(self) -> None:
        self._silent_since = None
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _fall_silent(self, limit: float) -> None:
        self._silence = None
        if self.alive:
            self.error = f"no answer within {limit:.3g} s"
            self._die()
            self._report(self)

    def _die(self) -> None:
        self.alive = False
        self.answer = None
        self.refusals = 0
        self.since = datetime.now(UTC)
        name = self.address.name
        extra = {"host": name, "error": self.error, "failures": self.failures}
        logger.warning("Host %s does not answer any more: %s", name, self.error, extra=extra)

    def _answered(self, answer: Answer) -> None:
        before = self.answer
        self._disarm()
        self._note_promotion(self._last, answer)
        self._note_standbys(self._last, answer)
        self.answer = self._last = answer
        self.failures = self.refusals = 0
        self._meet(answer.server)
        if not self.alive or before is None or before.in_recovery != answer.in_recovery:
            self.alive = True
            self.since = datetime.now(UTC)
            role = "replica" if answer.in_recovery else "master"
            extra = {"host": self.address.name, "role": role, "timeline": answer.timeline}
            logger.info("Host %s answers: it is a %s.", self.address.name, role, extra=extra)

    def _note_promotion(self, before: Answer | None, now: Answer) -> None:
        """Remember up to where it had replayed the timeline that it has left: by its promotion, or by another's."""
        if before is None or not _is_one_run(before, now):
            # A server is promoted while it runs. Another one behind the same name has not replayed what this one has.
            self._replayed = self.promotion = None
        if now.timeline is None:
            return
        if self._replayed is not None and self._replayed.timeline < now.timeline:
            self.promotion = self._replayed
        if now.in_recovery and now.position is not None:
            # In the middle of its promotion, a server is in recovery on its new timeline.
            self._replayed = Promotion(now.timeline, now.position)

    def _note_standbys(self, before: Answer | None, now: Answer) -> None:
        """Remember that a primary has lost a standby, until as many are there again."""
        if before is None or before.in_recovery or now.in_recovery or not _is_one_run(before, now):
            self._standbys_before = 0
        elif now.standbys < before.standbys:
            self._standbys_before = max(before.standbys, self.standbys_before_loss)
            self._standby_lost_at = time.monotonic()
        elif now.standbys >= self._standbys_before:
            self._standbys_before = 0

    def _failed(self, exc: Exception) -> None:
        name = self.address.name
        before, self.error = self.error, self._describe(exc)
        refuses, busy = is_refusal(exc), is_busy(exc)
        first = self.failures == 0 and self.refusals == 0
        if refuses or busy:
            self._refused(busy=busy)
            if first or self.error != before:
                extra = {"host": name, "error": self.error, "failures": self.refusals}
                logger.error("Host %s refuses the monitor: %s", name, self.error, extra=extra)
            return
        self.refusals = 0
        self.failures += 1
        if self.failures < self._pace.max_fails:
            return
        if self.alive:
            self._die()
        elif self.failures == self._pace.max_fails and self._last is None:
            extra = {"host": name, "error": self.error, "failures": self.failures}
            logger.warning("Host %s does not answer: %s", name, self.error, extra=extra)

    def _refused(self, *, busy: bool) -> None:
        """Note that its server is there: alive, in the role that it had last."""
        self._disarm()
        loop = asyncio.get_running_loop()
        self.failures = 0
        self.refusals += 1
        seconds = self._pace.back_off(self.refusals, is_busy=busy)
        self._not_before = loop.time() + seconds
        loop.call_at(self._not_before, self.hurry)
        if not self.alive:
            self.alive = True
            self.answer = self._last
            self.since = datetime.now(UTC)

    def _describe(self, exc: Exception) -> str:
        account = self._account
        text = str(exc) or type(exc).__name__
        if is_refusal(exc):
            text = f"{text}: check the monitor's user ({account.user}), password and database ({account.database})"
        return account.mask(text)

    # --- which server it is -------------------------------------------------------------------------------------------

    def _meet(self, server: Server | None) -> None:
        """Take in which server has answered."""
        before, self.server = self.server, server
        if before is None or server is None or server.is_run_of(before):
            return
        name = self.address.name
        extra = {"host": name, "server": str(server), "before": str(before)}
        if server.is_restart_of(before):
            logger.info("The server of host %s has restarted.", name, extra=extra)
            return
        logger.info("The name %s leads to another server now: %s; before: %s.", name, server, before, extra=extra)
        self._has_moved = True
        self._start_upkeep()

    def _keep_up(self) -> None:
        """Renew the connection if it is too old, or if the name leads elsewhere by now."""
        now = asyncio.get_running_loop().time()
        if self.is_sound and now >= self._upkeep_at:
            self._upkeep_at = now + _LOOKUP_SECONDS
            self._start_upkeep()

    def _start_upkeep(self, *, anyway: bool = False) -> None:
        if self._upkeep is None or self._upkeep.done():
            self._upkeep = asyncio.create_task(
                self._look_after(anyway=anyway), name=f"HostMonitor {self.address.name}, upkeep"
            )

    async def _look_after(self, *, anyway: bool) -> None:
        """Renew the connection, and look how many servers are behind the name.

        What goes wrong here is no failure of the host: the connection that there is stays.
        """
        try:
            age = self._pace.interval if self.is_unaided else None
            renewed = await self._probe.renew(anyway=anyway, age=age)
            if renewed:
                await self.ask()
            visits = _FIRST_VISITS if anyway or self._has_moved else 0
            if renewed and self.is_shared:
                visits = _LATER_VISITS
            self._has_moved = False
            if visits:
                self._tell_servers(await self._probe.visit(visits))
        except Exception:
            logger.debug("The connection to %s could not be renewed.", self.address.name, exc_info=True)

    def _tell_servers(self, servers: list[Server]) -> None:
        name = self.address.name
        kept = self.server
        others = {str(each) for each in servers if kept is None or not each.is_run_of(kept)}
        if others and not self.is_shared:
            self.is_shared = True
            extra = {"host": name, "servers": sorted(others | {str(kept)})}
            logger.warning(
                "Several servers take turns behind the name %s: %s. It cannot be told which one a connection gets: the "
                "name is never taken for the master, nor for a replica that has replayed a position. Name each server "
                "by a name of its own.",
                name,
                "; ".join(sorted(others | {str(kept)})),
                extra=extra,
            )
            self._report(self)
        elif self.is_shared and not others:
            self.is_shared = False
            logger.info("One server is behind the name %s again: %s.", name, kept, extra={"host": name})
            self._report(self)


def _is_one_run(before: Answer, now: Answer) -> bool:
    return before.server is not None and now.server is not None and now.server.is_run_of(before.server)


def _resolve(futures: list[asyncio.Future[bool]], *, result: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(result)
