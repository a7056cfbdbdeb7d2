"""`clients_of_asgi` and `clients_of_aiohttp`: several HTTP clients of one application, each with its own cookies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer

MakeClient: TypeAlias = Callable[[], httpx.AsyncClient]
"""Makes a client of an application, which has cookies of its own."""


@asynccontextmanager
async def clients_of_asgi(app: Any) -> AsyncIterator[MakeClient]:
    def make_client() -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    yield make_client


@asynccontextmanager
async def clients_of_aiohttp(app: web.Application) -> AsyncIterator[MakeClient]:
    async with TestServer(app) as server:
        yield lambda: httpx.AsyncClient(base_url=str(server.make_url("/")))
