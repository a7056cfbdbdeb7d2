"""A test's own unit of work, and sessions whose work is rolled back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar, cast

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._databases.connect import DBConnect, SessionT, check_database
from ctxdb_core._shield import run_to_completion
from ctxdb_core._units import session_end
from ctxdb_core._units.leak import LeakGuard
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core.errors import ArgumentTypeError, ContextNotInitiatedError
from ctxdb_core.testing._confinement import confine, onto
from ctxdb_core.testing._driver import backend_pid_of, own_backends
from ctxdb_core.testing._engines import is_autocommit


@asynccontextmanager
async def rollback_session(db: DBConnect[SessionT]) -> AsyncIterator[SessionT]:
    """Open a session whose transaction is rolled back at the end of the block, also if it was committed inside of it.

    Its commits release savepoints. Sessions of the application see nothing of it, unless they are put on the same
    connection by `put_savepoint_session_in_ctx`.

    Raises:
        SharedTransactionError: the session's own ``get_bind`` leads to another database.
        BaseException: what the block raised.
    """
    check_database(db)
    maker = await db.session_maker()
    engine = await db.engine()
    async with engine.connect() as connection:
        maker = confine(maker, onto(connection, "this rollback_session()"))
        if is_autocommit(engine):
            session = maker(bind=connection)
        else:
            await _begin(connection)
            session = maker(bind=connection, join_transaction_mode="create_savepoint")
        raw = await connection.get_raw_connection()
        backend_pid = backend_pid_of(engine.sync_engine, raw.dbapi_connection)
        if backend_pid is not None:
            own_backends.add(backend_pid)
        try:
            yield session
        except BaseException as exc:
            await run_to_completion(_end(session, connection, exc))
            raise
        finally:
            own_backends.discard(backend_pid)
        await run_to_completion(_end(session, connection, None))


async def _begin(connection: AsyncConnection) -> None:
    await connection.begin()
    if connection.dialect.name == "sqlite":
        # With ``isolation_level=None``, the driver begins no transaction: what the session commits would be stored.
        raw = await connection.get_raw_connection()
        if not getattr(raw.driver_connection, "in_transaction", False):
            await connection.exec_driver_sql("BEGIN")


async def _end(session: AsyncSession, connection: AsyncConnection, error: BaseException | None) -> None:
    await session_end.close(session, error, "a rollback_session")
    await connection.rollback()


class _TestUnit(UnitOfWork):
    """A unit of work that an adapter joins instead of opening one for its request."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.savepoint_sessions: dict[DBConnect, Callable[[], AsyncSession]] = {}
        """By database, the functions that make sessions on a connection of the test."""
        self.stand_ins: dict[DBConnect, Any] = {}
        """What the test has put in the place of sessions: mocks, for instance. They are not among `sessions`."""

    async def open_session(
        self, db: DBConnect, create: Callable[[], Awaitable[AsyncSession]] | None = None
    ) -> AsyncSession:
        if db in self.stand_ins:
            self.check_usable()
            stand_in: AsyncSession = self.stand_ins[db]
            return stand_in
        create_on_connection = self.savepoint_sessions.get(db)
        if create_on_connection is None or db in self.sessions:
            return await super().open_session(db, create)
        self.check_usable()
        return self.adopt_session(db, create_on_connection())

    def create_session_at_once(self, db: DBConnect, create: Callable[[], AsyncSession | None]) -> AsyncSession | None:
        return self.savepoint_sessions.get(db, create)()

    async def commit(self, dbs: Collection[DBConnect] | None = None, *, ends_body: bool = False) -> None:
        for stand_in in self._stand_ins_on(dbs):
            await stand_in.commit()
        await super().commit(dbs, ends_body=ends_body)

    async def roll_back(self, error: BaseException | None = None, dbs: Collection[DBConnect] | None = None) -> None:
        for stand_in in self._stand_ins_on(dbs):
            await stand_in.rollback()
        await super().roll_back(error, dbs)

    async def close_session(self, db: DBConnect, *args: Any) -> None:
        for stand_in in self._stand_ins_on([db]):
            await stand_in.close()
        await super().close_session(db, *args)

    def _stand_ins_on(self, dbs: Collection[DBConnect] | None) -> list[Any]:
        # Only the calls of the code under test, not those that end the unit itself.
        return [self.stand_ins[db] for db in dbs or () if db in self.stand_ins]

    def leave_sessions(self) -> None:
        """End the unit, and leave its sessions to the test, which has to end their transactions."""
        for db, session in self.sessions.items():
            if session_end.in_transaction(session):
                guard = LeakGuard([db], _LEFT)
                # Kept by the session, and by nothing else.
                session.sync_session.info[_GUARD] = guard
                event.listen(session.sync_session, "after_transaction_end", _disarm)
        self.hand_over_sessions()


