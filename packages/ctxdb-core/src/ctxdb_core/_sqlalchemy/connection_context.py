"""Hides context variables from connections, which live longer than the request that opens or uses them.

An engine is taught that together with another matter of opening a connection: what its pool does after a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._sqlalchemy.private import pass_on_failed_connect, replace_connect

__all__ = ["call_out_of_sight", "connect_without_hidden_variables", "hide_from_connections"]

T = TypeVar("T")

_hidden: dict[ContextVar[Any], Any] = {}


def hide_from_connections(variable: ContextVar[T], shown: T) -> None:
    """Have code that opens a connection see `shown` as the value of `variable`."""
    _hidden[variable] = shown


def connect_without_hidden_variables(engine: AsyncEngine) -> None:
    """Hide the variables of `hide_from_connections` from each connection that `engine` opens from now on.

    The event loop keeps a copy of the context in which a driver began to listen to a socket, for as long as the driver
    listens: each pooled connection would keep alive the unit of work that it was opened in, and all that the unit
    refers to.

    If a connection cannot be opened, the next task that waits for the pool is woken, and tries to open one itself.
    """
    known = _engines.get(engine.dialect)
    if known is None:
        known = _engines[engine.dialect] = []
        replace_connect(engine.dialect, partial(_connect_or_pass_on, known))
    known[:] = [*(each for each in known if each() is not None), ref(engine.sync_engine)]


# The engines of each dialect, as it is the dialect that opens connections. Copies of an engine for other event loops
# share its dialect, and each has a pool of its own.
_engines: WeakKeyDictionary[Dialect, list[ref[Engine]]] = WeakKeyDictionary()


def _connect_or_pass_on(engines: list[ref[Engine]], connect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call_out_of_sight(connect, *args, **kwargs)
    except Exception:
        # Called in the loop's next round: the pool takes note of the failure as soon as this error reaches it.
        asyncio.get_running_loop().call_soon(_pass_on, engines)
        raise


def _pass_on(engines: list[ref[Engine]]) -> None:
    for pool in {engine.pool for each in tuple(engines) if (engine := each()) is not None}:
        pass_on_failed_connect(pool)


def call_out_of_sight(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Return ``fn(*args, **kwargs)``, which does not see the variables of `hide_from_connections`.

    For calls in which the driver stores a copy of the context for longer than the request: in a timer, for instance.
    """
    with ExitStack() as stack:
        for variable, shown in _hidden.items():
            stack.callback(variable.reset, variable.set(shown))
        return fn(*args, **kwargs)
