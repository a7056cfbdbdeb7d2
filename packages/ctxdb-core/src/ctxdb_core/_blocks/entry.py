"""Join, nest or begin: how each block takes part in what it finds, decided in this one place.

`find` says what there is for the running code on a database: a `Place`. The tables say for each kind of block, in each
place, which step it takes; `decide` returns that step as data, and the block carries it out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from threading import get_ident
from types import FrameType
from typing import Literal, TypeAlias

from ctxdb_core._blocks.shared_session import is_in_block_of
from ctxdb_core._blocks.task_unit import TaskUnit
from ctxdb_core._blocks.tasks import is_job
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._units.ending import in_transaction
from ctxdb_core._units.iteration import innermost_unit
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core.errors import (
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    TransactionAlreadyActiveError,
    TransactionRequiredError,
)

__all__ = [
    "Answer",
    "Begin",
    "BeginBeside",
    "Block",
    "Found",
    "Join",
    "Nest",
    "Place",
    "Refuse",
    "beside",
    "decide",
    "find",
]


# --- what there is ----------------------------------------------------------------------------------------------------


class Found(Enum):
    """What a block finds on its database: a column of the table below."""

    # A unit of work whose session the running code may use.
    BEGUN = 0
    """A unit of work, which is a transaction, and its first statement has been made."""
    UNBEGUN = 1
    """A unit of work, which is a transaction from its beginning, before its first statement."""
    BEGUN_SESSION = 2
    """A mere session of a `TransactionContext`: its statements have begun a transaction, which nobody commits."""
    SESSION = 3
    """So is it, and no transaction has begun on it."""
    AUTOCOMMIT = 4
    """A unit of work without transactions: each statement is committed by itself."""

    # No such unit.
    NOTHING = 5
    """There is no unit of work."""
    ENDED = 6
    """A unit of work was inherited that has ended since."""
    CUT_SHORT = 7
    """The unit of work has ended in the middle of the running code: of a block that has joined it, or of a handler that
    a middleware has given up on. What that code does now would be half of its work."""
    OTHER_JOB = 8
    """The running task is a scheduler's job, and the unit of work that of the code in whose context it was started."""
    OTHER_TASK = 9
    """The session is that of a `TransactionContext`'s block in another task."""
    OTHER_LOOP = 10
    """The unit of work is that of another thread's event loop."""
    TEST_ON_OTHER_LOOP = 11
    """So is it, and a test's, which undoes what is done in it, and cannot undo what is done beside it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block begins.

    Args:
        db: the database that the block is about.
        unit: the unit of work that was found, if any: also one that the running code may not use.
        why_not: why it may not use the unit; ``None`` if it may.
    """

    db: DBConnect
    unit: UnitOfWork | None
    why_not: Found | None

    @property
    def found(self) -> Found:
        """What there is at this moment: each statement may begin a transaction, and each commit ends one."""
        if self.why_not is not None or self.unit is None:
            return self.why_not or Found.NOTHING
        unit = self.unit
        if unit.autocommit:
            return Found.AUTOCOMMIT
        if isinstance(unit, TaskUnit) and unit.db is self.db and not unit.is_transaction():
            return Found.BEGUN_SESSION if self.has_begun else Found.SESSION
        return Found.BEGUN if self.has_begun else Found.UNBEGUN

    @property
    def usable_unit(self) -> UnitOfWork:
        """The unit of work, where the running code may use it."""
        assert self.unit is not None and self.why_not is None  # noqa: PT018 - one thing
        return self.unit

    @property
    def has_begun(self) -> bool:
        """Whether a transaction is open on the session."""
        session = None if self.unit is None else self.unit.sessions.get(self.db)
        return session is not None and in_transaction(session)


def find(db: DBConnect, *, about_it_alone: bool = False) -> Place:
    """Return what there is on `db` for the running code.

    Args:
        db: the database.
        about_it_alone: pass over the blocks of contexts of other databases, also where these would take `db` along.

    Raises:
        ContextNotInitiatedError: the running code iterates over an async generator in a block on the same session.
    """
    unit = innermost_unit(db)
    if about_it_alone:
        while isinstance(unit, TaskUnit) and unit.db is not db:
            unit = unit.outer
    elif unit is not None:
        unit = unit.of(db)
    return Place(db, unit, None if unit is None else _why_not(unit))


def _unit_around() -> UnitOfWork | None:
    """Return the unit of work that waits for what the running code begins beside it, if there is one.

    It is the innermost one that the running code may use.
    """
    unit = innermost_unit()
    while isinstance(unit, TaskUnit) and _why_not(unit) is not None:
        unit = unit.outer
    return None if unit is None or _why_not(unit) is not None else unit


def beside() -> BeginBeside:
    """Return the answer for what never takes part in what there is, on no database in particular."""
    return BeginBeside(_unit_around())


