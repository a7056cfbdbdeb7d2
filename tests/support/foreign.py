"""Applications of other kinds than ASGI 3, in objects that serve them, as frameworks have them mounted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ctxdb_core.asgi import Receive, Scope, Send


class InASGI:
    """Serves a WSGI application, which it keeps in ``app`` as a2wsgi and Starlette do."""

    def __init__(self, app: Callable[[dict[str, Any], Callable[..., None]], Iterable[bytes]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started: list[str] = []
        chunks = self.app({"PATH_INFO": scope["path"]}, lambda status, headers: started.append(status))
        await send({"type": "http.response.start", "status": int(started[0].split()[0]), "headers": []})
        await send({"type": "http.response.body", "body": b"".join(chunks)})


def wsgi(environ: dict[str, Any], start_response: Callable[..., None]) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"foreign"]


class WSGIApplication:
    """A WSGI application that is an object, and has an ``app`` of its own, too."""

    def __init__(self) -> None:
        self.app = wsgi

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., None]) -> Iterable[bytes]:
        return self.app(environ, start_response)


class InASGI3:
    """Serves an application of ASGI 2, as Starlette's test client does."""

    def __init__(self, app: Callable[[Scope], Callable[[Receive, Send], Awaitable[None]]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope)(receive, send)


def asgi2(scope: Scope) -> Callable[[Receive, Send], Awaitable[None]]:
    async def instance(receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"foreign"})

    return instance


class EndlessApplication:
    """Has each attribute that it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(self)()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asgi2(scope)(receive, send)
