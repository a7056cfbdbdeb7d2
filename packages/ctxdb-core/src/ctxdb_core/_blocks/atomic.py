"""`atomic_db_session`: a block with a transaction of its own on the current unit's session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias, get_args

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._blocks.task_unit import CommitDebt, Visit
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._transactions.isolation import NO_OPTIONS, IsolationLevel, TransactionOptions
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.sessions import check_no_block, db_session, unit_for
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.errors import ArgumentValueError, TransactionAlreadyActiveError, TransactionRequiredError

__all__ = ["CurrentTransaction", "atomic_db_session", "require_transactions"]

CurrentTransaction: TypeAlias = Literal["commit", "rollback", "append", "raise", "savepoint"]
"""What `atomic_db_session` does with a transaction that is open already."""


@asynccontextmanager
async def atomic_db_session(
    db: DBConnect,
    current_transaction: CurrentTransaction = "commit",
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
) -> AsyncIterator[AsyncSession]:
    """Run a block in a transaction of its own on the current unit's session: committed at its end, or rolled back.

    Args:
        db: where.
        current_transaction: what to do with a transaction that is open already:

            - ``"commit"`` it, and begin a new one;
            - ``"rollback"``: roll it back, and begin a new one;
            - ``"append"``: go on in it, and commit all of it at the end of the block;
            - ``"raise"`` an error;
            - ``"savepoint"``: go on in it behind a savepoint, to which an error rolls back; it stays open after the
              block. Without an open transaction, the block gets one of its own.
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
        raise ArgumentValueError(f"current_transaction={current_transaction!r} is none of {modes}.")
    options = TransactionOptions(isolation_level, read_only) if isolation_level or read_only else NO_OPTIONS
    unit = unit_for(db)
    require_transactions(unit)
    session = await db_session(db)
    with Visit(unit, db, nested=True):
        if options:
            options.check(session, db)
        if in_transaction(session):
            if current_transaction in _ENDS_TRANSACTION:
                check_no_block(session, db, savepoints_only=current_transaction == "append")
            if current_transaction in ("append", "savepoint"):
                # If the block cannot go on in this transaction, that one stays as it is.
                await options.apply(session, db)
            if current_transaction == "savepoint":
                async with session.begin_nested():
                    yield session
                return
            if current_transaction == "raise":
                raise TransactionAlreadyActiveError(
                    f"A transaction is open on {db!r} already: commit it with `await commit_db_session(db)`, or choose "
                    "another `current_transaction`."
                )
            if current_transaction == "commit":
                await unit.commit([db])
            elif current_transaction == "rollback":
                await unit.roll_back(None, [db])
        try:
            if options and not in_transaction(session):
                await options.apply(session, db)
            with CommitDebt(unit, session):
                yield session
        except BaseException as exc:
            await unit.roll_back(exc, [db])
            raise
        # If the unit has ended under the block, so has its transaction.
        unit.check_usable()
        await unit.commit([db])


def require_transactions(unit: UnitOfWork) -> None:
    """Raise the error that says so if the sessions of `unit` have no transactions."""
    if unit.autocommit:
        raise TransactionRequiredError(
            "This block runs without a transaction, as `transactional` was asked to, and so would what is in here. Use "
            "`transactional(db)`, which begins one."
        )


_ENDS_TRANSACTION = ("commit", "rollback", "append")
