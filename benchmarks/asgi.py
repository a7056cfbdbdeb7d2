"""Requests to an ASGI application by a plain call: no server, no socket, no HTTP client in the figure."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

PATH = "/"


class _Exchange:
    """One request, as uvicorn keeps it: its `send` knows the scope."""

    __slots__ = ("_caller", "scope")

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.scope = _scope()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._caller.successes += 1


class Caller:
    """Sends GET requests for `PATH` to `app`, and counts the successes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.successes = 0

    async def sequence(self, requests: int) -> int:
        """Send `requests` one after the other; return how many it were.

        Raises:
            RuntimeError: one of them was not answered by a 200.
        """
        self.successes = 0
        await self._request(requests)
        self._check(requests)
        return requests

    async def crowd(self, requests: int, workers: int) -> int:
        """Send `requests`, `workers` at once; return how many it were.

        Raises:
            RuntimeError: one of them was not answered by a 200.
        """
        self.successes = 0
        each = requests // workers
        await asyncio.gather(*(self._request(each) for _ in range(workers)))
        self._check(each * workers)
        return each * workers

    async def _request(self, times: int) -> None:
        for _ in range(times):
            exchange = _Exchange(self)
            await self.app(exchange.scope, _receive, exchange.send)

    def _check(self, requests: int) -> None:
        if self.successes != requests:
            raise RuntimeError(f"Only {self.successes} of {requests} requests were answered by a 200.")


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _scope() -> dict[str, Any]:
    # As uvicorn makes it for a request without a body.
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": PATH,
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
        "state": {},
    }
