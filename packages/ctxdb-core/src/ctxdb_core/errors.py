"""The errors of ctxdb. Each one says what happened and what to do about it.

CtxDBError
├── ContextNotInitiatedError     a session was asked for outside of any unit of work
├── ContextClosedError           a session was asked for, or used, after its unit of work had ended
├── SessionClosedError           a session was used after ``close_db_session``
├── SessionOwnedError            code of the application's was to close a unit of work's session, and lose its work
├── NoSessionError               a ``TransactionContext`` was asked for its session where no block has opened one
├── SessionAlreadyActiveError    a block was entered inside of another one, or another task's block is in the way
├── TransactionAlreadyActiveError    a transaction was open where the call said that none may be
├── TransactionOptionsError      an isolation level, say, was asked for that the transaction at hand cannot have
├── DeadlineExceededError        the deadline of the unit of work had passed when a statement was to be sent
├── TransactionRequiredError     a transaction was needed, and there is none
├── UnexpectedRollbackError      a commit was asked for after an exception had left a block of the same transaction
├── OpenCursorError              a transaction was to end, or has ended, under a result that is still read
├── CommitOutcomeUnknownError    a connection was lost while COMMIT was under way: the work may be stored, or not
├── TransactionAbortedError      a commit was asked for that PostgreSQL would have turned into a silent rollback
│   └── StatementInterruptedError    a statement was interrupted before, by a time limit for instance
├── AbandonedWorkError           a middleware gave up on a handler whose work was in one transaction with its own
├── MissingExtraError            a function needs a library that is installed with an extra
├── ArgumentTypeError            something else was passed than is needed, an engine for a ``DBConnect`` for instance
├── ArgumentValueError           an argument has a value that means nothing, or contradicts another one
└── HostNotSetError              a ``DBConnect`` without a host was used, or it was given an empty one
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata

from sqlalchemy.exc import InvalidRequestError

__all__ = [
    "AbandonedWorkError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CommitOutcomeUnknownError",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "CtxDBError",
    "DeadlineExceededError",
    "HostNotSetError",
    "MissingExtraError",
    "NoSessionError",
    "OpenCursorError",
    "SessionAlreadyActiveError",
    "SessionClosedError",
    "SessionOwnedError",
    "StatementInterruptedError",
    "TransactionAbortedError",
    "TransactionAlreadyActiveError",
    "TransactionOptionsError",
    "TransactionRequiredError",
    "UnexpectedRollbackError",
]


class CtxDBError(Exception):
    """The base of every error that ctxdb raises on its own behalf.

    The text of an error ends in the address of its entry on the page of errors.
    """

    def __str__(self) -> str:
        return f"{super().__str__()} (See {_entry_of(type(self))})".lstrip()


def _entry_of(error: type[CtxDBError]) -> str:
    """Return the address of the entry of an error, or of its base where an application has derived it from that."""
    name = next(
        base.__name__
        for base in error.__mro__
        if base.__module__.startswith("ctxdb_") and not base.__name__.startswith("_")
    )
    return f"{_errors_page()}#{name.lower()}"


@cache
def _errors_page() -> str:
    """Return the address of the page: within the site that the distribution names, or else within the repository."""
    with suppress(PackageNotFoundError):
        for url in metadata("ctxdb-core").get_all("Project-URL") or ():
            label, _, address = url.partition(",")
            if label.strip().lower() == "documentation":
                return f"{address.strip().rstrip('/')}/errors.html"
    return "ctxdb's docs/errors.md"


class ContextNotInitiatedError(CtxDBError):
    """A session was asked for outside of any unit of work.

    Raised when no adapter, ``new_db_ctx()`` or ``run_in_new_ctx()`` has opened a unit of work for this code, or when
    the unit of work belongs to another event loop, to an async generator that this code iterates over, or to code that
    has nothing to do with the scheduler's job that this is; also when a task leaves a block of `transactional` that it
    has not entered, and where no event loop of asyncio runs, as under trio. The way out: add the framework's middleware
    or plugin, or wrap the code in ``async with new_db_ctx()``. In a test, the fixtures and tools of
    ``ctxdb_core.testing`` open one.
    """

    def __init__(self, message: str | None = None) -> None:
        if message is None:
            message = (
                "There is no unit of work here. In a web application, add the ctxdb middleware or plugin of its "
                "framework; in a script, worker or background task, wrap the code in `async with new_db_ctx():` or "
                "call it through `await run_in_new_ctx(fn, ...)`."
            )
            # This is set while a test runs (pytest, "PYTEST_CURRENT_TEST environment variable").
            if "PYTEST_CURRENT_TEST" in os.environ:
                message += (
                    " A test of functions that call `db_session` has a unit of work by the fixture `new_db_ctx`, or by "
                    "`async with ctxdb_core.testing.set_test_context():`; see docs/testing.md."
                )
        super().__init__(message)


class ContextClosedError(CtxDBError):
    """A session was asked for, or used, after its unit of work had ended.

    Raised in a task that outlives the request (or ``new_db_ctx()`` block) which started it: no code would commit its
    work any more. The way out: give the task a unit of work of its own with ``run_in_new_ctx()`` or ``new_db_ctx()``.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "The unit of work that this code was started in has ended: nobody would commit its changes any more. "
            "Give a task that outlives its request a unit of work of its own: `asyncio.create_task(run_in_new_ctx(fn, "
            "...))` or `async with new_db_ctx():` inside of it."
        )


