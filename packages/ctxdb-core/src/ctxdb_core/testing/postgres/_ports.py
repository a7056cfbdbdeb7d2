"""Ports that no program listens on."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from ctxdb_core.testing.postgres._launcher import EmbeddedPostgresError

__all__ = ["find_free_port"]

# Below what systems give to outgoing connections, so that the port of a server that is down stays free.
_PORTS = range(11000, 32000)
_ATTEMPTS = 100


def find_free_port(hosts: Sequence[str]) -> int:
    """Return a port that is free on each of some addresses of this machine.

    Raises:
        EmbeddedPostgresError: no port was found, or one of `hosts` is no address of this machine.
    """
    for host in hosts:
        if not _is_free(host, 0):
            raise EmbeddedPostgresError(
                f"{host} is no address of this machine. On macOS: sudo ifconfig lo0 alias {host}"
            )
    # Not by the generator that tests seed: pytest-randomly gives each worker of pytest-xdist the same seed, and all of
    # them would start a server on the same port.
    for port in random.SystemRandom().sample(_PORTS, k=_ATTEMPTS):
        if all(_is_free(host, port) for host in hosts):
            return port
    raise EmbeddedPostgresError(f"No port was found that is free on all of {', '.join(hosts)}.")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
