"""`atomic_db_session`: a block with a transaction of its own on the current unit's session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias, cast, get_args

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._blocks.entry import Begin, Block, Nest, Refuse, decide
from ctxdb_core._blocks.place import find
from ctxdb_core._blocks.shared_session import SharedSessionBlock
from ctxdb_core._blocks.task_unit import OuterCommit
from ctxdb_core._databases.connect import DBConnect, SessionT, check_database
from ctxdb_core._sqlalchemy.task_blocks import hold_block
from ctxdb_core._transactions.isolation import NO_OPTIONS, IsolationLevel, TransactionOptions
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.session_functions import check_no_block, commit_db_session
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.errors import ArgumentValueError

__all__ = ["CurrentTransaction", "atomic_db_session", "transaction_on_session"]

CurrentTransaction: TypeAlias = Literal["commit", "rollback", "append", "raise", "savepoint"]
"""What `atomic_db_session` does with a transaction that is open already."""


@asynccontextmanager
async def atomic_db_session(
    db: DBConnect[SessionT],
    current_transaction: CurrentTransaction = "commit",
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
) -> AsyncIterator[SessionT]:
    """Run a block in a transaction of its own on the current unit's session: committed at its end, or rolled back.

    Args:
        db: where.
        current_transaction: what to do with a transaction that is open already:

            - ``"commit"`` it, and begin a new one;
            - ``"rollback"``: roll it back, and begin a new one;
            - ``"append"``: go on in it, and commit all of it at the end of the block;
            - ``"raise"`` an error;
            - ``"savepoint"``: go on in it behind a savepoint, to which an error rolls back; it stays open after the
              block. If none is open, one is begun before the savepoint: the block is committed, or undone, with the
              unit. But with one of the options below, the block gets a transaction of its own then.
        isolation_level: of the block's transaction alone, which takes its connection when the block begins. To go on in
            a transaction that is open, it must have this level already.
        read_only: have the database refuse writes, in the block's transaction alone; to go on in a transaction that is
            open, it must be read-only already.

    Raises:
        ValueError: `current_transaction` is none of these, or the database has no such `isolation_level`; nothing has
            been ended then.
        TransactionOptionsError: the transaction to go on in has another isolation level, or may write; or there can be
            no transaction with one (`DBConnect.from_url(..., read_only=True)`).
        TransactionAlreadyActiveError: a transaction is open, and ``"raise"`` was asked for; or this is inside of a
            block of the session (``async with session.begin_nested():``) that would be ended with it.
        SessionAlreadyActiveError: another task of the unit of work is inside of such a block, and does not wait for
            this one.
        TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        BaseException: what the block raised, or the error of a commit.
    """
    if current_transaction not in get_args(CurrentTransaction):
        modes = ", ".join(map(repr, get_args(CurrentTransaction)))
        raise ArgumentValueError(f"current_transaction={current_transaction!r} is not one of {modes}.")
    options = TransactionOptions(isolation_level, read_only) if isolation_level or read_only else NO_OPTIONS
    check_database(db)
    block, place = Block(current_transaction), find(db)
    if options and block is Block.ATOMIC_SAVEPOINT:
        block = Block.ATOMIC_OPTIONS
    answer = decide(place, block)
    if isinstance(answer, Refuse):
        raise answer.error
    unit = place.usable_unit
    session = cast("SessionT", await unit.open_session(db))
    with SharedSessionBlock(unit, db), hold_block(session.sync_session):
        if options:
            options.check(session, db)
        # Another task may have begun a transaction meanwhile.
        match decide(place, block):
            case Refuse(error):
                raise error
            case Nest():
                await options.apply(session, db)
                async with session.begin_nested():
                    yield session
                return
            case Begin(first=first) if in_transaction(session):
                check_no_block(session, db, savepoints_only=first is None)
                if first == "commit":
                    await unit.commit([db])
                elif first == "rollback":
                    await unit.roll_back(None, [db])
                else:
                    # A block that cannot go on in the open transaction leaves that transaction as it is.
                    await options.apply(session, db)
        try:
            if options and not in_transaction(session):
                await options.apply(session, db)
            with OuterCommit(unit, session):
                yield session
        except BaseException as exc:
            await unit.roll_back(exc, [db])
            raise
        # A unit that has ended during the block has ended the transaction as well.
        unit.check_usable()
        await unit.commit([db])


@asynccontextmanager
async def transaction_on_session(
    unit: UnitOfWork, session: AsyncSession, db: DBConnect, options: TransactionOptions = NO_OPTIONS
) -> AsyncIterator[None]:
    """Run a block in a transaction on a mere session: what its statements have begun already is committed with it.

    Args:
        unit: the unit of work of the session.
        session: the session. No other code is going to commit a transaction of it.
        db: where it is.
        options: what the transaction is to be begun with, or must have.

    Raises:
        BaseException: as `atomic_db_session`.
    """
    # A savepoint would nest in the block of the mere session, which commits nothing.
    mode: CurrentTransaction = "savepoint" if in_transaction(session) else "append"
    with OuterCommit(unit, session) as owes_commit:
        async with atomic_db_session(db, mode, isolation_level=options.isolation_level, read_only=options.read_only):
            if not in_transaction(session):
                await session.begin()
            yield
        if owes_commit:
            await commit_db_session(db)
