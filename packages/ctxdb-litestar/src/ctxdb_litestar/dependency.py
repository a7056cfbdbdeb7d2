"""The sessions that are injected under names of the user's choice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from litestar.config.app import AppConfig
from litestar.constants import RESERVED_KWARGS
from litestar.di import Provide
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import DBConnect, db_session
from ctxdb_litestar.errors import PluginConfigurationError

__all__ = ["SessionProvider", "check_name", "check_still_injected", "inject", "session_provider"]

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
        PluginConfigurationError: `name` is reserved.
    """
    if name in RESERVED_KWARGS:
        raise PluginConfigurationError(
            f"Litestar passes something of its own as {name!r}: give the session another name, "
            f"`CtxDBPlugin({name}_session=...)` for instance."
        )


def check_still_injected(providers: Mapping[str, SessionProvider], dependencies: Mapping[str, object]) -> None:
    """Refuse an application in which something else has taken the name of a session afterwards.

    A plugin that comes later may do so, advanced-alchemy's `SQLAlchemyPlugin` for instance: handlers would get a
    session that nobody commits.

    Args:
        providers: what was made a dependency, by name.
        dependencies: those of the application that is complete.

    Raises:
        PluginConfigurationError: one of the names is another dependency's.
    """
    for name, provider in providers.items():
        if not _provides(dependencies.get(name), provider):
            raise PluginConfigurationError(
                f"Another plugin has taken the name {name!r}, which CtxDBPlugin({name}=db) provides: handlers would "
                "get a session that no unit of work commits. Give one of the two another name: "
                "`CtxDBPlugin(other_name=db)`, or `SQLAlchemyAsyncConfig(session_dependency_key=...)` for "
                "advanced-alchemy's plugin."
            )


def _provides(dependency: object, provider: SessionProvider) -> bool:
    return getattr(dependency, "dependency", dependency) is provider


def inject(providers: Mapping[str, SessionProvider], app_config: AppConfig) -> None:
    """Make each of `providers` a dependency of the whole application.

    Raises:
        PluginConfigurationError: the application has another dependency of the same name.
    """
    for name, provider in providers.items():
        existing = app_config.dependencies.get(name)
        if existing is not None and not _provides(existing, provider):
            raise PluginConfigurationError(
                f"The application has a dependency {name!r} already: give the session another name, "
                "`CtxDBPlugin(other_name=db)`, or remove that dependency."
            )
        app_config.dependencies[name] = Provide(provider)
    if providers and all(each.__name__ != AsyncSession.__name__ for each in app_config.signature_types):
        # Handlers may import it for type checkers only.
        app_config.signature_namespace.setdefault(AsyncSession.__name__, AsyncSession)
