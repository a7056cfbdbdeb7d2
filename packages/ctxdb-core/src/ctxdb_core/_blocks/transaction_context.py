"""`TransactionContext`: sessions and transactions as blocks, for services, jobs and scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, TypeVarTuple, cast, overload

from sqlalchemy import CompoundSelect, CursorResult, Executable, Result, Select, UpdateBase
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.util import EMPTY_DICT

from ctxdb_core._blocks.atomic import transaction_on_session
from ctxdb_core._blocks.entry import Begin, BeginBeside, Block, Join, Refuse, decide
from ctxdb_core._blocks.place import Found, Place, find
from ctxdb_core._blocks.shared_session import SharedSessionBlock
from ctxdb_core._blocks.task_unit import TaskUnitBlock, open_task_unit
from ctxdb_core._databases.connect import DBConnect, SessionT_co, borrow
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core._units.unit_sessions import CreateSession
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ContextClosedError, NoSessionError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import _CoreAnyExecuteParams
    from sqlalchemy.orm._typing import OrmExecuteOptionsParameter

__all__ = ["TransactionContext"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Of any session class: the type is invariant.
SessionMaker = async_sessionmaker[Any]


class TransactionContext(Generic[SessionT_co]):
    """Sessions and transactions as ``async with`` blocks; code inside of them asks for no session, and is given none.

    A block opens a session of its own, which ends with it: `transaction` commits, or rolls back on an exception; after
    `session` and `new_session` nothing is committed that was not committed inside. Where a unit of work is open (in a
    request, under ``new_db_ctx()``), `session` and `transaction` share its session, and it alone commits. Either way
    ``await db_session(db)`` is the same session. A unit of work that has ended does not count, and neither does that of
    a request in whose context a scheduler has started this job.

    A session serves one task. A task that was started inside a block has no session until it opens a block of its own;
    only the session of a unit of work is shared by the tasks of that, and two of them cannot be in blocks at once.

    It is generic in the class of its sessions: that of the session maker, or of the `DBConnect`.

    Args:
        engine_or_db: the database. An engine stays its owner's, who disposes of it.
        default_session_maker: makes the sessions that this object opens; if it is bound to no engine, its sessions are
            bound to that of `engine_or_db`. By default, the `DBConnect`'s own, or one whose objects stay readable after
            a commit.
        auto_context_on_execute: whether `execute` opens a session for its one statement where there is none.
        auto_context_force_transaction: whether that session is committed even after a SELECT.

    Raises:
        TypeError: `engine_or_db` is neither an engine nor a `DBConnect`, or `default_session_maker` no session maker.
    """

    @overload
    def __init__(
        self: TransactionContext[AsyncSession],
        engine_or_db: AsyncEngine,
        *,
        default_session_maker: None = None,
        auto_context_on_execute: bool = False,
        auto_context_force_transaction: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        engine_or_db: DBConnect[SessionT_co],
        *,
        default_session_maker: None = None,
        auto_context_on_execute: bool = False,
        auto_context_force_transaction: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        engine_or_db: AsyncEngine | DBConnect[Any],
        *,
        default_session_maker: async_sessionmaker[SessionT_co],
        auto_context_on_execute: bool = False,
        auto_context_force_transaction: bool = False,
    ) -> None: ...

    def __init__(
        self,
        engine_or_db: AsyncEngine | DBConnect[Any],
        *,
        default_session_maker: SessionMaker | None = None,
        auto_context_on_execute: bool = False,
        auto_context_force_transaction: bool = False,
    ) -> None:
        if isinstance(engine_or_db, AsyncEngine):
            engine_or_db = borrow(engine_or_db)
        elif not isinstance(engine_or_db, DBConnect):
            raise ArgumentTypeError(f"{type_of(engine_or_db)} is given: an AsyncEngine or a DBConnect is needed.")
        _check_session_maker(default_session_maker, "`default_session_maker`")
        self._db: DBConnect = engine_or_db
        self._default_session_maker = default_session_maker
        self._auto_context_on_execute = auto_context_on_execute
        self._auto_context_force_transaction = auto_context_force_transaction

    @asynccontextmanager
    async def session(
        self, *, session_maker: SessionMaker | None = None, reuse_if_exists: bool = False
    ) -> AsyncIterator[SessionT_co]:
        """Open a session for a block, without a transaction: what is to stay is committed inside, as by `transaction`.

        In a unit of work, the block shares the unit's session, and leaves the end of that to the unit.

        Args:
            session_maker: makes the session, if one is opened.
            reuse_if_exists: whether the block may be inside another one of this task, whose session it shares.

        Raises:
            SessionAlreadyActiveError: it is inside another one, and `reuse_if_exists` is false; or another task of the
                unit of work is inside one.
            ContextClosedError: the unit of work has ended in the middle of a block around this one, or of a handler
                that a middleware has given up on.
            BaseException: what the block raised.
        """
        match decide(find(self._db, skip_other_contexts=True), Block.SESSION):
            case Join(unit):
                with SharedSessionBlock(unit, self._db, may_nest=reuse_if_exists, by_context=True, ends_work=False):
                    yield await self._share(unit, session_maker)
            case BeginBeside(around):
                async with self._open(around, session_maker, commits=False) as session:
                    yield cast("SessionT_co", session)
            case Refuse(error):
                raise error

    @asynccontextmanager
    async def transaction(
        self,
        *,
        session_maker: SessionMaker | None = None,
        reuse_if_exists: bool = True,
        allow_nested_transactions: bool = True,
    ) -> AsyncIterator[SessionT_co]:
        """Run a block in a transaction: committed at its end, rolled back by an exception.

        In a unit of work, and where a transaction is open already, the block goes on behind a savepoint, to which an
        exception rolls back. It is committed with the rest: by the unit of work, or by the block around this one.
        Inside of a block of `session`, which commits nothing, it is committed at the end of this block.

        Args:
            session_maker: makes the session, if one is opened.
            reuse_if_exists: whether the block may be inside another one of this task, whose session it shares.
            allow_nested_transactions: whether a transaction may be open already.

        Raises:
            SessionAlreadyActiveError: it is inside another one, and `reuse_if_exists` is false; or another task of the
                unit of work is inside one.
            TransactionAlreadyActiveError: a transaction is open, and `allow_nested_transactions` is false.
            TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
            ContextClosedError: the unit of work has ended in the middle of a block around this one, or of a handler
                that a middleware has given up on.
            BaseException: what the block raised, or the error of the commit.
        """
        block = Block.TRANSACTION if allow_nested_transactions else Block.NOT_NESTED
        place = find(self._db, skip_other_contexts=True)
        match decide(place, block):
            case BeginBeside(around):
                async with self._open(around, session_maker, commits=True) as session:
                    yield cast("SessionT_co", session)
                return
            case Refuse(error):
                raise error
        unit = place.usable_unit
        with SharedSessionBlock(unit, self._db, may_nest=reuse_if_exists, by_context=True):
            session = await self._share(unit, session_maker)
            # Another task may have begun a transaction meanwhile.
            match decide(place, block):
                case Begin():
                    async with transaction_on_session(unit, session, self._db):
                        yield session
                case Refuse(error):
                    raise error
                case _:
                    # The unit of work, or the block around this one, commits the transaction, which may not have begun.
                    async with session.begin_nested():
                        yield session

    @asynccontextmanager
    async def new_session(self, *, session_maker: SessionMaker | None = None) -> AsyncIterator[SessionT_co]:
        """Open another session for a block, independent of an open one; otherwise like `session`.

        It needs a connection of its own, beside that of the block or unit of work around it: see "A second connection"
        in docs/transactions.md for the size of the pool.

        Args:
            session_maker: makes the session.

        Raises:
            BaseException: what the block raised.
        """
        async with self._open_new(session_maker, commits=False) as session:
            yield cast("SessionT_co", session)

    @asynccontextmanager
    async def new_transaction(self, *, session_maker: SessionMaker | None = None) -> AsyncIterator[SessionT_co]:
        """Run a block in another session and a transaction that stands although one around it is rolled back.

        Args:
            session_maker: makes the session.

        Raises:
            BaseException: what the block raised, or the error of the commit.
        """
        async with self._open_new(session_maker, commits=True) as session:
            yield cast("SessionT_co", session)

    @overload
    def get_session(self, strict: Literal[True] = True) -> SessionT_co: ...  # noqa: FBT002 - also given by position

    @overload
    def get_session(self, strict: bool) -> SessionT_co | None: ...  # noqa: FBT001 - as above

    def get_session(self, strict: bool = True) -> SessionT_co | None:  # noqa: FBT001, FBT002 - as above
        """Return the session of the block around this code, or of its unit of work.

        Args:
            strict: whether it is an error if there is no session; else ``None`` is returned.

        Raises:
            NoSessionError: there is no session, and `strict` is true.
            ContextClosedError: the block or unit of work that this code was started in has ended; with `strict` alone,
                unless it has ended in the middle of this code.
        """
        place = find(self._db, skip_other_contexts=True)
        match decide(place, Block.SESSION):
            case Refuse(error):
                raise error
            case BeginBeside():
                if strict:
                    raise _why_no_session(place)
                return None
        unit = place.usable_unit
        session = unit.sessions.get(self._db)
        if session is None:
            session = unit.create_session_at_once(self._db, self._create_at_once)
            if session is not None:
                return cast("SessionT_co", unit.adopt_session(self._db, session))
            if strict:
                raise NoSessionError(
                    "The unit of work has no session here yet, and making one takes an `await`: enter `session()` or "
                    "`transaction()`, or call `await db_session(db)`, before `get_session()`."
                )
        return cast("SessionT_co | None", session)

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
            ContextClosedError: the block or unit of work that this code was started in has ended, and
                `auto_context_on_execute` is false; or it has ended in the middle of this code.
            BaseException: the error of the statement, or of the commit.
        """
        place = find(self._db, skip_other_contexts=True)
        match decide(place, Block.SESSION):
            case Join(unit):
                session = await self._share(unit)
                return await session.execute(
                    statement, params, execution_options=execution_options, bind_arguments=bind_arguments
                )
            case BeginBeside(around) if self._auto_context_on_execute:
                pass
            case Refuse(error):
                raise error
            case _:
                raise _why_no_session(place)
        if force_transaction is None:
            force_transaction = self._auto_context_force_transaction
        async with self._open(around, commits=force_transaction or _may_write(statement)) as opened:
            # The caller reads the objects of the result after the commit, which must not expire them.
            opened.sync_session.expire_on_commit = False
            return await opened.execute(
                statement, params, execution_options=execution_options, bind_arguments=bind_arguments
            )

    def _open_new(self, session_maker: SessionMaker | None, *, commits: bool) -> TaskUnitBlock:
        answer = decide(find(self._db, skip_other_contexts=True), Block.NEW)
        assert isinstance(answer, BeginBeside)
        return self._open(answer.around, session_maker, commits=commits)

    def _open(
        self, around: UnitOfWork | None, session_maker: SessionMaker | None = None, *, commits: bool
    ) -> TaskUnitBlock:
        return open_task_unit(self._db, self._creator(session_maker), commits=commits, outer=around)

    async def _share(self, unit: UnitOfWork, session_maker: SessionMaker | None = None) -> SessionT_co:
        return cast("SessionT_co", await unit.open_session(self._db, self._creator(session_maker)))

    def _creator(self, session_maker: SessionMaker | None) -> CreateSession | None:
        _check_session_maker(session_maker, "`session_maker`")
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
        # A session that the database has made itself is followed already.
        self._db._follow(session, self._db.host or "")  # noqa: SLF001 - the core's own
        return session


def _why_no_session(place: Place) -> Exception:
    match place.found:
        case Found.NOTHING:
            return NoSessionError()
        case Found.ENDED:
            return ContextClosedError()
        case _:
            return NoSessionError(
                "There is no session here: the one that was found belongs to another task or thread, and a session "
                "serves the task that opened it. Wrap what this task does in `async with context.transaction():` or "
                "`async with context.session():`."
            )


def _check_session_maker(maker: object, name: str) -> None:
    if maker is not None and not isinstance(maker, async_sessionmaker):
        raise ArgumentTypeError(
            f"{type_of(maker)} is given as {name}, which takes an `async_sessionmaker`: for instance "
            "`async_sessionmaker(class_=YourSession, expire_on_commit=False)`."
        )


def _is_bound(maker: SessionMaker) -> bool:
    return maker.kw.get("bind") is not None or bool(maker.kw.get("binds"))


def _may_write(statement: Executable) -> bool:
    if not isinstance(statement, Select | CompoundSelect):
        return True
    # PostgreSQL: WITH new AS (INSERT ... RETURNING ...) SELECT ... FROM new
    return any(isinstance(element, UpdateBase) for element in iterate(statement))
