"""`Membership`: which cluster the hosts are of, and how far its timelines have got."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from ctxdb_pgstatus._probing.answer import Answer

__all__ = ["Membership"]

logger = logging.getLogger("ctxdb_pgstatus")


class Membership:
    """Which cluster the hosts are of, and up to which timeline it has got.

    Attributes:
        system: the system identifier of the cluster; ``None`` as long as no host has told one.
        highest_timeline: the highest timeline of this cluster that any host has had at any time.
        strangers: the hosts that are of another cluster.
    """

    def __init__(self) -> None:
        self.system: int | None = None
        self.highest_timeline = 0
        self.strangers: frozenset[str] = frozenset()
        # What each host was of when it answered last, whether it is alive or not.
        self._systems: dict[str, int] = {}
        # Up to which timeline replicas may have heard of what an operator has since declared undone.
        self._undone = 0

    def update(self, answers: Mapping[str, Answer], names: Sequence[str], master: str | None) -> None:
        """Take in what the living hosts say.

        Args:
            answers: by the names of hosts.
            names: of all hosts, in their order.
            master: the master up to now, or the last one that there was.
        """
        for name, answer in answers.items():
            if answer.server is not None and answer.server.system_identifier is not None:
                self._systems[name] = answer.server.system_identifier
        self._choose_system(answers, names, master)
        self._name_strangers(answers)
        for name, answer in answers.items():
            if name in self.strangers:
                continue
            # A primary writes the timeline that it claims. What a replica has received or heard of may be the remains
            # of what was undone.
            claimed = (answer.timeline or 0) if not answer.in_recovery else 0
            heard_of = max(answer.timeline or 0, answer.heard_of or 0)
            self.highest_timeline = max(self.highest_timeline, claimed, heard_of if heard_of > self._undone else 0)

    def accept(self, answers: Mapping[str, Answer], names: Sequence[str]) -> None:
        """Take what the living hosts say now for the truth, as an operator has asked for."""
        system, timeline = self.system, self.highest_timeline
        self._systems = {}
        self.system = None
        self._undone = self.highest_timeline
        self.highest_timeline = 0
        self.update(answers, names, None)
        logger.warning(
            "An operator has had the present state of the cluster accepted: the highest timeline is %s, and was %s.",
            self.highest_timeline,
            timeline,
            extra={
                "timeline": self.highest_timeline,
                "timeline_before": timeline,
                "system": self.system,
                "system_before": system,
            },
        )

    def _choose_system(self, answers: Mapping[str, Answer], names: Sequence[str], master: str | None) -> None:
        known = [self._systems[name] for name in names if name in self._systems]
        if not known:
            return
        votes = Counter(known)
        # Among equals, the first in the order of the hosts: so every process chooses the same.
        most = max(votes.values())
        chosen = next(system for system in known if votes[system] == most)
        if self.system is None:
            self.system = chosen
            return
        if votes[self.system] < votes[chosen]:
            self._begin_afresh(chosen)
        elif master in self._systems and self._systems[master] != self.system and master in answers:
            # The host of the master has another database cluster now. If no other primary goes on with the old one,
            # the cluster was made anew there: by pg_upgrade, for instance.
            claims = [
                name
                for name, answer in answers.items()
                if not answer.in_recovery and (answer.timeline or 0) >= self.highest_timeline
            ]
            is_primary = not answers[master].in_recovery
            if is_primary and all(self._systems.get(name) != self.system for name in claims):
                self._begin_afresh(self._systems[master])

    def _begin_afresh(self, system: int) -> None:
        logger.warning(
            "The cluster was made anew: its system identifier is %s, and was %s. Its timelines begin again.",
            system,
            self.system,
            extra={"system": system, "system_before": self.system},
        )
        self.system = system
        self.highest_timeline = 0
        self._undone = 0

    def _name_strangers(self, answers: Mapping[str, Answer]) -> None:
        strangers = frozenset(
            name for name in answers if self._systems.get(name, self.system) != self.system and name in self._systems
        )
        for name in sorted(strangers - self.strangers):
            logger.warning(
                "%s is of another cluster: its system identifier is %s, and that of the other hosts %s. It gets no "
                "sessions. Take it out of the list of hosts.",
                name,
                self._systems[name],
                self.system,
                extra={"host": name, "system": self._systems[name]},
            )
        self.strangers = strangers
