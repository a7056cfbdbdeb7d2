"""Blocks around the yields of an async generator: they are the generator's, and not its consumer's.

An async generator has no context of its own: what it sets in a context variable before a ``yield`` is seen by the code
that iterates over it (PEP 568, which would have changed that, was never accepted). So the unit of work that a block
makes current inside of a generator is put behind an `IteratedUnit`, which answers by it to the generator's code alone,
and by the unit around it to the consumer. Which of the two is asking can be seen from the generator's frame: while that
is suspended at a ``yield``, the consumer runs.

Some generators are context managers: a function under ``@asynccontextmanager``, a dependency, a fixture. What they make
current is meant for the code that runs during their ``yield``, and is left alone.
"""

from __future__ import annotations

import dis
import inspect
import sys
from asyncio import Handle
from collections.abc import Callable
from itertools import pairwise
from types import CodeType, FrameType
from typing import NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.settings import NO_SETTINGS, UnitSettings
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core._units.unit_sessions import NO_SESSIONS_YET
from ctxdb_core.errors import ContextNotInitiatedError

__all__ = ["IteratedUnit", "innermost_unit", "is_at_yield", "iterated_generator", "seat"]

T = TypeVar("T")

_ASYNC_GENERATOR = inspect.CO_ASYNC_GENERATOR

# The function that runs each step of a task, where the event loop is asyncio's own.
_EVENT_LOOP = Handle._run.__code__  # noqa: SLF001 - only compared with

# Packages that step through generators to use them as context managers, however many yields those may have.
_MANAGERS = frozenset({"contextlib", "pytest_asyncio", "anyio"})


def _once_for_each(read: Callable[[CodeType], T]) -> Callable[[CodeType], T]:
    """Have the code of each function read once: by its identity, as it takes longer to hash code than to read it."""
    known: dict[int, tuple[CodeType, T]] = {}

    def look_up(code: CodeType) -> T:
        found = known.get(id(code))
        if found is None:
            # The entry keeps the code alive: otherwise, another code object could get its `id`.
            found = known[id(code)] = (code, read(code))
        return found[1]

    return look_up


class _Yields(NamedTuple):
    """Where a generator's code is suspended by its yields."""

    offsets: frozenset[int]
    """What ``f_lasti`` is then: the ``YIELD_VALUE``, or the ``RESUME`` after it (Python 3.13)."""
    are_steps: bool
    """Whether there are several of them, or one in a loop."""


@_once_for_each
def _yields_of(code: CodeType) -> _Yields:
    instructions = list(dis.get_instructions(code))
    offsets: set[int] = set()
    loops: list[tuple[int, int]] = []
    yields = 0
    for before, each in pairwise(instructions):
        # An `await` is a YIELD_VALUE as well. What comes after tells them apart: RESUME 1 follows a yield expression,
        # RESUME 3 an `await` (Python docs, "dis"). Higher bits of its argument have other meanings.
        if each.opname == "RESUME" and (each.arg or 0) & 3 == 1:
            offsets |= {before.offset, each.offset}
            yields += 1
        # A loop ends by a jump back. So does the handling of an error in an `await`, which lies behind all other code.
        elif each.opcode in dis.hasjrel and each.argval < each.offset and before.opname != "CLEANUP_THROW":
            loops.append((each.argval, each.offset))
    in_loop = any(start <= offset <= end for offset in offsets for start, end in loops)
    return _Yields(frozenset(offsets), yields > 1 or in_loop)