def _why_not(unit: UnitOfWork) -> Found | None:
    """Return why the running code may not use the session of `unit`; ``None`` if it may."""
    if is_job() and _is_inherited():
        return Found.OTHER_JOB
    ended = unit.over if isinstance(unit, TaskUnit) else unit.closed
    if ended:
        return Found.CUT_SHORT if is_in_block_of(unit) or _is_given_up(unit) else Found.ENDED
    if unit.thread != get_ident():
        return Found.TEST_ON_OTHER_LOOP if unit.shared else Found.OTHER_LOOP
    if isinstance(unit, TaskUnit) and not unit.is_owned():
        return Found.OTHER_TASK
    return None


def _is_inherited() -> bool:
    """Return whether the running code has the current unit from the context that its task was given a copy of."""
    unit = current_unit.get()
    token = getattr(unit, "token", None)
    if token is None:
        # That of an ASGI request. A job that has made it calls an application by itself, whose middleware is then
        # among the callers of the running code.
        return "ctxdb_core.asgi" not in _packages_of_callers()
    # A token is good for the very context in which it was made (Python docs, "ContextVar.reset"). That tells a unit
    # which was entered here from one which was inherited.
    try:
        current_unit.reset(token)
    except (ValueError, RuntimeError):
        # Another context's; or used already, where that context has been left.
        return True
    unit.enter()
    return False


def _packages_of_callers() -> set[str]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and named so for its use to be noticed
    packages: set[str] = set()
    while frame is not None:
        packages.add(frame.f_globals.get("__name__", "").rpartition(".")[0])
        frame = frame.f_back
    return packages


def _is_given_up(unit: UnitOfWork) -> bool:
    """Return whether the running code is part of a handler in whose place a middleware has answered."""
    call = unit.running_call()
    return unit.is_abandoned and call is not None and call.pending


# --- the answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Join:
    """Go on in the transaction of `unit`, or on its session."""

    unit: UnitOfWork


@dataclass(frozen=True, slots=True)
class Nest:
    """Go on in the transaction of `unit`, behind a savepoint."""

    unit: UnitOfWork


@dataclass(frozen=True, slots=True)
class Begin:
    """Begin a transaction on the session of `unit`, and commit what is open on it at the end of the block.

    Args:
        unit: the unit of work.
        first: what to do with a transaction that is open already; without it, the block goes on in that one.
    """

    unit: UnitOfWork
    first: Literal["commit", "rollback"] | None = None


@dataclass(frozen=True, slots=True)
class BeginBeside:
    """Begin in a unit of work of its own.

    Args:
        around: the unit of work that waits for it, if there is one.
        autocommit: whether it is to have no transactions.
    """

    around: UnitOfWork | None
    autocommit: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """Raise `error`, which gives the reason."""

    error: CtxDBError


Answer: TypeAlias = Join | Nest | Begin | BeginBeside | Refuse


def decide(place: Place, block: Block) -> Answer:
    """Return how `block` takes part in what there is at `place`."""
    return _TABLE[block][place.found.value](place)


# --- the table --------------------------------------------------------------------------------------------------------


class Block(Enum):
    """The kinds of blocks: a row of the table each."""

    REQUIRED = "required"
    REQUIRES_NEW = "requires_new"
    NESTED = "nested"
    MANDATORY = "mandatory"
    NEVER = "never"
    SUPPORTS = "supports"
    NOT_SUPPORTED = "not_supported"
    ATOMIC_COMMIT = "commit"
    ATOMIC_ROLLBACK = "rollback"
    ATOMIC_APPEND = "append"
    ATOMIC_RAISE = "raise"
    ATOMIC_SAVEPOINT = "savepoint"
    SESSION = "session()"
    TRANSACTION = "transaction()"
    NOT_NESTED = "transaction(allow_nested_transactions=False)"
    NEW = "new_session(), new_transaction()"


_Cell: TypeAlias = Callable[[Place], Answer]


def _join(place: Place) -> Answer:
    return Join(place.usable_unit)


def _nest(place: Place) -> Answer:
    return Nest(place.usable_unit)


def _begin(place: Place) -> Answer:
    return Begin(place.usable_unit)


def _commit_begin(place: Place) -> Answer:
    return Begin(place.usable_unit, "commit")


def _undo_begin(place: Place) -> Answer:
    return Begin(place.usable_unit, "rollback")


def _beside(place: Place) -> Answer:
    return beside()


def _without(place: Place) -> Answer:
    return BeginBeside(_unit_around(), autocommit=True)


def _no_unit(place: Place) -> Answer:
    """Refuse code that needs the unit of work which it cannot use here."""
    if place.found is Found.NOTHING:
        return Refuse(ContextNotInitiatedError())
    if place.found in (Found.ENDED, Found.CUT_SHORT):
        return Refuse(ContextClosedError())
    if place.found is Found.OTHER_JOB:
        return Refuse(
            ContextNotInitiatedError(
                "The unit of work found here belongs to the code in whose context a scheduler has started this job, "
                "and which may have nothing to do with it. Give the job a unit of work of its own: hand "
                "`run_in_new_ctx(fn, ...)` to the scheduler, or wrap the job's code in `async with new_db_ctx():`."
            )
        )
    assert place.unit is not None
    try:
        place.unit.check_usable()
    except CtxDBError as exc:
        return Refuse(exc)
    raise AssertionError("a unit of work that can be used was taken for one that cannot")


