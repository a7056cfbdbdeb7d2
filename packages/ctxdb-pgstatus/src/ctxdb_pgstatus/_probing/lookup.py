"""`Lookup`: resolves the name of a host in a thread of its own, as a name server may hang."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from ipaddress import ip_address

__all__ = ["Lookup"]


class Lookup:
    """Resolves the name of one host.

    ``getaddrinfo`` cannot be cancelled. In the event loop's default executor, it would keep one of the few threads that
    the whole application shares, and the interpreter would wait for it at its end. So each `Lookup` runs it in a daemon
    thread, and has no more than one such thread at a time.

    Args:
        host: a name, an address, or the directory of a Unix socket.
        port: the port that the addresses are for.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._is_address = _is_address(host)
        self._running: asyncio.Future[frozenset[str]] | None = None

    async def addresses(self) -> frozenset[str]:
        """Return the addresses that the name leads to now. An address, or a directory, is returned as it is.

        Raises:
            OSError: the name cannot be resolved.
        """
        if self._is_address:
            return frozenset((self._host,))
        if self._running is None or self._running.done():
            self._running = self._start()
        running = self._running
        # Not `asyncio.shield`: from Python 3.14 on, that logs an error of a look-up which its caller has given up.
        await asyncio.wait([running])
        return running.result()

    def _start(self) -> asyncio.Future[frozenset[str]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[frozenset[str]] = loop.create_future()
        # If no caller waits any more when the look-up fails, asyncio must not warn of an exception that was not read.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

        def resolve() -> None:
            try:
                found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            except Exception as exc:  # noqa: BLE001 - raised in the caller that waits for the addresses
                _report(loop, future, exc)
            else:
                _report(loop, future, frozenset(str(address[0]) for *_, address in found))

        threading.Thread(target=resolve, name=f"look up {self._host}", daemon=True).start()
        return future


def _report(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[frozenset[str]], result: frozenset[str] | Exception
) -> None:
    def set_result() -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    # The loop may have been closed while the name server kept silent.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(set_result)


def _is_address(host: str) -> bool:
    if host.startswith("/"):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
