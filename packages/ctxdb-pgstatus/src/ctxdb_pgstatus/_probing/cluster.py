"""`Cluster`: the hosts of a `HostMonitor`, and what follows from their answers: the master and the replicas' lags."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.judge import Judge
from ctxdb_pgstatus._probing.member import Member
from ctxdb_pgstatus._probing.membership import Membership
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.election import Claim, Election, elect
from ctxdb_pgstatus.status import Fault, HostStatus

__all__ = ["Cluster"]

logger = logging.getLogger("ctxdb_pgstatus")


class Cluster:
    """The hosts of a monitor, and what follows from their answers.

    Each report of a `Watch` has the master elected anew, and the lags of replicas judged, before `publish` is called.
    Before `settle` there is no master: the first election must not depend on which host answers first.

    Args:
        judge: judges the lags of replicas.
        conn_max_age: how old a connection to a host may get before it is replaced, in seconds.
        publish: called when something may have changed.

    Attributes:
        members: the hosts, by their names, in their order.
        membership: which hosts are of the cluster, and its highest timeline.
        master: the name of the master; ``None`` if there is none.
        is_settled: whether each host has answered or failed once.
    """

    def __init__(self, judge: Judge, conn_max_age: float, publish: Callable[[], None]) -> None:
        self.members: dict[str, Member] = {}
        self.membership = Membership()
        self.is_settled = False
        self._judge = judge
        self._conn_max_age = conn_max_age
        self._publish = publish
        self._election = Election(None)
        self._last_master: str | None = None

    @property
    def master(self) -> str | None:
        """The name of the master; ``None`` if there is none."""
        return self._election.master

    def settle(self) -> None:
        """Elect the first master, and judge all replicas, as each host has answered or failed once."""
        self.is_settled = True
        self.elect()
        for member in self.members.values():
            self._compare_subscribers(member)
        self._compare_with_standbys()
        for member in self._replicas():
            answer = member.answer
            assert answer is not None, "a member counts as a replica by its answer"
            self._warn_of_missing_timeline(member.watch.address.name, answer)
            self._judge.judge(member)

    # --- reports of watches -------------------------------------------------------------------------------------------

    def reported(self, watch: Watch) -> None:
        """Learn from the end of an attempt to ask a host, or from a silence of it that was too long."""
        # A failed attempt changes nothing but the error of the host, as long as the host counts as alive.
        if watch.failures == 0 or not watch.alive:
            member = self.members.get(watch.address.name)
            if member is None or member.watch is not watch:
                # The host was taken off the list meanwhile.
                return
            member.note_server(watch.server)
            watch.renews_at_each_poll = len(self.members) == 1 or self.may_have_moved(member)
            self.elect()
            self._compare_subscribers(member)
            answer = member.answer
            is_replica = answer is not None and answer.in_recovery
            if not is_replica:
                member.forget_lag()
            if self.is_settled and not watch.refusals:
                # The others are compared with this host, or with the next one if it has gone.
                self._compare_with_standbys()
                if answer is not None and is_replica:
                    self._warn_of_missing_timeline(watch.address.name, answer)
                    self._judge.judge(member)
            if answer is not None and watch.address.name == self._election.master:
                self._judge.compare_with_master(answer, self.members.values())
        self._publish()

    def _compare_subscribers(self, reported: Member) -> None:
        """Compare subscribers with the master: all of them if `reported` is the master, else only `reported`."""
        master = self.members.get(self._election.master or "")
        publisher = None if master is None else master.answer
        for member in self.members.values():
            if member.is_subscriber and (member is reported or reported is master):
                member.compare_with_publisher(publisher)

    def _warn_of_missing_timeline(self, name: str, answer: Answer) -> None:
        member = self.members[name]
        is_silent = answer.timeline is None and answer.position is not None and not member.is_subscriber
        if is_silent and "timeline" not in member.warned_of:
            member.warned_of.add("timeline")
            logger.warning(
                "%s does not tell which timeline it is on, so that it never counts as in sync: the monitor's user may "
                "read neither the control data nor what the WAL receiver tells. GRANT pg_monitor TO that user, or "
                "GRANT EXECUTE ON FUNCTION pg_control_checkpoint(), pg_control_recovery().",
                name,
                extra={"host": name},
            )

    def _replicas(self) -> list[Member]:
        """Return the living hosts that are standbys, and the subscribers."""
        answers = [(member, member.answer) for member in self.members.values()]
        return [member for member, answer in answers if answer is not None and answer.in_recovery]

    def answers(self) -> dict[str, Answer]:
        """Return the last answer of each living host, by the hosts' names, without the subscribers."""
        answers = {name: member.answer for name, member in self.members.items() if not member.is_subscriber}
        return {name: answer for name, answer in answers.items() if answer is not None}

    # --- the master ---------------------------------------------------------------------------------------------------

    def elect(self) -> None:
        """Elect the master anew, by the last answers of the hosts."""
        if not self.is_settled:
            return
        answers = self.answers()
        membership = self.membership
        system = membership.system
        membership.update(answers, list(self.members), self._last_master)
        if membership.system != system:
            # The cluster was made anew: the WAL positions of the former cluster do not compare with those of this one.
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
            if election.master != self._last_master:
                # The replicas are compared with another host from now on.
                for member in self.members.values():
                    member.ahead_on = None
            self._last_master = election.master
            self._judge.compare_with_master(answers[election.master], self.members.values())
            for member in self._replicas():
                self._judge.judge(member)

    def _may_be_elected(self, name: str) -> bool:
        member = self.members[name]
        if not member.may_be_promoted:
            if "nofailover" not in member.warned_of:
                member.warned_of.add("nofailover")
                logger.warning(
                    "%s says that it is the master, and is one of the `nofailover` hosts: it gets no writes. Take it "
                    "out of `nofailover` if it is to be the master.",
                    name,
                    extra={"host": name},
                )
            return False
        return name not in self.membership.strangers and not member.watch.has_several_servers

    def _log_election(self, before: Election, now: Election) -> None:
        timeline = self.membership.highest_timeline
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
                "there is no master until one is left" if now.master is None else f"{now.master} alone takes writes",
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

    def statuses(self) -> tuple[HostStatus, ...]:
        """Return the status of each host, in their order."""
        return tuple(member.status(self.master, self._fault_of(name)) for name, member in self.members.items())

    def _fault_of(self, name: str) -> Fault | None:
        election = self._election
        if name in self.membership.strangers:
            return "stranger"
        if self.members[name].watch.has_several_servers:
            return "shared_name"
        if name in election.rivals or (election.rivals and election.master is None and name == election.preferred):
            return "rival"
        return "stale" if name in election.stale else None

    def _compare_with_standbys(self) -> None:
        if self._election.master is None:
            strangers = self.membership.strangers
            self._judge.compare_with_standbys(
                member for name, member in self.members.items() if name not in strangers and not member.is_subscriber
            )

    # --- callers' questions -------------------------------------------------------------------------------------------

    def may_have_moved(self, member: Member) -> bool:
        """Return whether the name of a primary may lead to another server by now, of which no other host tells.

        The connection to a host stays with its server when the name moves to another one. After a promotion, a host of
        the list tells the higher timeline, unless the promoted standby is at none of the list's names but this one. A
        standby that is promoted leaves its primary before: without such a loss, the name has not moved so.
        """
        if self._conn_max_age == 0:
            # The user wants every confirmation to ask over a new connection.
            return True
        lost_one_of = member.watch.standbys_before_loss
        if not lost_one_of or member.watch.server is None:
            return False
        # If the list leads to as many other servers as the primary had standbys, the promoted one is among them.
        servers = [member.watch.server]
        for other in self.members.values():
            server = other.watch.server
            if server is not None and other.watch.address.name not in self.membership.strangers:
                servers += [] if any(map(server.is_run_of, servers)) else [server]
        return len(servers) <= lost_one_of

    def may_take_over(self, member: Member, asked: Member) -> bool:
        """Return whether the host `member` may become the master in the place of the host `asked`."""
        name, server = member.watch.address.name, member.watch.server
        if member is asked or not member.may_be_promoted or name in self.membership.strangers:
            return False
        # A server does not take over from itself, by whatever other name it is asked.
        return server is None or asked.watch.server is None or not server.is_run_of(asked.watch.server)

    def replayed(self, replicas: Iterable[HostStatus], position: int) -> list[HostStatus]:
        """Return the replicas out of `replicas` that are known to have replayed a WAL position in bytes."""
        # A caller on another thread may have the status of a moment ago, with a host that has left the list since.
        members = self.members
        known = [replica for replica in replicas if replica.host in members]
        return [replica for replica in known if self._judge.has_replayed(members[replica.host], position)]
