"""Where the demo's servers listen: on loopback."""

from __future__ import annotations

import os
import socket

from ctxdb_demo.errors import DemoError

HOST = "127.0.0.1"
STOP_TIMEOUT_SECONDS = 3
"""How long a server waits for its last requests."""


def listen(port: int | None) -> socket.socket:
    """Return a socket that listens on loopback: on `port`, or on a free one.

    Raises:
        DemoError: the port cannot be had.
    """
    # With the protocol's number, as asyncio sets TCP_NODELAY on connections of such a socket only.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # A port whose last connections are still in TIME_WAIT is free; on Windows, this would steal used ones.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port or 0))
        listener.listen()
    except OSError as exc:
        listener.close()
        raise DemoError(f"Port {port} of {HOST} cannot be had: {exc.strerror or exc}.") from exc
    return listener
