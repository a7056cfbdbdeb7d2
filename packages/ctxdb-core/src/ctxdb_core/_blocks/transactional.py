"""`transactional`: functions and blocks that say how they want to take part in transactions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, get_args

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._blocks.atomic import transaction_on_session
from ctxdb_core._blocks.entry import Begin, BeginBeside, Block, Join, Nest, Refuse, decide
from ctxdb_core._blocks.place import find
from ctxdb_core._blocks.shared_session import JoinedBlock, SharedSessionBlock
from ctxdb_core._databases.connect import DBConnect, check_database
from ctxdb_core._sqlalchemy.binds import is_autocommit
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.private import replace_connection_class
from ctxdb_core._transactions.isolation import IsolationLevel, TransactionOptions
from ctxdb_core._transactions.rollback_only import innermost, set_rollback_only
from ctxdb_core._units.generator_blocks import seat
from ctxdb_core._units.unit import UnitOfWork, inherited_before_commit, opened
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError, ContextNotInitiatedError

__all__ = ["Propagation", "transactional"]

P = ParamSpec("P")
R = TypeVar("R")

Propagation: TypeAlias = Literal[
    "required", "requires_new", "nested", "mandatory", "never", "supports", "not_supported"
]
"""What `transactional` does with the transaction that it finds, and where it finds none."""

_WITHOUT_TRANSACTION = ("never", "supports", "not_supported")


class transactional:  # noqa: N801 - used like a function: as a decorator, or in `async with`
    """Runs an async function, or a block, in a transaction, as `propagation` says.

    ``@transactional(db, "requires_new")`` on a function or method, and ``async with transactional(db) as session:``
    around a block. One object can be used as often as you like, at the same time, and inside of itself.

    A unit of work counts as a transaction from its beginning, whether or not a statement has been made yet: that of a
    request, of ``new_db_ctx()``, or of another such block. A mere session of a `TransactionContext` does not, as nobody
    would commit it: ``required`` and ``nested`` begin a transaction on it, and ``mandatory`` is an error. The others
    take it for a transaction, as its statements begin one. An inherited unit that has ended counts as none, and so does
    that of a request in whose context a scheduler has started this job; but where a unit ends in the middle of a block
    that has joined it, blocks inside of that block raise `ContextClosedError`.

    Args:
        db: whose session the block gets, and where savepoints and options are applied. A new unit of work is one for
            every database.
        propagation: what to do

            ================= ================================== =============================================
            propagation       in a transaction                   without one
            ================= ================================== =============================================
            ``required``      join it                            begin one, which is committed at the end
            ``requires_new``  suspend it, and begin one that is committed at the end
            ``nested``        join it behind a savepoint         begin one, which is committed at the end
            ``mandatory``     join it                            `TransactionRequiredError`
            ``never``         `TransactionAlreadyActiveError`    run without: each statement is committed by itself
            ``supports``      join it                            run without: each statement is committed by itself
            ``not_supported`` suspend it, and run without: each statement is committed by itself
            ================= ================================== =============================================

        isolation_level: the transaction's level. A transaction that is joined must have it already, unless it has made
            no statement yet.
        read_only: have the database refuse writes; as for `isolation_level`.
        no_rollback_for: exceptions that are no failure: the block ends as without them, and they are raised afterwards.

    An exception that leaves a joined block lets the transaction be rolled back only, even if it is caught further out:
    its commit raises `UnexpectedRollbackError`.

    Raises:
        ValueError: `propagation` or `isolation_level` is not one of those that there are, or the one excludes the
            other.
        TypeError: `db` is no `DBConnect`, `no_rollback_for` no class of exceptions, or what is decorated no async
            function.
    """

    def __init__(
        self,
        db: DBConnect,
        propagation: Propagation = "required",
        *,
        isolation_level: IsolationLevel | None = None,
        read_only: bool = False,
        no_rollback_for: type[BaseException] | tuple[type[BaseException], ...] = (),
    ) -> None:
        if inspect.isroutine(db):
            raise ArgumentTypeError("Say on which database: `@transactional(db)`.")
        check_database(db)
        if propagation not in get_args(Propagation):
            raise ArgumentValueError(
                f"propagation={propagation!r} is not one of {', '.join(map(repr, get_args(Propagation)))}."
            )
        self._db = db
        self._propagation = propagation
        self._options = TransactionOptions(isolation_level, read_only)
        if self._options and propagation in _WITHOUT_TRANSACTION:
            raise ArgumentValueError(
                f"propagation={propagation!r} may run without a transaction, so there is nothing that isolation_level "
                "or read_only could be of: leave them out, or use 'required' or 'requires_new'."
            )
        spared: tuple[Any, ...] = no_rollback_for if isinstance(no_rollback_for, tuple) else (no_rollback_for,)
        if not all(isinstance(each, type) and issubclass(each, BaseException) for each in spared):
            raise ArgumentTypeError(
                f"no_rollback_for={no_rollback_for!r}: give a class of exceptions, or a tuple of them."
            )
        self._no_rollback_for = spared

    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Return `fn` with each of its calls in a block of its own."""
        if not inspect.iscoroutinefunction(fn):
            raise ArgumentTypeError(
                f"{fn!r} is no async function: only what is awaited inside of the block is part of it. Write it with "
                "`async def`."
            )

        @functools.wraps(fn)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            async with self._block():
                return await fn(*args, **kwargs)

        return run

    async def __aenter__(self) -> AsyncSession:
        """Begin a block; return the session that it works on, which `db_session` returns inside of it, too."""
        block = self._block()
        session = await block.__aenter__()
        _entered.set((*_entered.get(), (self, block)))
        return session

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        entered = _entered.get()
        for index in reversed(range(len(entered))):
            owner, block = entered[index]
            if owner is self:
                _entered.set((*entered[:index], *entered[index + 1 :]))
                return await block.__aexit__(exc_type, exc, traceback)
        raise ContextNotInitiatedError(
            "This `transactional` block is not open in the task that leaves it: let the task that enters a block leave "
            "it, too, with one `async with`."
        )

    @asynccontextmanager
    async def _block(self) -> AsyncIterator[AsyncSession]:
        kept: BaseException | None = None
        async with self._scope() as session:
            try:
                yield session
            except self._no_rollback_for as exc:
                kept = exc
        if kept is not None:
            raise kept

    def _scope(self) -> AbstractAsyncContextManager[AsyncSession]:
        match decide(find(self._db), Block(self._propagation)):
            case Join(unit):
                return self._joined(unit)
            case Nest(unit):
                return self._nested(unit)
            case Begin(unit):
                return self._begun(unit)
            case BeginBeside(around, autocommit):
                before_commit = inherited_before_commit()
                unit = _AutocommitUnit(before_commit) if autocommit else UnitOfWork(before_commit)
                return self._in_unit(unit, around)
            case Refuse(error):
                raise error

    @asynccontextmanager
    async def _in_unit(self, unit: UnitOfWork, around: UnitOfWork | None) -> AsyncIterator[AsyncSession]:
        unit.note_is_block()
        unit.share_statement_timeout(around)
        async with opened(unit, seat(unit)):
            session = await unit.open_session(self._db)
            await self._apply_options(session)
            yield session

    @asynccontextmanager
    async def _begun(self, unit: UnitOfWork) -> AsyncIterator[AsyncSession]:
        session = await unit.open_session(self._db)
        async with transaction_on_session(unit, session, self._db, self._options):
            yield session

    @asynccontextmanager
    async def _nested(self, unit: UnitOfWork) -> AsyncIterator[AsyncSession]:
        session = await unit.open_session(self._db)
        await self._apply_options(session)
        with SharedSessionBlock(unit, self._db):
            async with session.begin_nested():
                yield session

    @asynccontextmanager
    async def _joined(self, unit: UnitOfWork) -> AsyncIterator[AsyncSession]:
        session = await unit.open_session(self._db)
        await self._apply_options(session)
        # A savepoint that another task sets meanwhile contains nothing of this block.
        joined = innermost(session.sync_session)
        with JoinedBlock(unit, self._db):
            try:
                yield session
            except BaseException as exc:
                if not unit.autocommit and self._db in unit.sessions:
                    # A session that cannot begin a transaction any more commits nothing either.
                    with suppress(InvalidRequestError):
                        set_rollback_only(unit.sessions[self._db].sync_session, _why(exc), exc, joined=joined)
                raise

    async def _apply_options(self, session: AsyncSession) -> None:
        if self._options:
            self._options.check(session, self._db)
            await self._options.apply(session, self._db)


