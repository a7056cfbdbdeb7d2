"""How a `HostMonitor` finds the hosts of a cluster: by Patroni's REST API, by SRV records, or by a file.

An application may give the monitor an object of its own instead: any `HostDiscovery`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus._options import check_seconds
from ctxdb_pgstatus.addresses import HostAddress

__all__ = ["DiscoveredHost", "FileDiscovery", "HostDiscovery", "PatroniDiscovery", "SRVDiscovery"]

logger: logging.Logger = logging.getLogger("ctxdb_pgstatus")

_DEFAULT_PORT = 5432


@dataclass(frozen=True, slots=True)
class DiscoveredHost:
    """A host that a `HostDiscovery` has found.

    Attributes:
        address: where the host is reached.
        nofailover: whether the host is never promoted.
        noloadbalance: whether the host takes no reads.
    """

    address: HostAddress
    nofailover: bool = False
    noloadbalance: bool = False


@runtime_checkable
class HostDiscovery(Protocol):
    """Finds the hosts of a cluster."""

    async def find(self) -> Sequence[DiscoveredHost]:
        """Return all hosts, in an order that is the same for every process.

        The monitor calls this every `poll_interval`, but not more than once a second, and cancels the call if it takes
        longer than `connect_timeout`.

        Raises:
            Exception: the hosts cannot be found at the moment. The monitor goes on with the hosts that it knows.
        """


class PatroniDiscovery:
    """Finds the members of a Patroni cluster by its REST API: ``GET /cluster``.

    Every member answers for the whole cluster. If the members at `urls` are away, members that were found earlier are
    asked. The tags ``nofailover`` and ``noloadbalance`` are heeded. What Patroni says about the leader is not used: the
    monitor asks the servers themselves.

    Args:
        urls: the addresses of the REST API of some members, such as ``http://n1:8008``.
        timeout: how many seconds each member may take to answer.

    Raises:
        OptionError: `urls` is empty, or holds something else than an address of a REST API; or `timeout` is not
            positive.
    """

    def __init__(self, urls: Iterable[str], *, timeout: float = 1.0) -> None:
        given = [urls] if isinstance(urls, str) else list(urls)
        check_seconds("timeout", timeout)
        if not given:
            raise errors.OptionError("`urls` is empty: give the REST API of a member, as in ['http://n1:8008'].")
        for url in given:
            if not isinstance(url, str):
                raise errors.OptionError(f"{url!r} is no URL of a REST API: give one such as http://n1:8008.")
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise errors.OptionError(
                    f"{urlsplit(url).hostname or url!r} is no URL of a REST API: give one such as http://n1:8008."
                )
        self._given = tuple(url.rstrip("/") for url in given)
        self._found: tuple[str, ...] = ()
        self._timeout = timeout

    async def find(self) -> Sequence[DiscoveredHost]:
        """Return the members, in the order of their names.

        Raises:
            PgStatusError: no member has answered.
        """
        import httpx  # noqa: PLC0415 - a monitor that is given a list of hosts starts without httpx

        problems = []
        async with httpx.AsyncClient(timeout=self._timeout, follow_redirects=False) as client:
            for url in dict.fromkeys((*self._given, *self._found)):
                try:
                    async with asyncio.timeout(self._timeout):
                        response = await client.get(f"{url}/cluster")
                    response.raise_for_status()
                    members = _read_members(response.json())
                except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as exc:
                    problems.append(f"{urlsplit(url).netloc.rpartition('@')[2]}: {str(exc) or type(exc).__name__}")
                    continue
                self._found = tuple(api for api, _ in members if api is not None)
                return [host for _, host in members]
        raise errors.PgStatusError(
            f"No member of the Patroni cluster has answered GET /cluster: {'; '.join(problems)}. Give the REST API of "
            "a member that runs."
        )


def _read_members(content: Any) -> list[tuple[str | None, DiscoveredHost]]:
    """Read the answer of ``/cluster``: https://patroni.readthedocs.io/en/latest/rest_api.html."""
    found = []
    for member in sorted(content["members"], key=lambda member: str(member["name"])):
        if "host" not in member:
            # Patroni names no host for a member that has not started PostgreSQL yet.
            continue
        tags = member.get("tags") or {}
        api = member.get("api_url")
        host = DiscoveredHost(
            _address(str(member["host"]), int(member.get("port", _DEFAULT_PORT))),
            bool(tags.get("nofailover")),
            bool(tags.get("noloadbalance")),
        )
        found.append((str(api).removesuffix("/patroni") if api else None, host))
    return found


class SRVDiscovery:
    """Finds hosts by the SRV records of a name (RFC 2782): in the order of priority, then of weight, the highest first.

    This class needs `dnspython`: ``pip install 'ctxdb-pgstatus[srv]'``.

    Args:
        name: the name that has the records, such as ``_postgresql._tcp.shop.example.org``.
        resolver: a ``dns.asyncresolver.Resolver``; by default a resolver that is set up as the system's.

    Raises:
        OptionError: `dnspython` is not installed.
    """

    def __init__(self, name: str, *, resolver: Any = None) -> None:
        try:
            import dns.asyncresolver  # noqa: PLC0415 - an extra
        except ImportError:
            raise errors.OptionError(
                "Reading SRV records takes dnspython: install it by `pip install 'ctxdb-pgstatus[srv]'`."
            ) from None
        self._name = name
        self._resolver = resolver or dns.asyncresolver.Resolver()

    async def find(self) -> Sequence[DiscoveredHost]:
        """Return the hosts that the records name.

        Raises:
            dns.exception.DNSException: the records cannot be read at the moment.
        """
        answer = await self._resolver.resolve(self._name, "SRV")
        records = sorted(answer, key=lambda record: (record.priority, -record.weight, str(record.target), record.port))
        # A target of "." says that there is no such service (RFC 2782).
        names = [(str(record.target).rstrip("."), record.port) for record in records]
        return [DiscoveredHost(_address(name, port)) for name, port in names if name]


class FileDiscovery:
    """Finds hosts in a file, which may change: one host a line, or several with commas. A ``#`` begins a comment.

    Replace the file as a whole (write another file, and rename it), so that the monitor never reads half of it.

    Args:
        path: where the file is.
        port: the port of a host that names none.
    """

    def __init__(self, path: str | PathLike[str], *, port: int = _DEFAULT_PORT) -> None:
        self._path = Path(path)
        self._port = port

    async def find(self) -> Sequence[DiscoveredHost]:
        """Return the hosts of the file.

        Raises:
            OSError: the file cannot be read.
            HostListError: the file holds something else than hosts.
        """
        # The file has a few lines: to start a thread for the read would take longer than the read.
        lines = self._path.read_text(encoding="utf-8").splitlines()
        names = [name.strip() for line in lines for name in line.partition("#")[0].split(",")]
        return [DiscoveredHost(HostAddress.parse(name, self._port)) for name in names if name]


def _address(host: str, port: int) -> HostAddress:
    """Return the address of a host, with a name from which ``HostAddress.parse`` reads the same host and port."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return HostAddress(name, host, port)