class SessionClosedError(CtxDBError):
    """A session was used after ``close_db_session`` had ended it.

    Raised at the first statement, as a connection taken now would never be given back. The way out: ask
    ``db_session(db)`` for a session again.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "This session was closed by `close_db_session`. Call `await db_session(db)` again: it returns a new one."
        )


class SessionOwnedError(CtxDBError, InvalidRequestError):
    """The session of a unit of work was to be closed while its transaction held work, which would have been lost.

    Raised by ``session.close()``, ``session.reset()`` and at the end of ``async with session:``; nothing has been
    closed. The way out: leave the close to the unit of work, and call ``await session.flush()`` where statements are to
    be sent now; or end the session early by ``commit_db_session`` or ``close_db_session``.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "This session belongs to the unit of work, which commits and closes it: closing it would undo what was "
            "written, also by other code. Leave out `async with session:` and `session.close()`; `await "
            "session.flush()` sends what is to be sent now, `await commit_db_session(db)` commits it, and `await "
            "close_db_session(db)` throws it away and gives the connection back."
        )


class NoSessionError(CtxDBError):
    """A ``TransactionContext`` was asked for its session, and none is open for this code.

    Raised by ``get_session()`` and ``execute()`` outside of any block and unit of work, and in a task that was started
    inside of another task's block. The way out: enter a block in this task, or let ``execute`` open one for its
    statement by ``auto_context_on_execute=True``.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "No session is open here. Wrap the code in `async with context.transaction():` or `async with "
            "context.session():`; or make the TransactionContext with `auto_context_on_execute=True`."
        )


class SessionAlreadyActiveError(CtxDBError):
    """A session was to be opened inside of a block that has opened one already.

    Raised by ``TransactionContext.session()``, and by ``transaction(reuse_if_exists=False)``, inside of another block
    of the same task; and, in a unit of work, while another of its tasks is inside of a block that this task ends, such
    as ``session.begin_nested()``: by all that would write in that block, begin another one, or end it. And raised where
    two tasks use the sessions of two databases inside of calls of one another, and would wait for each other for ever.
    The way out: ``reuse_if_exists=True`` to share the session of the same task; for another one ``new_session()`` or
    ``new_transaction()``, ``run_in_new_ctx(fn)`` or ``transactional(db, "requires_new")``.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "A block around this code has opened a session already. Share it by `session(reuse_if_exists=True)`, or "
            "open another one by `new_session()` or `new_transaction()`."
        )


class TransactionAlreadyActiveError(CtxDBError, InvalidRequestError):
    """A transaction was open where none may be.

    Raised by ``atomic_db_session(db, current_transaction="raise")`` and by
    ``TransactionContext.transaction(allow_nested_transactions=False)``; and by what would commit the transaction inside
    of a savepoint's block (``async with session.begin_nested():``). The way out: commit or roll back first, or choose
    another mode; or commit after the block.
    """


class TransactionOptionsError(CtxDBError, InvalidRequestError):
    """An isolation level, or a read-only transaction, was asked for where it cannot be had.

    Raised where the transaction that is open has another one, which it keeps to its end; and where no transaction could
    have it, as on an engine in autocommit. The way out: end the open transaction first, or run beside it, in a unit of
    work of its own; on a read-only ``DBConnect``, leave the isolation level out.
    """


class TransactionRequiredError(CtxDBError, InvalidRequestError):
    """A transaction was needed, and there is none.

    Raised by ``transactional(db, "mandatory")`` outside of any unit of work, and in a block that runs without a
    transaction (``"supports"``, ``"not_supported"``, ``"never"``); there also by ``atomic_db_session``, and by a
    ``TransactionContext``'s ``transaction()``. ``"mandatory"`` raises it in a mere session of one, too. The way out:
    call the code from a unit of work, or from ``transactional(db)``.

    Raised by the first statement, too, where an `on_begin` was to set something for the transactions of an engine in
    autocommit. The way out: an engine without autocommit, or ``DBConnect.from_url(url, read_only=True)``.
    """


class UnexpectedRollbackError(CtxDBError, InvalidRequestError):
    """The transaction cannot be committed, as a part of it failed, and the exception was caught further out.

    Raised instead of committing half of the work of a ``transactional`` block that had joined the transaction; the
    exception is its ``__cause__``. The way out: let the exception propagate; run what may fail behind a savepoint
    (``"nested"``) or beside the transaction (``"requires_new"``); or name it in ``no_rollback_for``.
    """