_GUARD = "ctxdb.left_by_test"
_LEFT = (
    "A session on {} that `set_test_context()` has left to its test was garbage-collected in mid transaction. Close it "
    "in the test, let `set_test_context(auto_close=True)` commit and close it, or put it on a connection that is "
    "rolled back, by `put_savepoint_session_in_ctx`."
)


def _disarm(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info[_GUARD].disarm()


@asynccontextmanager
async def set_test_context(auto_close: bool = False) -> AsyncIterator[None]:  # noqa: FBT001, FBT002 - its published form
    """Open a unit of work for a test: adapters join it, so that test and application have the same sessions.

    The application's transactions are then ended by the test and not when its response starts. To test that they are,
    use `shared_transaction`.

    Args:
        auto_close: whether the unit's sessions are committed (or rolled back, if the block raises) and closed at the
            end. Without it, the test has to commit, roll back or close them; a session that it forgets in mid
            transaction causes a ``ResourceWarning``. `put_savepoint_session_in_ctx` closes its own.

    Raises:
        BaseException: what the block raised, or the error of a commit.
    """
    unit = _TestUnit()
    unit.enter()
    try:
        try:
            yield
        except BaseException as exc:
            if auto_close:
                await unit.finish(commit=False, error=exc)
            raise
        if auto_close:
            await unit.finish(commit=True)
    finally:
        unit.leave_sessions()
        unit.leave()


@asynccontextmanager
async def put_savepoint_session_in_ctx(db: DBConnect[SessionT], session: AsyncSession) -> AsyncIterator[SessionT]:
    """Give the test's unit of work a session on the connection of `session`, whose commits only release savepoints.

    To be used inside of `set_test_context`. The test sees by `session` what the application has written, and rolls all
    of it back. What the application does in units of work of their own (`run_in_new_ctx`) is not part of it:
    `shared_transaction` includes that.

    Args:
        db: the database that the application will ask `db_session` for.
        session: the test's session, for instance of `rollback_session`.

    Returns:
        The application's session.

    Raises:
        ContextNotInitiatedError: there is no `set_test_context` around it.
    """
    check_database(db)
    unit = _test_unit("put_savepoint_session_in_ctx")
    if not isinstance(session, AsyncSession):
        raise ArgumentTypeError(
            f"put_savepoint_session_in_ctx(db, session) takes an AsyncSession second, not {type(session).__name__}: "
            "what `async with rollback_session(db) as session:` yields, for instance."
        )
    await unit.close_session(db)
    connection = await session.connection()
    maker = confine(await db.session_maker(), onto(connection, "the test's session"))
    unit.savepoint_sessions[db] = partial(maker, bind=connection, join_transaction_mode="create_savepoint")
    try:
        yield cast("SessionT", await unit.open_session(db))
    finally:
        del unit.savepoint_sessions[db]
        if not unit.closed:
            await unit.close_session(db)


@asynccontextmanager
async def put_session_in_ctx(db: DBConnect, session: T) -> AsyncIterator[T]:
    """Put a mock, or another object of the test, in the place of the session on `db`.

    To be used inside of `set_test_context`. `db_session(db)` returns it as it is. `commit_db_session`,
    `rollback_db_session` and `close_db_session` await its ``commit()``, ``rollback()`` and ``close()``, and so do the
    blocks of `atomic_db_session` at their ends. At the end of the test's unit of work, nothing is called: the test
    asserts what the code has called.

    Args:
        db: the database that the code will ask `db_session` for.
        session: for instance ``AsyncMock(spec=AsyncSession)``.

    Returns:
        The same object.

    Raises:
        ContextNotInitiatedError: there is no `set_test_context` around it.
    """
    check_database(db)
    unit = _test_unit("put_session_in_ctx")
    await unit.close_session(db)
    if not isinstance(getattr(session, "sync_session", None), Session):
        with suppress(AttributeError):
            # Blocks ask a stand-in whether a transaction is open: a stand-in has none.
            session.sync_session = Session()  # type: ignore[attr-defined]  # mocks take what they are given
    unit.stand_ins[db] = session
    try:
        yield session
    finally:
        del unit.stand_ins[db]


T = TypeVar("T")


def _test_unit(function: str) -> _TestUnit:
    unit = current_unit.get(None)
    if not isinstance(unit, _TestUnit):
        raise ContextNotInitiatedError(
            f"{function}() needs the unit of work of a test: call it inside of `async with set_test_context():`, or in "
            "a test that has the fixture `ctxdb_test_context`."
        )
    unit.check_usable()
    return unit
