"""Which context variables a new connection gets to see: it lives longer than the request that happens to open it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._sqlalchemy.private import replace_connect

__all__ = ["connect_without_hidden_variables", "hide_from_connections"]

T = TypeVar("T")

_hidden: dict[ContextVar[Any], Any] = {}


def hide_from_connections(variable: ContextVar[T], shown: T) -> None:
    """Have new connections see `shown` instead of what `variable` is."""
    _hidden[variable] = shown


def connect_without_hidden_variables(engine: AsyncEngine) -> None:
    """Keep what is hidden from the connections that `engine` opens from now on.

    The event loop keeps a copy of the context in which a driver began to listen to a socket, for as long as it does:
    each connection of the pool would keep the unit of work alive that it was opened in, and what that unit knows.
    """
    replace_connect(engine.dialect, _connect_out_of_sight)


def _connect_out_of_sight(connect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        for variable, shown in _hidden.items():
            stack.callback(variable.reset, variable.set(shown))
        return connect(*args, **kwargs)