# The blocks of `async with` that the running code is in, with the object that each was entered through.
_entered: ContextVar[tuple[tuple[transactional, AbstractAsyncContextManager[AsyncSession]], ...]] = ContextVar(
    "ctxdb_transactional", default=()
)


def _why(exc: BaseException) -> str:
    return (
        f"{type(exc).__name__} left a `transactional` block that had joined this transaction, and was caught further "
        "out: half of the block's work must not be committed. Let the exception propagate; run the block behind a "
        "savepoint ('nested') or in a transaction of its own ('requires_new'); or name the exception in "
        "`no_rollback_for`."
    )


class _AutocommitUnit(UnitOfWork):
    """A unit of work without transactions: each statement is committed by itself, and nothing is rolled back.

    Its `before_commit` is that of the units of work that are opened in it.
    """

    autocommit = True

    def prepare_session(self, db: DBConnect, session: AsyncSession) -> None:
        engines: dict[Engine, Engine] = {}

        def in_autocommit(bind: Engine | Connection) -> Engine | Connection:
            # The code that has opened a connection, such as a test, ends the transaction on it.
            if isinstance(bind, Connection) or is_autocommit(bind):
                return bind
            if bind not in engines:
                engines[bind] = bind.execution_options(isolation_level="AUTOCOMMIT")
                replace_connection_class(engines[bind])
            return engines[bind]

        guard_of(session).translate_bind = in_autocommit
        super().prepare_session(db, session)
