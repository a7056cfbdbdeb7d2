"""Requests to an ASGI application by a plain call: no server, no socket, no HTTP client in the figure."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

PATH = "/"


class Caller:
    """Sends requests to `app`, and counts the successes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.successes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            self.successes += 1

    async def request(self) -> None:
        """Send one GET request for `PATH`."""
        await self.app(_scope(), _receive, self.send)

    async def sequence(self, requests: int) -> int:
        """Send `requests` one after the other; return how many it were.

        Raises:
            RuntimeError: one of them was not answered by a 200.
        """
        self.successes = 0
        for _ in range(requests):
            await self.app(_scope(), _receive, self.send)
        self._check(requests)
        return requests

    async def crowd(self, requests: int, workers: int) -> int:
        """Send `requests`, `workers` at once; return how many it were.

        Raises:
            RuntimeError: one of them was not answered by a 200.
        """
        self.successes = 0
        each = requests // workers

        async def work() -> None:
            for _ in range(each):
                await self.app(_scope(), _receive, self.send)

        await asyncio.gather(*(work() for _ in range(workers)))
        self._check(each * workers)
        return each * workers

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
