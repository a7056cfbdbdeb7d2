"""`provide_session`: the session of the request as a FastAPI dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from ctxdb_core import ArgumentTypeError, DBConnect, db_session
from ctxdb_core.adapters import SessionT_co

__all__ = ["provide_session"]


@dataclass(frozen=True)
class provide_session(Generic[SessionT_co]):  # noqa: N801 - used like a function, in `Depends(provide_session(db))`
    """A dependency that returns the request's session on `db`.

    ``session: Annotated[AsyncSession, Depends(provide_session(db))]``. It owns no transaction: the middleware commits
    or rolls back. Two of them for one `db` are equal, so ``app.dependency_overrides[provide_session(db)]`` works.

    Raises:
        ArgumentTypeError: `db` is no `DBConnect`.
    """

    db: DBConnect[SessionT_co]

    def __post_init__(self) -> None:
        if not isinstance(self.db, DBConnect):
            raise ArgumentTypeError(f"provide_session() takes a `DBConnect`, not {type(self.db).__name__}.")

    async def __call__(self) -> SessionT_co:
        """Return the session; see `ctxdb_core.db_session` for the errors."""
        return await db_session(self.db)
