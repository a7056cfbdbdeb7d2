"""The frameworks under test: how each builds and serves an `Application`, and what it can do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpx
from tests.support.application import Application
from tests.support.frameworks.aiohttp import build_aiohttp, call_aiohttp, serve_aiohttp
from tests.support.frameworks.asgi import build_asgi
from tests.support.frameworks.litestar import build_litestar
from tests.support.frameworks.quart import build_quart, call_quart
from tests.support.frameworks.starlette import build_fastapi, build_starlette
from tests.support.server import serve

IN_PROCESS = "http://test"
"""The base URL of a client that needs no server."""


@asynccontextmanager
async def _asgi_client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Provide a client that calls an ASGI application without a server."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=IN_PROCESS) as client:
        yield client


@dataclass(frozen=True)
class Adapter:
    """A framework, and the capabilities in which frameworks differ."""

    name: str
    build: Callable[[Application], Any]
    """Makes the framework's own application out of the neutral one."""
    serve: Callable[[Any], AbstractAsyncContextManager[str]] = serve
    """Serves an application on a real server of its framework, and provides the base URL."""
    call_in_process: Callable[[Any], AbstractAsyncContextManager[httpx.AsyncClient]] = _asgi_client
    """Provides a client for an application that is run the way the framework's own test tools do."""
    has_exception_handlers: bool = True
    """Whether applications can turn exceptions into responses, which a failing commit must reach."""
    has_background: bool = True
    """Whether a response can bring along work that is done after it."""
    has_middlewares: bool = True
    """Whether middlewares can be put around handlers and inside of the unit of work."""
    answers_for_cancelled_handlers: bool = True
    """Whether a client gets an answer, or the end of its connection, where a handler raises ``CancelledError``."""


ADAPTERS = (
    Adapter("asgi", build_asgi, has_exception_handlers=False),
    Adapter("starlette", build_starlette),
    Adapter("fastapi", build_fastapi),
    Adapter("litestar", build_litestar),
    Adapter("aiohttp", build_aiohttp, serve_aiohttp, call_aiohttp, has_background=False),
    Adapter(
        "quart",
        build_quart,
        call_in_process=call_quart,
        has_background=False,
        has_middlewares=False,
        # From 0.23 on, the handler's task is one of a task group, which waits for the client to leave then.
        answers_for_cancelled_handlers=version("quart") < "0.23",
    ),
)