@_once_for_each
def _iterations_of(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Return where ``async for`` waits for the next item: from each GET_ANEXT to the end of its waiting loop."""
    found: list[tuple[int, int]] = []
    start: int | None = None
    for each in dis.get_instructions(code):
        if each.opname == "GET_ANEXT":
            start = each.offset
        elif start is not None and each.opname == "JUMP_BACKWARD_NO_INTERRUPT":
            found.append((start, each.offset))
            start = None
    return tuple(found)


def iterated_generator() -> FrameType | None:
    """Return the frame of the innermost async generator that the running code is a part of, if that is iterated over.

    ``None`` where there is none, and where each one serves as a context manager. Iterated over is what ``async for``
    asks for its next item; and what is asked by ``anext()``, if it has several yields, or one in a loop.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and named so for its use to be noticed
    while frame is not None:
        code = frame.f_code
        if code.co_flags & _ASYNC_GENERATOR and _is_iterated(frame):
            return frame
        if code is _EVENT_LOOP:
            # The frames from here on are the event loop's, and no part of the task.
            return None
        frame = frame.f_back
    return None


def _is_iterated(generator: FrameType) -> bool:
    consumer = generator.f_back
    if consumer is None or consumer.f_globals.get("__name__", "").partition(".")[0] in _MANAGERS:
        return False
    if any(start <= consumer.f_lasti <= end for start, end in _iterations_of(consumer.f_code)):
        return True
    return _yields_of(generator.f_code).are_steps


def is_at_yield(generator: FrameType) -> bool:
    """Return whether the generator with this frame is suspended at a ``yield``, so that its consumer runs."""
    return generator.f_lasti in _yields_of(generator.f_code).offsets


class IteratedUnit(UnitOfWork):
    """Stands in for `unit` in a block of an iterated generator, whose consumer gets the unit around it instead.

    Args:
        unit: the unit of work that is the generator's.
        generator: the generator's frame.
        shares: the database on which the block has the consumer's own session, and will undo or commit what is done on
            it: the consumer is refused there.
    """

    is_plain = False

    def __init__(self, unit: UnitOfWork, generator: FrameType, *, shares: DBConnect | None = None) -> None:
        # Without `super().__init__`: this one never has a session, so that `db_session` asks `of(db)` each time.
        self.sessions = NO_SESSIONS_YET
        self.loop = unit.loop
        self.hooks = self.registration = self.token = None
        self._unit = unit
        self._around = current_unit.get(None)
        self._generator: FrameType | None = generator
        """``None`` once the block is over."""
        self._shares = shares

    def leave(self) -> None:
        """Make the unit current again that was so before; not if the consumer has made another one current since."""
        self._generator = None
        if current_unit.get(None) is self:
            super().leave()

    def answering(self, db: DBConnect | None = None) -> UnitOfWork | None:
        """Return the unit that the running code finds here, if any.

        Raises:
            ContextNotInitiatedError: the consumer asks, and the block is on its own session on `db`.
        """
        if self._generator is None:
            return self._around
        if not is_at_yield(self._generator):
            return self._unit
        if db is not None and db is self._shares:
            raise ContextNotInitiatedError(
                f"The async generator {self._name}() is inside of a block of a transaction on the session of this unit "
                f"of work: what its consumer does on it meanwhile would be committed or undone with that. {_WAY_OUT}"
            )
        return self._around

    @property
    def settings(self) -> UnitSettings:
        """The settings of the unit that the running code finds here."""
        unit = self.answering()
        return NO_SETTINGS if unit is None else unit.settings

    @settings.setter
    def settings(self, settings: UnitSettings) -> None:
        raise AttributeError("The settings belong to the unit of work behind this one.")

    @property
    def closed(self) -> bool:
        """Whether the running code gets no session here."""
        unit = self.answering()
        return unit is None or unit.closed

    def of(self, db: DBConnect) -> UnitOfWork:
        return self._found(db).of(db)

    def note_second_session(self, db: DBConnect, session: AsyncSession) -> None:
        unit = self.answering()
        if unit is not None:
            unit.note_second_session(db, session)

    def check_usable(self) -> None:
        self._found().check_usable()

    async def limit_statements(self, timeout: StatementTimeout | None) -> None:
        await self._found().limit_statements(timeout)

    def _found(self, db: DBConnect | None = None) -> UnitOfWork:
        unit = self.answering(db)
        if unit is not None:
            return unit
        if self._generator is None:
            raise ContextNotInitiatedError
        raise ContextNotInitiatedError(
            f"The unit of work that is open here is that of the async generator {self._name}(), and not its "
            f"consumer's. {_WAY_OUT}"
        )

    @property
    def _name(self) -> str:
        return "" if self._generator is None else self._generator.f_code.co_qualname


_WAY_OUT = (
    "Read what it yields into a list first (`[row async for row in ...]`), let it end its block before it yields, or "
    "give what uses the session here a unit of work of its own: `await run_in_new_ctx(fn, ...)`, or `async with "
    "new_db_ctx():`."
)


def innermost_unit(db: DBConnect | None = None) -> UnitOfWork | None:
    """Return the unit of work of the running code, if any.

    Raises:
        ContextNotInitiatedError: as `IteratedUnit.answering`.
    """
    unit = current_unit.get(None)
    while isinstance(unit, IteratedUnit):
        unit = unit.answering(db)
    return unit


def seat(unit: UnitOfWork) -> UnitOfWork:
    """Return what a block has to `enter` and `leave` for `unit` to be the current one: `unit`, or an `IteratedUnit`."""
    generator = iterated_generator()
    return unit if generator is None else IteratedUnit(unit, generator)
