"""`TransactionContext`: sessions and transactions as blocks, for services, jobs and scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple, overload

from sqlalchemy import CompoundSelect, CursorResult, Executable, Result, Select, UpdateBase
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.util import EMPTY_DICT

from ctxdb_core._blocks.atomic import atomic_db_session, require_transactions
from ctxdb_core._blocks.task_unit import CommitDebt, TaskUnit, TaskUnitBlock, Visit, open_task_unit
from ctxdb_core._databases.borrowed import BorrowedEngine
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.sessions import commit_db_session
from ctxdb_core._units.unit import CreateSession, UnitOfWork, current_unit
from ctxdb_core.errors import ArgumentTypeError, ContextClosedError, NoSessionError, TransactionAlreadyActiveError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import _CoreAnyExecuteParams
    from sqlalchemy.orm._typing import OrmExecuteOptionsParameter

__all__ = ["TransactionContext"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Of any session class: the type is invariant.
SessionMaker = async_sessionmaker[Any]


class TransactionContext:
    """Sessions and transactions as ``async with`` blocks; code inside of them asks for no session, and is given none.

    A block opens a session of its own, which ends with it: `transaction` commits, or rolls back on an exception; after
    `session` and `new_session` nothing is committed that was not committed inside. Where a unit of work is open (in a
    request, under ``new_db_ctx()``), `session` and `transaction` share its session, and it alone commits. Either way
    ``await db_session(db)`` is the same session.

    A session serves one task. A task that was started inside a block has no session until it opens a block of its own;
    only the session of a unit of work is shared by the tasks of that, and two of them cannot be in blocks at once.

    Args:
        engine_or_db: where. An engine stays its owner's, who disposes of it.
        default_session_maker: makes the sessions that are opened here; it is bound to the database if it is bound to
            nothing. By default, the `DBConnect`'s own, or one whose objects stay readable after a commit.
        auto_context_on_execute: whether `execute` opens a session for its one statement where there is none.
        auto_context_force_transaction: whether it is committed even after a SELECT.

    Raises:
        TypeError: `engine_or_db` is neither.
    """

    def __init__(
        self,
        engine_or_db: AsyncEngine | DBConnect,
        *,
        default_session_maker: SessionMaker | None = None,
        auto_context_on_execute: bool = False,
        auto_context_force_transaction: bool = False,
    ) -> None:
        if isinstance(engine_or_db, AsyncEngine):
            engine_or_db = BorrowedEngine.of(engine_or_db)
        elif not isinstance(engine_or_db, DBConnect):
            raise ArgumentTypeError(f"{type(engine_or_db).__name__} is given: an AsyncEngine or a DBConnect is needed.")
        self._db: DBConnect = engine_or_db
        self._default_session_maker = default_session_maker
        self._auto_context_on_execute = auto_context_on_execute
        self._auto_context_force_transaction = auto_context_force_transaction

    @asynccontextmanager
    async def session(
        self, *, session_maker: SessionMaker | None = None, reuse_if_exists: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """Open a session for a block, without a transaction: what is to stay is committed inside, as by `transaction`.

        In a unit of work, this is its session, and ending it is left to it.

        Args:
            session_maker: makes the session, if one is opened.
            reuse_if_exists: whether the block may be inside another one of this task, whose session it shares.

        Raises:
            SessionAlreadyActiveError: it is inside another one, and `reuse_if_exists` is false; or another task of the
                unit of work is inside one.
            ContextClosedError: the unit of work that this code was started in has ended.
            BaseException: what the block raised.
        """
        unit = self._unit()
        if unit is None:
            async with self._open(session_maker, commits=False) as session:
                yield session
            return
        with Visit(unit, self._db, nested=reuse_if_exists, by_context=True):
            yield await self._share(unit, session_maker)

    @asynccontextmanager
    async def transaction(
        self,
        *,
        session_maker: SessionMaker | None = None,
        reuse_if_exists: bool = True,
        allow_nested_transactions: bool = True,
    ) -> AsyncIterator[AsyncSession]:
        """Run a block in a transaction: committed at its end, rolled back by an exception.

        In a unit of work, and where a transaction is open already, the block goes on behind a savepoint, to which an
        exception rolls back. It is committed with the rest: by the unit of work, or by the block around this one. In a
        mere `session`, where nobody would, it is committed with this block.

        Args:
            session_maker: makes the session, if one is opened.
            reuse_if_exists: whether the block may be inside another one of this task, whose session it shares.
            allow_nested_transactions: whether a transaction may be open already.

        Raises:
            SessionAlreadyActiveError: it is inside another one, and `reuse_if_exists` is false; or another task of the
                unit of work is inside one.
            TransactionAlreadyActiveError: a transaction is open, and `allow_nested_transactions` is false.
            TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
            ContextClosedError: the unit of work that this code was started in has ended.
            BaseException: what the block raised, or the error of the commit.
        """
        unit = self._unit()
        if unit is None:
            async with self._open(session_maker, commits=True) as session:
                yield session
            return
        with Visit(unit, self._db, nested=reuse_if_exists, by_context=True):
            session = await self._share(unit, session_maker)
            if in_transaction(session) and not allow_nested_transactions:
                raise TransactionAlreadyActiveError(
                    f"A transaction is open on {self._db!r} already: commit it first, leave out "
                    "`allow_nested_transactions=False` for a savepoint in it, or use `new_transaction()`."
                )
            if not isinstance(unit, TaskUnit) or unit.is_transaction():
                # The unit of work, or the block around this one, is the transaction, begun or not, and commits it.
                require_transactions(unit)
                async with session.begin_nested():
                    yield session
                return
            with CommitDebt(unit, session) as owes_commit:
                async with atomic_db_session(self._db, current_transaction="savepoint"):
                    if not in_transaction(session):
                        await session.begin()
                    yield session
                if owes_commit:
                    await commit_db_session(self._db)

    @asynccontextmanager
    async def new_session(self, *, session_maker: SessionMaker | None = None) -> AsyncIterator[AsyncSession]:
        """Open another session for a block, independent of one that is open: as `session` otherwise.

        Args:
            session_maker: makes the session.

        Raises:
            BaseException: what the block raised.
        """
        async with self._open(session_maker, commits=False) as session:
            yield session

    @asynccontextmanager
    async def new_transaction(self, *, session_maker: SessionMaker | None = None) -> AsyncIterator[AsyncSession]:
        """Run a block in another session and its transaction, committed at its end whatever becomes of those around it.

        Args:
            session_maker: makes the session.

        Raises:
            BaseException: what the block raised, or the error of the commit.
        """
        async with self._open(session_maker, commits=True) as session:
            yield session

    @overload
    def get_session(self, strict: Literal[True] = True) -> AsyncSession: ...  # noqa: FBT002 - also given by position

    @overload
    def get_session(self, strict: bool) -> AsyncSession | None: ...  # noqa: FBT001 - as above

    def get_session(self, strict: bool = True) -> AsyncSession | None:  # noqa: FBT001, FBT002 - as above
        """Return the session of the block around this code, or of its unit of work.

        Args:
            strict: whether there must be one; else, ``None`` is returned where there is none.

        Raises:
            NoSessionError: there is none.
            ContextClosedError: the block or unit of work that this code was started in has ended.
        """
        unit = self._unit()
        if unit is None:
            if strict:
                raise self._why_no_session()
            return None
        unit.check_usable()
        session = unit.sessions.get(self._db)
        if session is None:
            session = unit.create_session_at_once(self._db, self._create_at_once)
            if session is not None:
                return unit.adopt_session(self._db, session)
            if strict:
                raise NoSessionError(
                    "The unit of work has no session here yet, and making one takes an `await`: enter `session()` or "
                    "`transaction()`, or call `await db_session(db)`, before `get_session()`."
                )
        return session

    # One column and several: SQLAlchemy 2.0 has one parameter for the row's type, 2.1 has one for each column.
    @overload
    async def execute(
        self,
        statement: TypedReturnsRows[T],
        params: _CoreAnyExecuteParams | None = None,
        *,
        force_transaction: bool | None = None,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[T]: ...

    @overload
    async def execute(  # type: ignore[overload-cannot-match]  # it does, for rows of several columns
        self,
        statement: TypedReturnsRows[*Ts],
        params: _CoreAnyExecuteParams | None = None,
        *,
        force_transaction: bool | None = None,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[*Ts]: ...

    @overload
    async def execute(
        self,
        statement: UpdateBase,
        params: _CoreAnyExecuteParams | None = None,
        *,
        force_transaction: bool | None = None,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: dict[str, Any] | None = None,
    ) -> CursorResult[*tuple[Any, ...]]: ...

    @overload
    async def execute(
        self,
        statement: Executable,
        params: _CoreAnyExecuteParams | None = None,
        *,
        force_transaction: bool | None = None,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[*tuple[Any, ...]]: ...

    async def execute(
        self,
        statement: Executable,
        params: _CoreAnyExecuteParams | None = None,
        *,
        force_transaction: bool | None = None,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
    ) -> Result[Any]:
        """Execute a statement on the session of the block around this code, or of its unit of work.

        With `auto_context_on_execute`, and where there is no session, one is opened for this statement: a plain one for
        a SELECT, a transaction for anything else. The result, its rows and objects stay usable afterwards.

        Args:
            statement: the statement.
            params: its parameters, or a list of such for each of several executions.
            force_transaction: whether a session that is opened for a SELECT is committed, too; by default, what
                `auto_context_force_transaction` says.
            execution_options: as ``AsyncSession.execute``.
            bind_arguments: as ``AsyncSession.execute``.

        Raises:
            NoSessionError: there is no session, and `auto_context_on_execute` is false.
            ContextClosedError: the block or unit of work that this code was started in has ended.
            BaseException: the error of the statement, or of the commit.
        """
        unit = self._unit()
        if unit is not None:
            session = await self._share(unit)
            return await session.execute(
                statement, params, execution_options=execution_options, bind_arguments=bind_arguments
            )
        if not self._auto_context_on_execute:
            raise self._why_no_session()
        if force_transaction is None:
            force_transaction = self._auto_context_force_transaction
        async with self._open(commits=force_transaction or _may_write(statement)) as session:
            # What is returned is read after the commit.
            session.sync_session.expire_on_commit = False
            return await session.execute(
                statement, params, execution_options=execution_options, bind_arguments=bind_arguments
            )

    def _unit(self) -> UnitOfWork | None:
        """Return the unit of work whose session the running code shares, if any: a block of its task, or a request's.

        One that has ended is returned as well, unless it is a block's: it raises the error that says so.
        """
        unit = self._innermost()
        if isinstance(unit, TaskUnit):
            return unit if unit.serves() else None
        if unit is None or unit.thread == get_ident() or unit.shared:
            # A test's says that it cannot be used here: what was done past it would not be undone with it.
            return unit
        return None

    def _innermost(self) -> UnitOfWork | None:
        unit = current_unit.get(None)
        while isinstance(unit, TaskUnit) and unit.db is not self._db:
            unit = unit.outer
        return unit

    def _why_no_session(self) -> Exception:
        unit = self._innermost()
        if unit is None:
            return NoSessionError()
        if isinstance(unit, TaskUnit) and unit.over:
            return ContextClosedError()
        return NoSessionError(
            "There is no session here: the one that was found belongs to another task or thread, and a session serves "
            "the task that opened it. Wrap what this task does in `async with context.transaction():` or "
            "`async with context.session():`."
        )

    def _open(self, session_maker: SessionMaker | None = None, *, commits: bool) -> TaskUnitBlock:
        return open_task_unit(self._db, self._creator(session_maker), commits=commits)

    async def _share(self, unit: UnitOfWork, session_maker: SessionMaker | None = None) -> AsyncSession:
        return await unit.open_session(self._db, self._creator(session_maker))

    def _creator(self, session_maker: SessionMaker | None) -> CreateSession | None:
        maker = session_maker or self._default_session_maker
        return None if maker is None else partial(self._create, maker)

    async def _create(self, maker: SessionMaker) -> AsyncSession:
        if _is_bound(maker):
            return self._made_by(maker)
        # Asks `before_create_session_handler` for the host first.
        await self._db.session_maker()
        return self._made_by(maker, bind=await self._db.engine())

    def _create_at_once(self) -> AsyncSession | None:
        maker = self._default_session_maker
        if maker is not None and _is_bound(maker):
            return self._made_by(maker)
        session = self._db.create_session_at_once()
        if maker is not None and session is not None:
            session = self._made_by(maker, bind=session.bind)
        return session

    def _made_by(self, maker: SessionMaker, **options: Any) -> AsyncSession:
        session: AsyncSession = maker(**options)
        # What the database has made itself is followed already.
        self._db._follow(session, self._db.host or "")  # noqa: SLF001 - the core's own
        return session


def _is_bound(maker: SessionMaker) -> bool:
    return maker.kw.get("bind") is not None or bool(maker.kw.get("binds"))


def _may_write(statement: Executable) -> bool:
    if not isinstance(statement, Select | CompoundSelect):
        return True
    # PostgreSQL: WITH new AS (INSERT ... RETURNING ...) SELECT ... FROM new
    return any(isinstance(element, UpdateBase) for element in iterate(statement))
