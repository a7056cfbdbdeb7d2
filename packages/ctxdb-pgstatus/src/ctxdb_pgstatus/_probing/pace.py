"""`Pace`: how soon a host is asked again, and after how much silence it counts as dead."""

from __future__ import annotations

__all__ = ["Pace"]

_FIRST_PAUSE_SECONDS = 0.05
_SHORTEST_PATIENCE_SECONDS = 0.2
# An answer that takes so many times as long as usual is late.
_UNUSUAL = 3.0
# The share of the poll interval after which silence counts. The rest is left for timers, which are late under load.
_SHARE_OF_INTERVAL = 0.9
_FIRST_BACK_OFF_SECONDS = 0.5
_LONGEST_BACK_OFF_SECONDS = 15.0
_LONGEST_BACK_OFF_OF_BUSY_SECONDS = 2.0


class Pace:
    """How long to wait for an answer of a host, and how long to wait after a failure before the host is asked again.

    An attempt may take as long as its time-outs say, so that a distant host is reached at any `poll_interval`. While an
    attempt goes on, a host that keeps silent counts as dead after nine tenths of a `poll_interval`: so a host that
    hangs is noticed within two polls. A host whose answers usually take long is given three times its usual time before
    it counts as dead, but no longer than the time-outs.

    Args:
        poll_interval: how often a host is asked, in seconds.
        longest: how long an attempt may take at most, in seconds.
        max_fails: how many failures in a row make a host a dead one.

    Attributes:
        max_fails: how many failures in a row make a host a dead one.
        interval: how often a host is asked, in seconds.
    """

    def __init__(self, poll_interval: float, longest: float, max_fails: int) -> None:
        self.max_fails = max_fails
        self.interval = poll_interval
        self._longest = longest
        self._share = _SHARE_OF_INTERVAL * poll_interval / max_fails

    def patience(self, usual: float) -> float:
        """Return after how many seconds an answer is late, so that callers who ask all hosts stop waiting for it.

        Args:
            usual: how long answers of this host usually take.
        """
        return max(_SHORTEST_PATIENCE_SECONDS, self._share, _UNUSUAL * usual)

    def silence(self, usual: float) -> float:
        """Return after how many seconds without an answer a host is dead.

        Args:
            usual: how long answers of this host usually take.
        """
        of_interval = max(_SHARE_OF_INTERVAL * self.interval, _SHORTEST_PATIENCE_SECONDS * self.max_fails)
        return max(of_interval, min(_UNUSUAL * usual, self._longest))

    def pause(self, failures: int, elapsed: float) -> float:
        """Return how long to wait after a number of failures in a row, the last of which took `elapsed` seconds."""
        return max(0.0, min(_FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 20), self._share - elapsed))

    def back_off(self, refusals: int, *, is_busy: bool) -> float:
        """Return for how many seconds not to ask a server that runs, but refuses the connections of the monitor.

        Args:
            refusals: how often the server has refused in a row.
            is_busy: whether the reason may pass by itself: the server has too many connections, or starts up.
        """
        longest = _LONGEST_BACK_OFF_OF_BUSY_SECONDS if is_busy else _LONGEST_BACK_OFF_SECONDS
        return min(_FIRST_BACK_OFF_SECONDS * 2.0 ** min(refusals - 1, 20), max(longest, self.interval))
