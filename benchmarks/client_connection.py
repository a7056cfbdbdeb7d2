"""HTTP by bytes that are given to a server's protocol, as its event loop gives them: no socket in the figure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from benchmarks.asgi import PATH

__all__ = ["BODY", "ClientConnection"]

BODY = b"ok"
"""The body that every request has to be answered by."""

_REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: */*\r\n\r\n".encode()


class ClientConnection(asyncio.Transport):
    """One client that keeps its connection alive, and the transport that the server writes to."""

    def __init__(self, protocol: Any) -> None:
        super().__init__()
        self._protocol = protocol
        self._closing = False
        self._received = b""
        self._answered: asyncio.Future[bytes] | None = None
        protocol.connection_made(self)

    async def request(self, times: int) -> None:
        """Send `times` requests, one after the other.

        Raises:
            RuntimeError: one of them was not answered by a 200 with the `BODY`.
        """
        loop = asyncio.get_running_loop()
        for _ in range(times):
            self._received, self._answered = b"", loop.create_future()
            self._protocol.data_received(_REQUEST)
            response = await self._answered
            if not (response.startswith(b"HTTP/1.1 200 ") and response.endswith(BODY)):
                raise RuntimeError(f"A request was answered by {response!r}.")

    def write(self, data: Any) -> None:
        """Take a part of the response, which is whole with its body: some servers write the head alone."""
        self._received += bytes(data)
        is_whole = not self._received.endswith(b"\r\n\r\n")
        if is_whole and self._answered is not None and not self._answered.done():
            self._answered.set_result(self._received)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Take several parts of the response at once."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Tell the server that the client is gone."""
        if not self._closing:
            self._closing = True
            self._protocol.connection_lost(None)

    def abort(self) -> None:
        """Close the connection."""
        self.close()

    def is_closing(self) -> bool:
        """Return whether the connection is closed."""
        return self._closing

    def pause_reading(self) -> None:
        """Do nothing: the next request is sent when the one before it is answered."""

    def resume_reading(self) -> None:
        """Do nothing, see `pause_reading`."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return `default`: there is no socket."""
        return default