class DeadlineExceededError(CtxDBError, TimeoutError):
    """The deadline of the unit of work had passed when a statement was to be sent, or before the server had answered.

    The second is a call that the pool, the network or the server has kept waiting past ``deadline`` or
    ``statement_timeout``; its connection was thrown away.

    A statement that the deadline stops while it runs raises the database's own error (SQLSTATE 57014 on PostgreSQL).
    The way out: let the error propagate, so that the unit of work is rolled back, or give it more time.
    """


class CommitOutcomeUnknownError(CtxDBError):
    """A connection was lost while COMMIT was under way: the work may be stored, or not.

    It is the only error of a commit after which the work may be stored: after any other, it is not. Callbacks of
    ``on_commit`` and of ``on_rollback`` are called neither. The driver's error is the ``__cause__``. The way out: look
    whether the work is there before it is done again, make it repeatable, or have PostgreSQL asked by
    ``DBConnect(..., resolve_commits=True)``.

    Attributes:
        databases: the databases on which that happened, as ``host/name``.
        transaction_ids: the identifiers of their transactions, by the names in `databases`, as far as these are known:
            ``pg_xact_status`` tells what became of them (PostgreSQL 13 and newer, on the same server).
    """

    def __init__(
        self, message: str, databases: tuple[str, ...] = (), transaction_ids: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.databases = databases
        self.transaction_ids: dict[str, int] = dict(transaction_ids or {})


class TransactionAbortedError(CtxDBError, InvalidRequestError):
    """The transaction cannot be committed, as one of its statements failed.

    Raised instead of committing, where PostgreSQL would answer COMMIT with a rollback and no error at all. The way out:
    let the statement's error propagate, or run the statement that may fail inside ``session.begin_nested()``.

    Also raised where a block of the transaction was cancelled beside a call of another task that did not end: the work
    of the block could not be undone by itself. And by a call in a transaction whose commit has failed, and which has
    not been rolled back.
    """


class StatementInterruptedError(TransactionAbortedError):
    """The transaction cannot go on, as a statement of it was interrupted, and the interruption was caught.

    Raised by the next statement and by the commit, after ``asyncio.timeout()`` or ``asyncio.wait_for()`` around a
    statement, for instance: a driver stops a statement by giving up its connection, and the transaction is lost with
    that. A transaction that had only read is begun anew instead. The way out: let the error propagate; roll back
    (``rollback_db_session``) before going on without the work; or run what may take too long beside the transaction
    (``run_in_new_ctx``).

    Also raised by a statement that was stopped itself: another task was about to end the transaction for a response, or
    for its unit of work, and was cancelled while it waited for the statement. All of the transaction is rolled back.
    """


class OpenCursorError(CtxDBError, InvalidRequestError):
    """A transaction was to end, or has ended, under a result that is still read from the server.

    Raised before a response starts whose body is to go on reading a result that the handler has opened by
    ``session.stream()``, if the transaction has written: its commit would give the connection away that the result
    reads from. Nothing has been committed then. And raised where a result is read on after the end of its transaction.
    The way out: read the result whole, commit before it is opened (``commit_db_session``), or open it in the body. A
    transaction that has only read is kept for the result instead.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "The transaction is to be committed before the response starts, and a result of `stream()` that was "
            "opened in it has not been read to its end: a commit closes it. Nothing was committed. Read the result "
            "whole before, commit what was written before the result is opened (`await commit_db_session(db)`), or "
            "open the result in the body of the response."
        )


class AbandonedWorkError(CtxDBError):
    """A success cannot be sent, as what was written for it had to be rolled back with an abandoned handler's work.

    Raised where a middleware has given up on a handler that goes on, answers a success in its place, and both have
    written in one transaction, or may have. The way out: let the middleware commit what it writes before it calls the
    handler, write it by ``run_in_new_ctx()``, or answer an error.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "A middleware has answered a success in the place of a handler that it has given up on, and which goes "
            "on. Both have written in one transaction: it was rolled back, as the handler's work is not whole. Let the "
            "middleware write by `await run_in_new_ctx(fn, ...)`, commit before it calls the handler, or answer an "
            "error."
        )


class MissingExtraError(CtxDBError, ImportError):
    """A function was used that needs a library which is not installed.

    The way out: install ctxdb-core with the extra that the message names, as in ``pip install 'ctxdb-core[retry]'``.
    """


class ArgumentTypeError(CtxDBError, TypeError):
    """Something else was passed than is needed: an engine or a URL for a `DBConnect`, a coroutine for a function.

    The way out: pass what the message names.
    """


class ArgumentValueError(CtxDBError, ValueError):
    """An argument has a value that means nothing, or contradicts another one.

    The way out: the message names the values that there are.
    """


class HostNotSetError(CtxDBError, ValueError):
    """A ``DBConnect`` without a host was used, or it was given an empty one.

    The way out: pass ``host=...``, or call ``await db.connect(host)`` before the first use. If a
    ``before_create_session_handler`` sets the host: ``await db.engine()`` before the first use of
    ``lazy_session_maker``.
    """
