"""The frameworks that the bank comes in. A new one is a module with `create_app`, and an entry here."""

from __future__ import annotations

import importlib
import socket
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import metadata

__all__ = ["DEFAULT", "FRAMEWORKS", "Framework"]


@dataclass(frozen=True)
class Framework:
    """One version of the bank, and how it is served."""

    title: str
    distribution: str
    """What it is installed as."""
    module: str
    """Where its ``create_app()`` is; imported when it is needed."""
    server: str = "ctxdb_demo.asgi_server"
    """Where its server's ``serve()`` is; imported when it is needed."""

    def serve(self, listener: socket.socket) -> AbstractAsyncContextManager[None]:
        """Serve a new application on a socket for the length of a block."""
        app = importlib.import_module(self.module).create_app()
        serving: AbstractAsyncContextManager[None] = importlib.import_module(self.server).serve(app, listener)
        return serving

    @property
    def version(self) -> str:
        """The installed version of the framework."""
        return metadata.version(self.distribution)


FRAMEWORKS = {
    "aiohttp": Framework("aiohttp", "aiohttp", "ctxdb_demo.aiohttp_app", "ctxdb_demo.aiohttp_server"),
    "fastapi": Framework("FastAPI", "fastapi", "ctxdb_demo.fastapi_app"),
    "litestar": Framework("Litestar", "litestar", "ctxdb_demo.litestar_app"),
    "starlette": Framework("Starlette", "starlette", "ctxdb_demo.starlette_app"),
}
DEFAULT = "fastapi"
