"""`Watch`: asks one host again and again, and knows it by its answers and its silence."""

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
from ctxdb_pgstatus._probing.probe import Probe, TimeLimits, is_busy, is_closed_to_all, is_refusal
from ctxdb_pgstatus.addresses import HostAddress
from ctxdb_pgstatus.status import Promotion

__all__ = ["Watch"]

logger = logging.getLogger("ctxdb_pgstatus")

# The usual duration of an answer is the duration of the last one, or this share of the usual duration before, whatever
# is longer: so one short answer among long ones changes little.
_MEMORY = 0.9
# Several servers may take turns behind one name, behind a load balancer for instance. How many connections are opened
# to notice that, after the name has led to another server; and how many at each later renewal, to notice that it has
# ended.
_FIRST_VISITS = 3
_LATER_VISITS = 6
# The least time between two look-ups of the name, or renewals of the connection.
_LOOKUP_SECONDS = 1.0
# The least time between two connections that are opened by `look_again`.
_LOOK_AGAIN_SECONDS = 0.5


class Watch:
    """The task that asks one host, and what is known of the host.

    `run` makes an attempt to ask the host whenever that is due (`hurry`, `ask`). Beside it, two other tasks open
    connections: the upkeep replaces an old connection and looks how many servers are behind the name; `ask_anew` opens
    a connection for callers who have to know where the name leads now.

    Args:
        address: where the host is.
        account: the role and the database to connect by.
        pace: how soon to ask again, and after how much silence the host counts as dead.
        limits: how long the parts of an attempt may take.
        report: called after each attempt, before the callers that wait for the attempt go on; and when the host has
            been silent for too long.
        logical: what the host is asked about logical replication.

    Attributes:
        address: where the host is.
        alive: whether the host answers, or has failed less than `max_fails` times since its last answer, or runs and
            refuses the monitor.
        answer: the host's last answer; ``None`` if the host is not alive, or has not answered since the monitor began.
        previous: the answer before that one, if it was one of the same run of the server; else ``None``.
        failures: how many attempts have failed since the last answer.
        refusals: how often in a row the server has refused the monitor, and so shown that it runs.
        server: the server that answered last.
        has_several_servers: whether several servers take turns behind the name.
        renews_at_each_poll: whether the connection is replaced at each poll. The monitor sets this if no other host
            would tell of a promotion by which the name comes to lead to another server.
        promotion: how much of its former timeline the host had replayed when it left that; ``None`` if that was not
            seen.
        error: the message of the last failure, without secrets.
        since: the time from which on the host has been dead, or alive in its role.
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
        self.previous: Answer | None = None
        self.failures = 0
        self.refusals = 0
        self.server: Server | None = None
        self.has_several_servers = False
        self.renews_at_each_poll = False
        self.promotion: Promotion | None = None
        self.error: str | None = None
        self.since = datetime.now(UTC)
        self._account = account
        self._pace = pace
        self._report = report
        self._probe = Probe(address, account, limits, self.hurry, logical)
        self._is_over = False
        self._due = asyncio.Event()
        self._waiting: list[asyncio.Future[bool]] = []
        self._impatient: list[asyncio.Future[bool]] = []
        # The last answer, also if the host has died since.
        self._last: Answer | None = None
        # The timeline of the last answer, and how much of it the host had replayed.
        self._replayed: Promotion | None = None
        # How many seconds an attempt usually takes: over an open connection (True), and with connecting (False).
        self._usual = {True: 0.0, False: 0.0}
        # Whether the present attempt is late.
        self._is_late = False
        # When the first attempt began that has not been followed by an answer, and the timer that ends its silence.
        self._silent_since: float | None = None
        self._silence: Deadline | None = None
        # Until this time, a server that has refused the monitor is not asked again.
        self._not_before = 0.0
        # Whether the name has come to lead to another server, so that the next upkeep has to look for more of them.
        self._has_moved = False
        self._upkeep: asyncio.Task[None] | None = None
        self._upkeep_at = 0.0
        self._look_again_at = 0.0
        # The task of `ask_anew` that opens a connection, and the task that is going to do so after it.
        self._opening: asyncio.Task[bool] | None = None
        self._opening_next: asyncio.Task[bool] | None = None
        # How many standbys a primary had before it lost one of them, and when it lost that one.
        self._standbys_before = 0
        self._standby_lost_at = 0.0
        self._longest_loss = limits.age

    @property
    def is_over(self) -> bool:
        """Whether the host is asked no more, so that `ask` tells nothing of it."""
        return self._is_over

    @property
    def has_same_server(self) -> bool:
        """Whether the next question goes to the server that gave the last answer, and was not restarted since."""
        return self._probe.is_connected and not self.has_several_servers

    @property
    def is_responsive(self) -> bool:
        """Whether the last attempt was answered, and the present one is not late."""
        return self.alive and not self.failures and not self.refusals and not self._is_late

    @property
    def standbys_before_loss(self) -> int:
        """How many standbys this primary had before it lost one that has not come back; 0 if it has lost none of late.

        A standby that is promoted leaves its primary before it takes writes. So a name that always leads to the primary
        may come to lead to another server after such a loss, and not without one.
        """
        is_recent = time.monotonic() - self._standby_lost_at < self._longest_loss
        return self._standbys_before if is_recent else 0

    def hurry(self) -> None:
        """Have the host asked now, or right after the attempt that is under way."""
        self._due.set()

    def ask(self, *, patient: bool = True, insist: bool = False) -> asyncio.Future[bool]:
        """Have the host asked now, or right after the attempt that is under way.

        Callers that ask while an attempt is under way share the next attempt.

        Args:
            patient: whether to wait for as long as the attempt takes. Else the future is done when the answer is late,
                as if the attempt had failed.
            insist: whether a server that has refused the monitor a moment ago is asked as well.

        Returns:
            a future, which tells whether an attempt that began after this call was answered. After `close`, it is done.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._is_over:
            future.set_result(False)
            return future
        self._waiting.append(future)
        if insist:
            self._not_before = 0.0
        if not patient:
            self._impatient.append(future)
            if self._is_late:
                # The attempt that is under way is late, and the next one cannot begin before its end.
                future.set_result(False)
        self._due.set()
        return future

    async def run(self) -> None:
        """Ask the host whenever that is due, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while not self._is_over:
                await self._due.wait()
                self._due.clear()
                if self.refusals and loop.time() < self._not_before:
                    _resolve(self._take_waiting(), result=False)
                    continue
                try:
                    await self._attempt()
                except Exception:
                    # An attempt handles all that a driver may raise. A defect in this package must not end the task.
                    logger.exception("Polling %s failed.", self.address.name, extra={"host": self.address.name})
        finally:
            self.close()
            self._stop_silence()
            _resolve(self._take_waiting(), result=False)
            openings = [task for task in (self._upkeep, self._opening, self._opening_next) if task is not None]
            for task in openings:
                task.cancel()
            try:
                if openings:
                    await asyncio.wait(openings)
            finally:
                # The tasks may have opened connections after the first `close`.
                self.close()

    async def look_again(self) -> None:
        """Have the host asked over a new connection, and look whether several servers are behind its name."""
        if self.has_several_servers or not self.is_responsive:
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
        """Have the host asked over a connection that is opened after this call; return whether that was answered.

        Callers share a connection, but only one that is opened after all of them called. If no connection can be
        opened, that does not count as a failure of the host: the kept connection stays.

        Args:
            patient: whether to wait for as long as that takes, and not only for as long as it usually takes.
        """
        if self._is_over:
            return False
        opening = self._opening_next
        if opening is None:
            opening = self._opening_next = asyncio.create_task(
                self._ask_anew(self._opening), name=f"HostMonitor {self.address.name}, anew"
            )
        await asyncio.wait([opening], timeout=None if patient else self._pace.patience(self._usual[False]))
        return opening.done() and not opening.cancelled() and opening.result()

    async def _ask_anew(self, before: asyncio.Task[bool] | None) -> bool:
        # An eager task (Python 3.12) takes its first step before it is `_opening_next`, and before others have called.
        await (asyncio.sleep(0) if before is None else asyncio.wait([before]))
        self._opening, self._opening_next = self._opening_next, None
        try:
            await self._probe.replace()
        except Exception:
            logger.debug("No new connection to %s could be opened.", self.address.name, exc_info=True)
            return False
        return await self.ask()

    def close(self) -> None:
        """Drop the connections, so that an attempt that waits for an answer ends, and open no further ones."""
        self._is_over = True
        self._probe.close()

    # --- an attempt ---------------------------------------------------------------------------------------------------

    async def _attempt(self) -> None:
        loop = asyncio.get_running_loop()
        waiting = self._take_waiting()
        impatient, self._impatient = self._impatient, []
        start = loop.time()
        was_connected = self._probe.is_connected
        usual = self._usual[was_connected]
        self._start_silence(start, usual)
        late = Deadline(start + self._pace.patience(usual), partial(self._give_up_on_late_answer, impatient))
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

    def _give_up_on_late_answer(self, impatient: list[asyncio.Future[bool]]) -> None:
        self._is_late = True
        _resolve([*impatient, *self._impatient], result=False)

    def _start_silence(self, start: float, usual: float) -> None:
        """Begin the silence of the host, unless it has begun: if the silence lasts for too long, the host is dead."""
        if self._silent_since is None:
            self._silent_since = start
            limit = self._pace.silence(usual)
            self._silence = Deadline(start + limit, partial(self._die_of_silence, limit))

    def _stop_silence(self) -> None:
        self._silent_since = None
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _die_of_silence(self, limit: float) -> None:
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
        self._stop_silence()
        self._note_promotion(self._last, answer)
        self._note_standbys(self._last, answer)
        self.previous = self._last if self._last is not None and _is_one_run(self._last, answer) else None
        self.answer = self._last = answer
        self.failures = self.refusals = 0
        self._note_server(answer.server)
        if not self.alive or before is None or before.in_recovery != answer.in_recovery:
            self.alive = True
            self.since = datetime.now(UTC)
            role = "replica" if answer.in_recovery else "master"
            extra = {"host": self.address.name, "role": role, "timeline": answer.timeline}
            logger.info("Host %s answers: it is a %s.", self.address.name, role, extra=extra)

    def _note_promotion(self, before: Answer | None, now: Answer) -> None:
        """Remember how much of a timeline the host had replayed when it left that for another one."""
        if before is None or not _is_one_run(before, now):
            # A promotion does not restart a server: another run, or another server behind the name, begins anew.
            self._replayed = self.promotion = None
        if now.timeline is None:
            return
        if self._replayed is not None and self._replayed.timeline < now.timeline:
            self.promotion = self._replayed
        if now.in_recovery and now.position is not None:
            # Only a standby replays. In the middle of its promotion, a server is still in recovery, and on its new
            # timeline already: so this is noted after the comparison.
            self._replayed = Promotion(now.timeline, now.position)

    def _note_standbys(self, before: Answer | None, now: Answer) -> None:
        """Remember that a primary has lost a standby, until it has as many standbys as before again."""
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
        # A replica that starts up, for minutes if there is much to replay, serves no reader: there are other hosts. A
        # primary that does so has no other host to write to, and will be the master again.
        is_closed_replica = is_closed_to_all(exc) and self._last is not None and self._last.in_recovery
        if (refuses or busy) and not is_closed_replica:
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
        """Note that the server runs: the host is alive, in the role that it had last."""
        self._stop_silence()
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

    def _note_server(self, server: Server | None) -> None:
        """Note which server has answered, and look for more of them if the name leads to another one than before."""
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
        """Start the upkeep, at most once in `_LOOKUP_SECONDS`."""
        now = asyncio.get_running_loop().time()
        if self.is_responsive and now >= self._upkeep_at:
            self._upkeep_at = now + _LOOKUP_SECONDS
            self._start_upkeep()

    def _start_upkeep(self, *, anyway: bool = False) -> None:
        if not self._is_over and (self._upkeep is None or self._upkeep.done()):
            self._upkeep = asyncio.create_task(
                self._look_after_connection(anyway=anyway), name=f"HostMonitor {self.address.name}, upkeep"
            )

    async def _look_after_connection(self, *, anyway: bool) -> None:
        """Replace the connection if it is too old or the name leads elsewhere, and look how many servers are behind it.

        An error here does not count as a failure of the host: the kept connection stays.

        Args:
            anyway: whether the connection is replaced in any case.
        """
        try:
            age = self._pace.interval if self.renews_at_each_poll else None
            renewed = await self._probe.renew(anyway=anyway, age=age)
            if renewed:
                await self.ask()
            visits = _FIRST_VISITS if anyway or self._has_moved else 0
            if renewed and self.has_several_servers:
                visits = _LATER_VISITS
            self._has_moved = False
            if visits:
                self._note_servers_behind_name(await self._probe.visit(visits))
        except Exception:
            logger.debug("The connection to %s could not be renewed.", self.address.name, exc_info=True)

    def _note_servers_behind_name(self, servers: list[Server]) -> None:
        name = self.address.name
        kept = self.server
        others = {str(each) for each in servers if kept is None or not each.is_run_of(kept)}
        if others and not self.has_several_servers:
            self.has_several_servers = True
            extra = {"host": name, "servers": sorted(others | {str(kept)})}
            logger.warning(
                "Several servers take turns behind the name %s: %s. A connection may lead to any of them, so this name "
                "is never taken for the master, nor for a replica that has replayed a position. Name each server by a "
                "name of its own.",
                name,
                "; ".join(sorted(others | {str(kept)})),
                extra=extra,
            )
            self._report(self)
        elif self.has_several_servers and not others:
            self.has_several_servers = False
            logger.info("Only one server is behind the name %s again: %s.", name, kept, extra={"host": name})
            self._report(self)


def _is_one_run(before: Answer, now: Answer) -> bool:
    return before.server is not None and now.server is not None and now.server.is_run_of(before.server)


def _resolve(futures: list[asyncio.Future[bool]], *, result: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(result)
