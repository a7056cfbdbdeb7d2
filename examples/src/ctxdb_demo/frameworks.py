"""The frameworks that the bank comes in. A new one is a module with `create_app`, and an entry here."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ctxdb_demo.server import serve_aiohttp, serve_asgi

__all__ = ["DEFAULT", "FRAMEWORKS", "Framework"]

Serve = Callable[[Any, socket.socket], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Framework:
    """One version of the bank, and how it is served."""

    title: str
    distribution: str
    """What it is installed as."""
    module: str
    """Where its ``create_app()`` is; imported when it is needed."""
    serve: Serve = serve_asgi
    """Serves the application on a socket for the length of a block."""

    def create_app(self) -> Any:
        """Return a new application."""
        return importlib.import_module(self.module).create_app()

    @property
    def version(self) -> str:
        """The installed version of the framework."""
        return metadata.version(self.distribution)


FRAMEWORKS = {
    "aiohttp": Framework("aiohttp", "aiohttp", "ctxdb_demo.aiohttp_app", serve_aiohttp),
    "fastapi": Framework("FastAPI", "fastapi", "ctxdb_demo.fastapi_app"),
    "litestar": Framework("Litestar", "litestar", "ctxdb_demo.litestar_app"),
    "starlette": Framework("Starlette", "starlette", "ctxdb_demo.starlette_app"),
}
DEFAULT = "fastapi"
