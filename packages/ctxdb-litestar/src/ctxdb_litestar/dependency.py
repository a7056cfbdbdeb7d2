"""The sessions that are injected under names of the user's choice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from litestar.config.app import AppConfig
from litestar.constants import RESERVED_KWARGS
from litestar.di import Provide
from litestar.exceptions import ImproperlyConfiguredException
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import DBConnect, db_session

__all__ = ["SessionProvider", "check_name", "inject", "session_provider"]

SessionProvider: TypeAlias = Callable[[], Awaitable[AsyncSession]]
"""A dependency that returns the session of the running request."""


def session_provider(db: DBConnect) -> SessionProvider:
    """Return a dependency that returns the request's session on `db`. It owns no transaction."""

    async def provide_session() -> AsyncSession:
        return await db_session(db)

    return provide_session


def check_name(name: str) -> None:
    """Refuse a name for a dependency that Litestar has another use for.

    Raises:
        ImproperlyConfiguredException: `name` is reserved.
    """
    if name in RESERVED_KWARGS:
        raise ImproperlyConfiguredException(
            f"Litestar passes something of its own as {name!r}: give the session another name, "
            f"`CtxDBPlugin({name}_session=...)` for instance."
        )


def inject(providers: Mapping[str, SessionProvider], app_config: AppConfig) -> None:
    """Make each of `providers` a dependency of the whole application.

    Raises:
        ImproperlyConfiguredException: the application has another dependency of the same name.
    """
    for name, provider in providers.items():
        existing = app_config.dependencies.get(name)
        if existing is not None and getattr(existing, "dependency", existing) is not provider:
            raise ImproperlyConfiguredException(
                f"The application has a dependency {name!r} already: give the session another name, "
                "`CtxDBPlugin(other_name=db)`, or remove that dependency."
            )
        app_config.dependencies[name] = Provide(provider)
    if providers and all(each.__name__ != AsyncSession.__name__ for each in app_config.signature_types):
        # Handlers may import it for type checkers only.
        app_config.signature_namespace.setdefault(AsyncSession.__name__, AsyncSession)
