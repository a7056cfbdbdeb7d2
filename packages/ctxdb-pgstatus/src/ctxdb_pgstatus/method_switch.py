"""`MethodSwitch`: requests by safe methods read from replicas, all else goes to the master."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ctxdb_core import DBConnect
from ctxdb_pgstatus._following.positions import current_positions

__all__ = ["MethodSwitch"]


class MethodSwitch:
    """Chooses between two `DBConnect`s by the method of the request, as Ruby on Rails switches roles.

    A request by GET, HEAD, OPTIONS or TRACE gets `replica`, all others and all code outside of requests get `master`::

        db = MethodSwitch(master, replica)
        session = await db_session(db.current)

    It takes a `ReadYourWrites` around the application, which sees the method; through it, a client that has written
    reads its own writes all the same. A statement that writes in a request by a safe method is refused by the replica,
    unless it is inside of `writing`.

    Args:
        master: where writes go, by `follow_master`.
        replica: where reads go, by `follow_replica`.
    """

    def __init__(self, master: DBConnect, replica: DBConnect) -> None:
        self.master = master
        self.replica = replica
        self._writes: ContextVar[bool] = ContextVar("ctxdb_pgstatus_method_switch_writes", default=False)

    @property
    def current(self) -> DBConnect:
        """The one for the running code."""
        if self._writes.get():
            return self.master
        positions = current_positions.get()
        return self.replica if positions is not None and positions.reads_only else self.master

    @contextmanager
    def writing(self) -> Iterator[DBConnect]:
        """Have the master used in this block, whatever the method of the request: for counting visits, say."""
        token = self._writes.set(True)
        try:
            yield self.master
        finally:
            self._writes.reset(token)
