"""`close_on_shutdown`: databases closed together with the application."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from ctxdb_core import ArgumentTypeError, DBConnect
from ctxdb_core.adapters import close_all

__all__ = ["close_on_shutdown"]


class close_on_shutdown:  # noqa: N801 - used like a function: as a lifespan, or in one
    """Closes databases when the application shuts down; a lifespan, or part of one.

    Either ``Starlette(lifespan=close_on_shutdown(db))``, or ``async with close_on_shutdown(db): yield`` in a lifespan
    of your own.

    Args:
        *dbs: what to close; every one is, also if closing another one fails.

    Raises:
        ArgumentTypeError: one of them is no `DBConnect`.
    """

    def __init__(self, *dbs: DBConnect) -> None:
        for db in dbs:
            if not isinstance(db, DBConnect):
                raise ArgumentTypeError(
                    f"close_on_shutdown() takes the application's `DBConnect`s, not {type(db).__name__}."
                )
        self._dbs = dbs

    def __call__(self, app: Any) -> Self:
        """Return the context manager of the lifespan of `app`."""
        return self

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await close_all(*self._dbs)
