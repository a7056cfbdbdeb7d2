"""Sessions whose ``get_bind`` leads to engines of the application's own, kept on the connection of a test.

A routing session (SQLAlchemy, "Custom Vertical Partitioning") and ``binds=`` choose the engine for each statement,
although the session is bound to a connection. In a test, such an engine would really commit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, async_sessionmaker
from sqlalchemy.orm import Session

from ctxdb_core._databases.connect import SessionT
from ctxdb_core._databases.url import sqlite_file
from ctxdb_core.testing._errors import SharedTransactionError

Bind: TypeAlias = Engine | Connection

Redirect: TypeAlias = Callable[[Session, Bind], Bind]
"""Given a session and what its ``get_bind`` has chosen, returns what the statement is executed on instead."""

_REDIRECT = "ctxdb.redirect"

# One for each class of the user's, as SQLAlchemy keeps what it learns of a class.
_confined_classes: WeakKeyDictionary[type[Session], type[Session]] = WeakKeyDictionary()


def confine(maker: async_sessionmaker[SessionT], redirect: Redirect) -> async_sessionmaker[SessionT]:
    """Return a session maker like `maker`, for sessions that execute on what `redirect` returns, and nothing else."""
    confined = copy.copy(maker)
    sync_class = maker.kw.get("sync_session_class") or maker.class_.sync_session_class
    info = dict(maker.kw.get("info") or {})
    inner: Redirect | None = info.get(_REDIRECT)
    info[_REDIRECT] = redirect if inner is None else lambda session, bind: redirect(session, inner(session, bind))
    confined.kw = {**maker.kw, "sync_session_class": _confined_class(sync_class), "info": info}
    return confined


def onto(connection: AsyncConnection, what: str) -> Redirect:
    """Return a function that redirects all statements to one connection.

    Args:
        connection: the connection.
        what: whose connection it is, for the error.
    """
    sync_connection = connection.sync_connection
    assert sync_connection is not None

    def redirect(session: Session, bind: Bind) -> Bind:
        if bind is not sync_connection:
            check_same_database(bind, sync_connection.engine, what)
        return sync_connection

    return redirect


def check_same_database(bind: Bind, engine: Engine, what: str) -> None:
    """Raise the error that says what to do if a session's own choice leads to another database than `engine`."""
    if isinstance(bind, Connection) or (bind is not engine and _address(bind.url) != _address(engine.url)):
        raise SharedTransactionError(
            f"By its own get_bind() or binds=, a session has chosen {bind.engine.url.render_as_string()}, which is not "
            f"the database of {what}: there it would really commit. Let its engines lead to one URL in "
            "tests; give each database a DBConnect, and a shared_transaction(), of its own; or test this with real "
            "commits (the fixture `ctxdb_clean_tables`, docs/testing.md)."
        )


def _confined_class(cls: type[Session]) -> type[Session]:
    if _REDIRECT in vars(cls):
        return cls
    derived = _confined_classes.get(cls)
    if derived is None:

        def get_bind(self: Session, *args: Any, **kwargs: Any) -> Bind:
            redirect: Redirect = self.info[_REDIRECT]
            return redirect(self, cls.get_bind(self, *args, **kwargs))

        namespace = {"__module__": cls.__module__, "get_bind": get_bind, _REDIRECT: True}
        derived = _confined_classes[cls] = type(cls.__name__, (cls,), namespace)
    return derived


_LOOPBACK = (None, "", "localhost", "127.0.0.1", "::1")


def _address(url: URL) -> object:
    """Return what two URLs of one database have in common."""
    if url.get_backend_name() == "sqlite":
        file = sqlite_file(url)
        # A database in memory belongs to its engine.
        return object() if file is None else file.resolve()
    host = url.host or url.query.get("host")
    return ("localhost" if host in _LOOPBACK else host, url.port, url.database)
