"""`Membership`: which hosts are of the cluster, and what the cluster's highest timeline is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from ctxdb_pgstatus._probing.answer import Answer

__all__ = ["Membership"]

logger = logging.getLogger("ctxdb_pgstatus")


class Membership:
    """Which hosts are of the cluster, and what the cluster's highest timeline is.

    The cluster is known by its system identifier: the one that most hosts have.

    Attributes:
        system: the system identifier of the cluster; ``None`` as long as no host has told one.
        highest_timeline: the highest timeline of this cluster that any host has had at any time.
        strangers: the names of the hosts that are of another cluster.
    """

    def __init__(self) -> None:
        self.system: int | None = None
        self.highest_timeline = 0
        self.strangers: frozenset[str] = frozenset()
        # The system identifier of each host when it answered last, whether the host is alive or not.
        self._systems: dict[str, int] = {}
        # The highest timeline at the time of `accept`, by which an operator has declared it undone. Standbys may have
        # histories of timelines up to this one, which count no more.
        self._undone_timeline = 0

    def update(self, answers: Mapping[str, Answer], names: Sequence[str], master: str | None) -> None:
        """Learn from what the living hosts say.

        Args:
            answers: the last answer of each living host, by the hosts' names.
            names: the names of all hosts, in the order of the list.
            master: the name of the present or the last master; ``None`` if there was no master.
        """
        for name, answer in answers.items():
            if answer.server is not None and answer.server.system_identifier is not None:
                self._systems[name] = answer.server.system_identifier
        self._choose_system(answers, names, master)
        self._name_strangers(answers)
        for name, answer in answers.items():
            if name in self.strangers:
                continue
            # A primary writes the timeline that it tells: that counts. A standby may tell a timeline that was undone,
            # by WAL or a history that it still has.
            claimed = (answer.timeline or 0) if not answer.in_recovery else 0
            highest_known_timeline = max(answer.timeline or 0, answer.highest_known_timeline or 0)
            self.highest_timeline = max(
                self.highest_timeline,
                claimed,
                highest_known_timeline if highest_known_timeline > self._undone_timeline else 0,
            )

    def accept(self, answers: Mapping[str, Answer], names: Sequence[str]) -> None:
        """Forget what was known, and learn from what the living hosts say now, as an operator has asked for."""
        system, timeline = self.system, self.highest_timeline
        self._systems = {}
        self.system = None
        self._undone_timeline = self.highest_timeline
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
        # Of several identifiers that the most hosts have, that of the first host in the list is chosen: so all
        # processes choose the same one.
        most = max(votes.values())
        chosen = next(system for system in known if votes[system] == most)
        if self.system is None:
            self.system = chosen
            return
        if votes[self.system] < votes[chosen]:
            self._begin_afresh(chosen)
        elif master in self._systems and self._systems[master] != self.system and master in answers:
            # The master's host has another system identifier now. If no other primary goes on with the old one, the
            # cluster was made anew on that host, by pg_upgrade for instance.
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
        self._undone_timeline = 0

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
