"""One host, watched: when it is asked, and from when on a silence counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime

from ctxdb_pgstatus._probing.probe import Account, Answer, Probe, is_refusal
from ctxdb_pgstatus._mask import mask_password
from ctxdb_pgstatus.addresses import HostAddress

__all__ = ["Pace", "Watch"]

logger = logging.getLogger("ctxdb_pgstatus")

_FIRST_PAUSE_SECONDS = 0.05
_SHORTEST_ATTEMPT_SECONDS = 0.2


class Pace:
    """How long an attempt may take, and how soon the next one follows a failure.

    `max_fails` failures in a row take at most one `poll_interval` altogether: a frozen host is found within two.

    Attributes:
        attempt: how long an attempt may take, in seconds.
        max_fails: how many failures in a row make a host a dead one.
    """

    def __init__(self, poll_interval: float, connect_timeout: float, max_fails: int) -> None:
        self.max_fails = max_fails
        # The tenth that is left is for the clock, which is late under load.
        self._share = 0.9 * poll_interval / max_fails
        self.attempt = max(min(connect_timeout, self._share), _SHORTEST_ATTEMPT_SECONDS)

    def pause(self, failures: int, elapsed: float) -> float:
        """Return how long to wait after a number of failures in a row, the last of which took `elapsed` seconds."""
        return max(0.0, min(_FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 20), self._share - elapsed))


class Watch:
    """What is known of one host, and the task that asks it.

    Args:
        address: where the host is.
        account: as whom to ask it.
        pace: how soon to ask again.
        report: called after each attempt, before those who wait for it go on.

    Attributes:
        address: where the host is.
        alive: whether it answers, or has failed less than `max_fails` times since it did.
        answer: what it said last; ``None`` if it is not alive.
        failures: how many attempts have failed since the last answer.
        error: what the last failure was, without secrets.
        since: since when it has been alive or not, in its role.
    """

    def __init__(self, address: HostAddress, account: Account, pace: Pace, report: Callable[[Watch], None]) -> None:
        self.address = address
        self.alive = False
        self.answer: Answer | None = None
        self.failures = 0
        self.error: str | None = None
        self.since = datetime.now(UTC)
        self._account = account
        self._pace = pace
        self._report = report
        self._probe = Probe(address, account, self.hurry)
        self._due = asyncio.Event()
        self._waiting: list[asyncio.Future[bool]] = []

    @property
    def position(self) -> int | None:
        """What it is known to have replayed, or inserted: nothing, if it may have been restarted since it said so."""
        return self.answer.position if self.answer is not None and self._probe.is_connected else None

    def hurry(self) -> None:
        """Have it asked now, or right after the attempt that is under way."""
        self._due.set()

    def ask(self) -> asyncio.Future[bool]:
        """Have it asked now; the future tells whether an attempt that began after this call was answered.

        Whoever asks while an attempt is under way shares the next one.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._due.set()
        return future

    async def run(self) -> None:
        """Ask whenever it is due, until cancelled."""
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                try:
                    await self._attempt()
                except Exception:
                    # Whatever it is, the next poll may do better.
                    logger.exception("Polling %s failed.", self.address.name, extra={"host": self.address.name})
        finally:
            self._probe.close()
            for future in self._waiting:
                if not future.done():
                    future.set_result(False)

    def close(self) -> None:
        """Drop the connection, so that what waits for an answer ends."""
        self._probe.close()

    async def _attempt(self) -> None:
        loop = asyncio.get_running_loop()
        waiting, self._waiting = self._waiting, []
        start = loop.time()
        try:
            try:
                answer = await self._probe.ask(self._pace.attempt)
            except Exception as exc:  # noqa: BLE001 - whatever a driver raises, the host did not answer
                self._failed(exc)
            else:
                self._answered(answer)
            self._report(self)
        finally:
            for future in waiting:
                if not future.done():
                    future.set_result(self.failures == 0)
        if 0 < self.failures < self._pace.max_fails:
            await asyncio.sleep(self._pace.pause(self.failures, loop.time() - start))
            self._due.set()

    def _answered(self, answer: Answer) -> None:
        before = self.answer
        self.answer = answer
        self.failures = 0
        if not self.alive or before is None or before.in_recovery != answer.in_recovery:
            self.alive = True
            self.since = datetime.now(UTC)
            role = "replica" if answer.in_recovery else "master"
            extra = {"host": self.address.name, "role": role, "timeline": answer.timeline}
            logger.info("Host %s answers: it is a %s.", self.address.name, role, extra=extra)

    def _failed(self, exc: Exception) -> None:
        name = self.address.name
        before, self.error = self.error, self._describe(exc)
        first = self.failures == 0
        self.failures += 1
        extra = {"host": name, "error": self.error, "failures": self.failures}
        if is_refusal(exc) and (first or self.error != before):
            logger.error("Host %s refuses the monitor: %s", name, self.error, extra=extra)
        if self.failures < self._pace.max_fails:
            return
        if self.alive:
            self.alive = False
            self.answer = None
            self.since = datetime.now(UTC)
            logger.warning("Host %s does not answer any more: %s", name, self.error, extra=extra)
        elif self.failures == self._pace.max_fails and not is_refusal(exc):
            logger.warning("Host %s does not answer: %s", name, self.error, extra=extra)

    def _describe(self, exc: Exception) -> str:
        account = self._account
        if isinstance(exc, TimeoutError):
            return f"no answer within {self._pace.attempt:.3g} s"
        text = mask_password(str(exc) or type(exc).__name__, account.password, (account.user, account.database))
        if is_refusal(exc):
            text += f": check the monitor's user ({account.user}), password and database ({account.database})"
        return text
