"""How hosts are named: by a name or an address, with or without a port, or by the directory of a Unix socket."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from posixpath import normpath

from ctxdb_pgstatus._lazy import errors

__all__ = ["HostAddress", "parse_hosts"]

_HIGHEST_PORT = 65535
# The directory of a Unix socket, then a port: libpq takes a host that begins with a slash for such a directory
# (PostgreSQL, "Parameter Key Words", on `host`).
_SOCKET_AND_PORT = re.compile(r"(?P<directory>/[^:]*)(?::(?P<port>\d+))?", re.ASCII)
# An IPv6 address in brackets, or a name without colons; then a port.
_HOST_AND_PORT = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<name>[^\s:/@\[\],;]+))(?::(?P<port>\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host is reached.

    Attributes:
        name: the host as the user wrote it, without the spaces around it; what every answer calls it.
        host: the name or address to connect to, without brackets; or the directory of a Unix socket.
        port: the port to connect to.
    """

    name: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int = 5432) -> HostAddress:
        """Read one host.

        Args:
            text: ``name``, ``name:port``, ``192.0.2.1``, ``[::1]``, ``[::1]:5433`` or ``::1``; or the directory of a
                Unix socket, as libpq takes it: ``/run/postgresql``, ``/run/postgresql:5433``.
            default_port: the port of a host that names none.

        Raises:
            HostListError: `text` is none of these, or a port is not between 1 and 65535.
        """
        if not isinstance(text, str):
            raise errors.HostListError(f"{text!r} is no host: write 'name', 'name:port', '192.0.2.1' or '[::1]:5433'.")
        name = text.strip()
        match = _HOST_AND_PORT.fullmatch(name)
        in_directory = _SOCKET_AND_PORT.fullmatch(name)
        if _is_ipv6(name):
            host, port = name, default_port
        elif match is not None and (match["ipv6"] is None or _is_ipv6(match["ipv6"])):
            host = match["ipv6"] or match["name"]
            port = default_port if match["port"] is None else int(match["port"])
        elif in_directory is not None:
            host = in_directory["directory"]
            port = default_port if in_directory["port"] is None else int(in_directory["port"])
        else:
            # The user may have given a URL. The part before the "@" may hold a password, and is not shown.
            shown = name.rpartition("@")[2]
            raise errors.HostListError(f"{shown!r} is no host: write 'name', 'name:port', '192.0.2.1' or '[::1]:5433'.")
        if not 1 <= port <= _HIGHEST_PORT:
            raise errors.HostListError(f"The port of {name!r} is {port}: give one between 1 and {_HIGHEST_PORT}.")
        return cls(name, host, port)


def parse_hosts(hosts: Iterable[str | HostAddress], default_port: int = 5432) -> tuple[HostAddress, ...]:
    """Return the addresses of a cluster's hosts, in the order of `hosts`.

    Args:
        hosts: each host as `HostAddress.parse` takes it, or as a `HostAddress`.
        default_port: the port of a host that names none.

    Raises:
        HostListError: the list is empty, a host cannot be read, two hosts lead to the same address and port, or two
            hosts have the same name.
    """
    if isinstance(hosts, str):
        raise errors.HostListError(f"`hosts` is the string {hosts!r}: give a list of hosts, as in ['n1', 'n2:5433'].")
    if not isinstance(hosts, Iterable):
        raise errors.HostListError(f"`hosts` is {hosts!r}: give a list of hosts, as in ['n1', 'n2:5433'].")
    addresses = tuple(
        host if isinstance(host, HostAddress) else HostAddress.parse(host, default_port) for host in hosts
    )
    if not addresses:
        raise errors.HostListError("There are no hosts: name at least one host.")
    names: dict[tuple[str, int], str] = {}
    for address in addresses:
        place = (_unique(address.host), address.port)
        if place in names:
            raise errors.HostListError(f"{names[place]!r} and {address.name!r} are the same host: name each host once.")
        if address.name in names.values():
            raise errors.HostListError(f"Two hosts have the name {address.name!r}: give each a name of its own.")
        names[place] = address.name
    return addresses


def _unique(host: str) -> str:
    """Return the one spelling of a host of which there are several."""
    if host.startswith("/"):
        return normpath(host)
    return IPv6Address(host).compressed if _is_ipv6(host) else host.lower()


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True
