"""`shared_transaction`: test and application on one connection, whose transaction is rolled back at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from ctxdb_core._databases.connect import DBConnect, SessionT, check_database
from ctxdb_core._databases.engines import Replacement
from ctxdb_core._databases.url import sqlite_file
from ctxdb_core._shield import run_to_completion
from ctxdb_core._units import session_end
from ctxdb_core.testing._confinement import check_same_database, confine
from ctxdb_core.testing._engines import SHARED_DRIVER, create_shared_engine
from ctxdb_core.testing._errors import SharedTransactionError
from ctxdb_core.testing._shared_connection import SharedConnection
from ctxdb_core.testing._thread import LoopThread

WAIT_SECONDS = 3.0
"""How long a transaction waits for another one's end before that is taken for a deadlock."""


class SharedTransaction:
    """One shared transaction, from its begin to its end, which may be called on any event loop or on none.

    Args:
        thread: where the connection lives.
        dbs: the database as the application knows it: by one `DBConnect`, or by several.
        timeout: as of `shared_transaction`.
        private: whether the application is left alone, so that only the test's session is on the connection.
    """

    def __init__(
        self, thread: LoopThread, dbs: tuple[DBConnect, ...], timeout: float, *, private: bool = False
    ) -> None:
        self._private = private
        # Without duplicates: engines that are replaced twice would be put back twice.
        self._dbs = tuple(dict.fromkeys(dbs))
        self._claimed: tuple[DBConnect, ...] = ()
        self._shared = SharedConnection(thread, timeout)
        self._originals: dict[DBConnect, AsyncEngine] = {}
        self._replacements: list[tuple[DBConnect, Replacement]] = []
        self._guarded: list[Engine] = []
        self._chosen: dict[object, Engine] = {}
        """Engines for sessions that have chosen one by themselves."""
        self.session: AsyncSession | None = None
        """The test's session, once the transaction has begun."""

    async def begin(self) -> AsyncSession:
        """Begin, and return the test's session. Runs on the thread's loop."""
        if not self._private:
            self._claim()
        try:
            return await self._begin()
        except BaseException:
            self.restore()
            raise

    def _claim(self) -> None:
        """Keep other shared transactions, which may begin at the same moment on another thread, from the databases."""
        with _claiming:
            for db in self._dbs:
                if db in _active:
                    raise SharedTransactionError(
                        f"{db!r} is in a shared transaction already: these cannot be nested. Use that one."
                    )
            self._claimed = self._dbs
            _active.update(self._claimed)

    async def _begin(self) -> AsyncSession:
        for db in self._dbs:
            self._originals[db] = await _original_engine(db)
        databases = {engine.url.database for engine in self._originals.values()}
        if len(databases) > 1:
            raise SharedTransactionError(
                f"One connection leads to one database, and these are {len(databases)}: give each a "
                "shared_transaction() of its own."
            )
        db = self._dbs[0]
        await self._shared.begin(self._originals[db])
        try:
            if not self._private:
                for each in self._dbs:
                    self._replace_engines(each)
            engine = create_shared_engine(self._originals[db], self._shared, lenient=not self._private)
            maker = await db.session_maker()
            if self._private:
                maker = confine(maker, self._redirect)
            session = self.session = maker(bind=engine, info={_OF_TEST: True})
        except BaseException:
            await self._shared.end()
            raise
        return session

    async def end(self) -> None:
        """Roll everything back, if it has begun. Runs on the thread's loop."""
        if self.session is None:
            return
        try:
            await session_end.close(self.session, None, "the shared transaction")
        finally:
            await self._shared.end()

    def restore(self) -> None:
        """Give the databases their own engines back, and raise an error if a roll-back has undone committed work."""
        while self._guarded:
            engine = self._guarded.pop()
            for name, listener in _GUARDS.items():
                event.remove(engine, name, listener)
        while self._replacements:
            db, replacement = self._replacements.pop()
            for loop_engine in db._engines.put_back(replacement).all:  # noqa: SLF001 - the core's own
                loop_engine.abandon()
        _active.difference_update(self._claimed)
        self._claimed = ()
        if self._shared.problems:
            raise SharedTransactionError("\n".join(self._shared.problems))

    def _redirect(self, session: Session, bind: Engine | Connection) -> Engine | Connection:
        """Return the shared engine that takes the place of an engine which a session has chosen by itself."""
        if bind.dialect.driver == SHARED_DRIVER:
            return bind
        check_same_database(bind, self._originals[self._dbs[0]].sync_engine, "this shared transaction")
        engine = bind.engine
        # One for each event loop, as for the engines of the DBConnect: a pool serves one.
        key = (engine, asyncio.get_running_loop(), _OF_TEST in session.info)
        if key not in self._chosen:
            lenient = _OF_TEST in session.info and not self._private
            self._chosen[key] = create_shared_engine(AsyncEngine(engine), self._shared, lenient=lenient).sync_engine
        return self._chosen[key]

    def _replace_engines(self, db: DBConnect) -> None:
        original = self._originals[db]

        def create(host: str) -> AsyncEngine:
            return create_shared_engine(original, self._shared, lenient=False)

        create_session_maker = db._engines.target.session_maker_creator  # noqa: SLF001 - the core's own

        def create_confined(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
            return confine(create_session_maker(engine), self._redirect)

        replacement = db._engines.replace(  # noqa: SLF001 - as above
            engine_creator=create, session_maker_creator=create_confined
        )
        self._replacements.append((db, replacement))
        for loop_engine in replacement.replaced.all:
            engine = loop_engine.engine.sync_engine
            if engine not in self._guarded:
                self._guarded.append(engine)
                for name, listener in _GUARDS.items():
                    event.listen(engine, name, listener)


_OF_TEST = "ctxdb.of_test"

# The databases that are in a shared transaction.
_active: set[DBConnect] = set()
_claiming = threading.Lock()


def _refuse_original(connection: Connection) -> None:
    if connection.dialect.driver == SHARED_DRIVER:
        # Its engine, or the one that this was derived from by `execution_options`, has inherited this listener.
        return
    # SQLAlchemy takes a transaction for ended whose commit was refused by a listener.
    connection.connection.rollback()
    raise SharedTransactionError(
        "An engine, a session maker or a session that is older than the shared transaction is used inside of it: it "
        "would really commit. Ask for it anew: `await db.engine()`, `await db.session_maker()`, `await db_session(db)`."
    )


# The listeners that refuse to use the engines which the databases had before.
_GUARDS = {"begin": _refuse_original, "commit": _refuse_original}


async def _original_engine(db: DBConnect) -> AsyncEngine:
    """Return an engine of `db` that can be used on the thread's loop."""
    engine = await db.engine()
    if engine.dialect.name == "sqlite" and sqlite_file(engine.url) is None:
        # A database in memory is in the connection of the loop that has filled it. This driver's connections serve
        # other loops as well.
        for loop_engine in db._engines.target.engines.values():  # noqa: SLF001 - the core's own
            if not loop_engine.loop.is_closed() and loop_engine.engine is not engine:
                return loop_engine.engine
    return engine


@asynccontextmanager
async def shared_transaction(
    db: DBConnect[SessionT], *others: DBConnect, timeout: float = WAIT_SECONDS
) -> AsyncIterator[SessionT]:
    """Let the block and the application that it tests share one connection, and roll everything back at its end.

    Nothing of the application has to know. All that it gets from `db` is part of the connection's one transaction:
    sessions, engines, session makers; in this task and in others, on this event loop and on those of other threads. The
    commits of the application release savepoints, having checked what COMMIT would check; its roll-backs go back to
    them. Sessions take turns: a transaction that has written has to end before another task's transaction begins. The
    code inside of a transaction can open others (`run_in_new_ctx`).

    Args:
        db: the database.
        *others: further `DBConnect`s to the same database, such as a replica's: they see what `db` has committed.
        timeout: how many seconds a transaction waits for another one's end before that is taken for a deadlock.

    Returns:
        The test's own session, on the same connection, to prepare data and to look at it. The application never has to
        wait for it: it sees what the session has flushed, which cannot be rolled back once the application has used the
        database.

    Raises:
        SharedTransactionError: something was asked of the one connection that it cannot give; the message says what,
            and what to do instead. It is raised at the end of the block, too, if a roll-back has undone what another
            session had committed.
    """
    for each in (db, *others):
        check_database(each)
    with LoopThread() as thread:
        shared = SharedTransaction(thread, (db, *others), timeout)
        async with on_shared_transaction(shared, thread) as session:
            yield cast("SessionT", session)


@asynccontextmanager
async def on_shared_transaction(shared: SharedTransaction, thread: LoopThread) -> AsyncIterator[AsyncSession]:
    """Begin and end `shared` on its thread's loop, for a block on another one."""
    try:
        yield await run_to_completion(thread.run(shared.begin))
    except BaseException as exc:
        await run_to_completion(thread.run(shared.end))
        try:
            shared.restore()
        except SharedTransactionError as problem:
            exc.add_note(f"ctxdb: {problem}")
        raise
    await run_to_completion(thread.run(shared.end))
    shared.restore()