def _no_transaction(place: Place) -> Answer:
    return Refuse(
        TransactionRequiredError(
            "propagation='mandatory' was asked for, and there is no transaction here. Call this code in a unit of work "
            "(a request, `async with new_db_ctx():`), or in `async with transactional(db):`."
        )
    )


def _mere_session(place: Place) -> Answer:
    return Refuse(
        TransactionRequiredError(
            "propagation='mandatory' was asked for in a mere session of a TransactionContext, where nobody would "
            "commit. Call this code in its `transaction()`, or in `async with transactional(db):`."
        )
    )


def _autocommit(place: Place) -> Answer:
    return Refuse(
        TransactionRequiredError(
            "This block runs without a transaction, as `transactional` was asked to, and so would what is in here. Use "
            "`transactional(db)`, which begins one."
        )
    )


def _never(place: Place) -> Answer:
    return Refuse(
        TransactionAlreadyActiveError(
            "propagation='never' was asked for inside of a unit of work, which is a transaction. Call it outside of "
            "one, or suspend it: `transactional(db, 'not_supported')`."
        )
    )


def _begun(place: Place) -> Answer:
    return Refuse(
        TransactionAlreadyActiveError(
            f"A transaction is open on {place.db!r} already: commit it with `await commit_db_session(db)`, or choose "
            "another `current_transaction`."
        )
    )


def _no_nesting(place: Place) -> Answer:
    return Refuse(
        TransactionAlreadyActiveError(
            f"A transaction is open on {place.db!r} already: commit it first, leave out "
            "`allow_nested_transactions=False` for a savepoint in it, or use `new_transaction()`."
        )
    )


# Where there is no unit of work that could be used, several rows agree. An inherited unit that has ended, or that a job
# has come by, is none: a block that ends its own transaction begins one. A unit that has ended in the middle of the
# running code is no such thing: that code expects its whole work to be committed together. Nor is one that goes on
# elsewhere, in another task or thread, for code that would have taken part in it; only the blocks of contexts say of
# themselves that each task has its own.
#
# Each cell is in the column of a `Found`, in the order of its values.
# fmt: off
#             NOTHING          ENDED      CUT_SHORT  OTHER_JOB        OTHER_TASK  OTHER_LOOP  TEST_ON_OTHER_LOOP
_OR_BEGIN   = _beside,         _beside,   _no_unit,  _beside,         _no_unit,   _no_unit,   _no_unit
_OR_WITHOUT = _without,        _without,  _no_unit,  _without,        _no_unit,   _no_unit,   _no_unit
_OR_OWN     = _beside,         _beside,   _no_unit,  _beside,         _beside,    _beside,    _no_unit
_MANDATORY  = _no_transaction, _no_unit,  _no_unit,  _no_transaction, _no_unit,   _no_unit,   _no_unit
_NEEDS_UNIT = _no_unit,        _no_unit,  _no_unit,  _no_unit,        _no_unit,   _no_unit,   _no_unit
_NO_MATTER  = _without,        _without,  _without,  _without,        _without,   _without,   _without

_TABLE: dict[Block, tuple[_Cell, ...]] = {
    #                         BEGUN          UNBEGUN   BEGUN_SESSION  SESSION        AUTOCOMMIT
    Block.REQUIRED:         (_join,         _join,    _begin,        _begin,        _beside,         *_OR_BEGIN),
    Block.NESTED:           (_nest,         _nest,    _begin,        _begin,        _beside,         *_OR_BEGIN),
    Block.MANDATORY:        (_join,         _join,    _mere_session, _mere_session, _no_transaction, *_MANDATORY),
    Block.NEVER:            (_never,        _never,   _never,        _never,        _join,           *_OR_WITHOUT),
    Block.SUPPORTS:         (_join,         _join,    _join,         _join,         _join,           *_OR_WITHOUT),
    Block.NOT_SUPPORTED:    (_without,      _without, _without,      _without,      _join,           *_NO_MATTER),
    Block.ATOMIC_COMMIT:    (_commit_begin, _begin,   _commit_begin, _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.ATOMIC_ROLLBACK:  (_undo_begin,   _begin,   _undo_begin,   _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.ATOMIC_APPEND:    (_begin,        _begin,   _begin,        _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.ATOMIC_RAISE:     (_begun,        _begin,   _begun,        _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.ATOMIC_SAVEPOINT: (_nest,         _begin,   _nest,         _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.SESSION:          (_join,         _join,    _join,         _join,         _join,           *_OR_OWN),
    Block.TRANSACTION:      (_nest,         _nest,    _begin,        _begin,        _autocommit,     *_OR_OWN),
    Block.NOT_NESTED:       (_no_nesting,   _nest,    _no_nesting,   _begin,        _autocommit,     *_OR_OWN),
    Block.REQUIRES_NEW:     (_beside,) * len(Found),
    Block.NEW:              (_beside,) * len(Found),
}
# fmt: on
