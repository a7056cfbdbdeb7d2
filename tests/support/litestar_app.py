"""Litestar applications under test, and clients for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeAlias, TypeVar

import httpx
from litestar import Litestar, MediaType, Request, Response
from litestar.app import DEFAULT_OPENAPI_CONFIG
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ControllerRouterHandler
from tests.support.server import http_client, serve

from ctxdb_core import DBConnect
from ctxdb_litestar import CtxDBPlugin

__all__ = ["Ask", "ExceptionHandler", "Injected", "answering", "asker", "litestar_app", "openapi_of"]

try:
    from litestar.di import NamedDependency as Injected
except ImportError:
    # Below Litestar 2.23, the name of a parameter is enough.
    Injected = Annotated[TypeVar("T"), "injected"]  # type: ignore[misc]  # mypy sees the newest Litestar

Ask: TypeAlias = Callable[[Litestar], Awaitable[httpx.AsyncClient]]
"""Returns a client of an application, in process or on a real server."""

ExceptionHandler: TypeAlias = Callable[[Request[Any, Any, Any], Exception], Response[Any]]


def openapi_of(handlers: Sequence[ControllerRouterHandler]) -> OpenAPIConfig | None:
    """Return the configuration of the schema for an application of which no test asks for the schema.

    The pages of the schema are routes, which take Litestar five times as long to make as the rest of an application.
    They are left to the applications that have no other routes: without any, Litestar has no units of work.
    """
    return None if handlers else DEFAULT_OPENAPI_CONFIG


def litestar_app(
    *handlers: ControllerRouterHandler, db: DBConnect | None = None, plugins: list[Any] | None = None, **options: Any
) -> Litestar:
    """Return an application with the plugin in it, or with the `plugins` that are given."""
    plugins = [CtxDBPlugin(*([] if db is None else [db]))] if plugins is None else plugins
    options = {"openapi_config": openapi_of(handlers), **options}
    return Litestar(handlers, plugins=plugins, logging_config=None, **options)


def answering(status: int, text: str = "handled") -> ExceptionHandler:
    """Return an exception handler that says which error it was called with."""

    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[str]:
        return Response(f"{text} {type(exc).__name__}", status_code=status, media_type=MediaType.TEXT)

    return handle


def asker(stack: AsyncExitStack, *, over_sockets: bool) -> Ask:
    """Return what makes clients; they live as long as `stack`."""

    async def ask(app: Any) -> httpx.AsyncClient:
        if over_sockets:
            client = http_client(await stack.enter_async_context(serve(app)))
        else:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
        return await stack.enter_async_context(client)

    return ask
