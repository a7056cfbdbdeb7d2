"""The table that decides for each kind of block whether it joins a transaction, nests in it, or begins one.

`ctxdb_core._blocks.place` says what there is where a block begins. The table says what each kind of block does there;
`decide` returns that as data, and the block carries it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from ctxdb_core._blocks.place import Found, Place, unit_around
from ctxdb_core._units.scheduler_jobs import OTHER_JOB
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.errors import (
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    TransactionAlreadyActiveError,
    TransactionRequiredError,
)

__all__ = ["Answer", "Begin", "BeginBeside", "Block", "Join", "Nest", "Refuse", "beside", "decide"]


# --- the answers ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Join:
    """Go on in the transaction of `unit`, or on its session."""

    unit: UnitOfWork


@dataclass(slots=True)
class Nest:
    """Go on in the transaction of `unit`, behind a savepoint."""

    unit: UnitOfWork


@dataclass(slots=True)
class Begin:
    """Begin a transaction on the session of `unit`, and commit what is open on it at the end of the block.

    Args:
        unit: the unit of work.
        first: what to do with a transaction that is open already; without it, the block goes on in that one.
    """

    unit: UnitOfWork
    first: Literal["commit", "rollback"] | None = None


@dataclass(slots=True)
class BeginBeside:
    """Begin in a unit of work of its own.

    Args:
        around: the unit of work that waits for it, if there is one.
        autocommit: whether it is to have no transactions.
    """

    around: UnitOfWork | None
    autocommit: bool = False


@dataclass(slots=True)
class Refuse:
    """Raise `error`, which gives the reason."""

    error: CtxDBError


Answer: TypeAlias = Join | Nest | Begin | BeginBeside | Refuse


def decide(place: Place, block: Block) -> Answer:
    """Return how `block` takes part in what there is at `place`."""
    return _TABLE[block][place.found.value](place)


def beside() -> BeginBeside:
    """Return the answer for a block that always begins a unit of work of its own."""
    return BeginBeside(unit_around())


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
    ATOMIC_OPTIONS = "savepoint in a transaction with options"
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


def _begin_or_nest(place: Place) -> Answer:
    """Begin a transaction, as its options are of this block alone; but nest in that of a block around.

    Otherwise this block would end the transaction of the one around it, in which no statement has been made.
    """
    return Nest(place.usable_unit) if place.is_in_block else Begin(place.usable_unit)


def _commit_begin(place: Place) -> Answer:
    return Begin(place.usable_unit, "commit")


def _undo_begin(place: Place) -> Answer:
    return Begin(place.usable_unit, "rollback")


def _beside(place: Place) -> Answer:
    return beside()


def _without(place: Place) -> Answer:
    return BeginBeside(unit_around(), autocommit=True)


def _no_unit(place: Place) -> Answer:
    """Refuse code that needs the unit of work which it cannot use here."""
    if place.found is Found.NOTHING:
        return Refuse(ContextNotInitiatedError())
    if place.found in (Found.ENDED, Found.CUT_SHORT):
        return Refuse(ContextClosedError())
    if place.found is Found.OTHER_JOB:
        return Refuse(ContextNotInitiatedError(OTHER_JOB))
    assert place.unit is not None
    try:
        place.unit.check_usable()
    except CtxDBError as exc:
        return Refuse(exc)
    raise AssertionError("a unit of work that can be used was taken for one that cannot")


def _refusing(error: Callable[[str], CtxDBError], message: str) -> _Cell:
    """Return a cell that refuses the block by an `error`; ``{}`` in its message stands for the database."""
    return lambda place: Refuse(error(message.format(repr(place.db))))


_no_transaction = _refusing(
    TransactionRequiredError,
    "propagation='mandatory' was asked for, and there is no transaction here. Call this code in a unit of work "
    "(a request, `async with new_db_ctx():`), or in `async with transactional(db):`.",
)
_mere_session = _refusing(
    TransactionRequiredError,
    "propagation='mandatory' was asked for in a mere session of a TransactionContext, where nobody would commit. Call "
    "this code in its `transaction()`, or in `async with transactional(db):`.",
)
_autocommit = _refusing(
    TransactionRequiredError,
    "This block runs without a transaction, as `transactional` was asked to, so none can begin inside of it. Use "
    "`transactional(db)`, which begins one.",
)
_never = _refusing(
    TransactionAlreadyActiveError,
    "propagation='never' was asked for inside of a unit of work, which is a transaction. Call it outside of one, or "
    "suspend it: `transactional(db, 'not_supported')`.",
)
_begun = _refusing(
    TransactionAlreadyActiveError,
    "A transaction is open on {} already: commit it with `await commit_db_session(db)`, or choose another "
    "`current_transaction`.",
)
_no_nesting = _refusing(
    TransactionAlreadyActiveError,
    "A transaction is open on {} already: commit it first, leave out `allow_nested_transactions=False` for a savepoint "
    "in it, or use `new_transaction()`.",
)


# Where there is no unit of work that could be used, several rows agree. A block that commits by itself ignores an
# inherited unit that has ended, or that a scheduler's job has inherited, and begins a transaction. But if the unit has
# ended in the middle of the running code, the block is refused: that code expects all of its work to be committed
# together. It is also refused if the unit goes on in another task or thread. Only the blocks of a `TransactionContext`
# begin a session there, as each task has its own.
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
    Block.ATOMIC_SAVEPOINT: (_nest,         _nest,    _nest,         _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.ATOMIC_OPTIONS:   (_nest,  _begin_or_nest,  _nest,         _begin,        _autocommit,     *_NEEDS_UNIT),
    Block.SESSION:          (_join,         _join,    _join,         _join,         _join,           *_OR_OWN),
    Block.TRANSACTION:      (_nest,         _nest,    _begin,        _begin,        _autocommit,     *_OR_OWN),
    Block.NOT_NESTED:       (_no_nesting,   _nest,    _no_nesting,   _begin,        _autocommit,     *_OR_OWN),
    Block.REQUIRES_NEW:     (_beside,) * len(Found),
    Block.NEW:              (_beside,) * len(Found),
}
# fmt: on
