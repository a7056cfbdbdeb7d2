"""Keeps the statements of open transactions that have failed or were interrupted, for later errors to name them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection
from sqlalchemy.engine import ExceptionContext

__all__ = ["FailedStatement", "failure_of", "first_line", "note_failure"]

_MOST_CHARACTERS = 200


class FailedStatement(NamedTuple):
    """A statement, without its parameters, and what has become of it."""

    statement: str
    error: str
    was_interrupted: bool
    """Whether it was stopped, by the cancellation of its task for instance; else the database has refused it."""
    clause: object
    """What was to be executed; ``None`` if that was a text without a construct of SQLAlchemy."""

    def __str__(self) -> str:
        return f"{self.statement!r} ({self.error})"


# The error is kept as a text: itself, it would keep alive the frames of the code that has made the statement.
_failures: WeakKeyDictionary[Connection, FailedStatement] = WeakKeyDictionary()


def note_failure(connection: Connection, context: ExceptionContext) -> None:
    """Note the statement of `context`, which has just failed."""
    execution = context.execution_context
    statement = context.statement or getattr(execution, "statement", None)
    if statement is not None:
        error = context.original_exception
        _failures[connection] = FailedStatement(
            _shortened(statement),
            first_line(error),
            not isinstance(error, Exception),
            getattr(execution, "invoked_statement", None),
        )


def failure_of(connection: Connection) -> FailedStatement | None:
    """Return the statement that failed last on `connection`, apart from those that an aborted transaction refused."""
    return _failures.get(connection)


def first_line(error: BaseException) -> str:
    """Return the type and the message of `error`, which is cut short."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _shortened(text.partition("\n")[0])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
