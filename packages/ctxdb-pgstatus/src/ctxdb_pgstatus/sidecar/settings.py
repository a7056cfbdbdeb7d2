"""`Settings`: the settings of the sidecar, out of the environment variables of pg-status, older releases included."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus.addresses import HostAddress, parse_hosts
from ctxdb_pgstatus.discovery import FileDiscovery, HostDiscovery, PatroniDiscovery, SRVDiscovery
from ctxdb_pgstatus.locality import Locality

__all__ = ["VARIABLES", "LogFormat", "Settings"]

LogFormat = Literal["text", "json"]

_PREFIX = "pg_status__"
_HIGHEST_PORT = 65535
_TLS_FILES = ("PGSSLROOTCERT", "PGSSLCRL", "PGSSLCERT", "PGSSLKEY")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}

VARIABLES = {
    "hosts": "the hosts of the cluster, separated by commas: name, name:port or [IPv6]:port; required, or one of",
    "hosts_patroni": "instead of hosts: REST APIs of some members of a Patroni cluster, as in http://n1:8008",
    "hosts_srv": "instead of hosts: a name with SRV records, as in _postgresql._tcp.example.org",
    "hosts_file": "instead of hosts: a file with one host a line, which may change",
    "delimiter": "what separates the values of a list, if it is no comma",
    "pg_user": "the user to log in as (postgres)",
    "pg_password": "the user's password (that of PGPASSWORD or libpq's password file, if there is one; else postgres)",
    "pg_password_file": "a file that holds the password and nothing else; read for each connection",
    "pg_database": "the database to connect to (postgres)",
    "pg_port": "the port of all hosts, or a list with the port of each host (5432)",
    "port": "pg_port as pg-status 1.x calls it: the last port of the list is that of all further hosts",
    "hosts_dc": "a list with the data centre of each host",
    "current_dc": "the data centre of the sidecar: its replicas are preferred",
    "current_dc_env": "the name of an environment variable that holds current_dc",
    "hosts_geo": "a list with the region of each host",
    "current_geo": "the region of the sidecar: its replicas are preferred after those of the same data centre",
    "current_geo_env": "the name of an environment variable that holds current_geo",
    "max_fails": "after how many failures in a row a host counts as dead (3)",
    "sleep_ms": "milliseconds between two polls of a host (1000)",
    "sleep": "sleep_ms in seconds, as older releases call it",
    "query_timeout_ms": "milliseconds that a poll may take (2000)",
    "connect_timeout": "query_timeout_ms in seconds, as older releases call it",
    "conn_max_age_ms": "milliseconds after which a connection to a host is replaced, and its name resolved (30000)",
    "nofailover": "a list of hosts that are never promoted: no confirmation of a commit waits for them",
    "noloadbalance": "a list of hosts that take no reads",
    "subscribers": "a list of hosts that receive the data by logical replication",
    "sync_max_lag_ms": "up to which lag in milliseconds a replica is in sync by time (1000)",
    "sync_max_lag_bytes": "up to which lag in bytes a replica is in sync by bytes (1000000)",
    "http_listen_address": "the address to listen on; * for all (127.0.0.1)",
    "http_port": "the port to listen on (8000)",
    "log_level": "debug, info, warning, error or fatal (info)",
    "log_format": "text or json (text)",
}
"""The names of the variables, without their prefix, and what each of them sets, with its default in parentheses."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the sidecar.

    Attributes:
        hosts: the addresses of the hosts, with the names by which answers call them; empty if `discovery` finds them.
        discovery: finds the hosts; ``None`` if they are listed.
        user: the user to log in as.
        password: the user's password; never shown. ``None`` if it comes out of `password_file`, or from libpq's places.
        password_file: a file that holds the password.
        database: the database to connect to.
        poll_interval: seconds between two polls of a host.
        connect_timeout: seconds that a poll may take.
        conn_max_age: seconds after which a connection is replaced.
        nofailover: the hosts that are never promoted.
        subscribers: the hosts that receive the data by logical replication.
        noloadbalance: the hosts that take no reads.
        max_fails: after how many failures in a row a host is dead.
        sync_max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        sync_max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
        locality: where the hosts and the sidecar are.
        listen_address: the address to listen on; ``*`` for all.
        listen_port: the port to listen on; 0 for any free port.
        log_level: the least severe level that is logged.
        log_format: whether lines of the log are text or JSON.
        warnings: what is wrong with the variables, but does not keep the sidecar from starting.
    """

    hosts: tuple[HostAddress, ...]
    discovery: HostDiscovery | None
    user: str
    password: str | None = field(repr=False)
    password_file: str | None
    database: str
    poll_interval: float
    connect_timeout: float
    conn_max_age: float
    nofailover: tuple[str, ...]
    noloadbalance: tuple[str, ...]
    subscribers: tuple[str, ...]
    max_fails: int
    sync_max_lag_ms: int
    sync_max_lag_bytes: int
    locality: Locality
    listen_address: str
    listen_port: int
    log_level: int
    log_format: LogFormat
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings.

        Raises:
            OptionError: a variable is missing, or has a value that it cannot have; the message names it.
        """
        read = _Reader(environment)
        warnings = [*read.unknown(), *read.unreadable_files()]
        discovery = read.discovery()
        hosts = read.hosts() if discovery is None else ()
        locality, locality_warnings = read.locality(hosts)
        seconds = read.seconds("sleep_ms", "sleep", 1.0)
        return cls(
            hosts=hosts,
            discovery=discovery,
            user=read.text("pg_user", "postgres"),
            password=read.password(),
            password_file=read.text("pg_password_file", "") or None,
            database=read.text("pg_database", "postgres"),
            poll_interval=seconds,
            connect_timeout=read.seconds("query_timeout_ms", "connect_timeout", 2.0),
            conn_max_age=read.number("conn_max_age_ms", 30_000) / 1000,
            nofailover=read.names("nofailover", hosts),
            noloadbalance=read.names("noloadbalance", hosts),
            subscribers=read.names("subscribers", hosts),
            max_fails=read.number("max_fails", 3, at_least=1),
            sync_max_lag_ms=read.number("sync_max_lag_ms", 1000),
            sync_max_lag_bytes=read.number("sync_max_lag_bytes", 1_000_000),
            locality=locality,
            listen_address=read.listen_address(),
            listen_port=read.number("http_port", 8000, at_most=_HIGHEST_PORT),
            log_level=read.log_level(),
            log_format=read.log_format(),
            warnings=(*warnings, *locality_warnings),
        )


class _Reader:
    """Reads single variables. An empty variable counts as not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str, default: str) -> str:
        return self._environment.get(_PREFIX + name, "").strip() or default

    def discovery(self) -> HostDiscovery | None:
        """Return an object that finds the hosts; ``None`` if they are listed."""
        kinds = [kind for kind in ("hosts", "hosts_patroni", "hosts_srv", "hosts_file") if self.text(kind, "")]
        if len(kinds) > 1:
            raise _wrong(kinds[1], self.text(kinds[1], ""), f"either this variable or {_PREFIX}{kinds[0]}, not both")
        try:
            match kinds:
                case ["hosts_patroni"]:
                    return PatroniDiscovery(self._list("hosts_patroni"))
                case ["hosts_srv"]:
                    return SRVDiscovery(self.text("hosts_srv", ""))
                case ["hosts_file"]:
                    return FileDiscovery(self.text("hosts_file", ""), port=self.number("pg_port", 5432, at_least=1))
        except errors.OptionError as exc:
            raise errors.OptionError(f"{_PREFIX}{kinds[0]}: {exc}") from None
        return None

    def password(self) -> str | None:
        """Return the password; ``None`` if it comes out of a file, or from one of libpq's places."""
        given = self._environment.get(f"{_PREFIX}pg_password")
        in_file = bool(self.text("pg_password_file", ""))
        if given is not None and in_file:
            raise _wrong(
                "pg_password_file",
                self.text("pg_password_file", ""),
                f"either this variable or {_PREFIX}pg_password, not both",
            )
        if given is not None or in_file:
            return given
        if "PGPASSWORD" in self._environment or "PGPASSFILE" in self._environment:
            return None
        home = self._environment.get("HOME")
        return None if home and Path(home, ".pgpass").is_file() else "postgres"

    def names(self, name: str, hosts: tuple[HostAddress, ...]) -> tuple[str, ...]:
        """Return a list of hosts. Its names have to be out of `hosts`, unless the hosts are found while it runs."""
        given = self._list(name)
        known = {host.name for host in hosts} or set(given)
        for each in given:
            if each not in known:
                raise _wrong(name, each, f"names out of {_PREFIX}hosts")
        return tuple(given)

    def number(self, name: str, default: int, *, at_least: int = 0, at_most: int | None = None) -> int:
        text = self.text(name, str(default))
        value = int(text) if text.isascii() and text.isdigit() else None
        if value is None or value < at_least or (at_most is not None and value > at_most):
            limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
            raise _wrong(name, text, f"a whole number {limits}")
        return value

    def seconds(self, name_in_ms: str, name: str, default: float) -> float:
        """Return the seconds that `name_in_ms` gives in milliseconds; if it is not set, those of `name`.

        `name` is how older releases call the variable.
        """
        if self.text(name_in_ms, ""):
            return self.number(name_in_ms, 0, at_least=1) / 1000
        text = self.text(name, str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise _wrong(name, text, "a number of seconds above 0")
        return value

    def hosts(self) -> tuple[HostAddress, ...]:
        names = self._list("hosts")
        if not names:
            raise errors.OptionError(
                f"{_PREFIX}hosts is not set: name the hosts of the cluster, as in {_PREFIX}hosts=n1,n2."
            )
        ports = self._ports(len(names))
        try:
            # Each host keeps the name as it was written, without a port that was given in `pg_port`. `parse_hosts` is
            # given host and port, to see whether two hosts are the same.
            addresses = [HostAddress.parse(name, int(port)) for name, port in zip(names, ports, strict=True)]
            parse_hosts(
                [f"[{each.host}]:{each.port}" if ":" in each.host else f"{each.host}:{each.port}" for each in addresses]
            )
        except errors.HostListError as exc:
            raise errors.OptionError(f"{_PREFIX}hosts: {exc}") from None
        if len({address.name for address in addresses}) < len(addresses):
            # Several hosts were given the same name and different ports. Answers could not tell them apart by the names
            # that were written: so the ports become part of their names.
            addresses = [HostAddress(_with_port(each), each.host, each.port) for each in addresses]
        return tuple(addresses)

    def _ports(self, hosts: int) -> list[str]:
        name = "port" if self.text("port", "") and not self.text("pg_port", "") else "pg_port"
        ports = self._list(name) or ["5432"]
        fits = len(ports) in (1, hosts) or (name == "port" and len(ports) < hosts)
        if not fits:
            raise _wrong(name, self.text(name, ""), f"one port, or one for each of the {hosts} hosts")
        for port in ports:
            if not (port.isascii() and port.isdigit() and 1 <= int(port) <= _HIGHEST_PORT):
                raise _wrong(name, port, f"a port from 1 to {_HIGHEST_PORT}")
        return ports + ports[-1:] * (hosts - len(ports))

    def locality(self, hosts: tuple[HostAddress, ...]) -> tuple[Locality, list[str]]:
        warnings = []
        found: dict[str, tuple[str | None, tuple[str | None, ...]]] = {}
        for kind in ("dc", "geo"):
            current = self.text(f"current_{kind}", "")
            if not current and (variable := self.text(f"current_{kind}_env", "")):
                current = self._environment.get(variable, "").strip()
            of_hosts = self._list(f"hosts_{kind}", keep_empty=True)
            complete = bool(current) and len(of_hosts) == len(hosts) and all(of_hosts)
            if (current or of_hosts) and not complete:
                warnings.append(
                    f"replicas are not chosen by their {kind}: {_PREFIX}hosts_{kind} has to name one for each host, "
                    f"and {_PREFIX}current_{kind} or {_PREFIX}current_{kind}_env that of the sidecar"
                )
            shown = [value or None for value in of_hosts] if len(of_hosts) == len(hosts) else [None] * len(hosts)
            found[kind] = (current if complete else None, tuple(shown))
        names = [host.name for host in hosts]
        (current_dc, dcs), (current_geo, geos) = found["dc"], found["geo"]
        return (
            Locality(dict(zip(names, dcs, strict=True)), dict(zip(names, geos, strict=True)), current_dc, current_geo),
            warnings,
        )

    def listen_address(self) -> str:
        text = self.text("http_listen_address", "127.0.0.1")
        if text != "*":
            try:
                ip_address(text.strip("[]"))
            except ValueError:
                raise _wrong("http_listen_address", text, "an IPv4 or IPv6 address, or *") from None
        return text.strip("[]")

    def log_level(self) -> int:
        text = self.text("log_level", "info")
        if text.lower() not in _LEVELS:
            raise _wrong("log_level", text, "debug, info, warning, error or fatal")
        return _LEVELS[text.lower()]

    def log_format(self) -> LogFormat:
        match text := self.text("log_format", "text").lower():
            case "text" | "json":
                return text
        raise _wrong("log_format", text, "text or json")

    def unknown(self) -> list[str]:
        """Return a warning for each variable that has the prefix and an unknown name."""
        names = sorted(name for name in self._environment if name.startswith(_PREFIX))
        return [
            f"{name} is not known, and has no effect" for name in names if name.removeprefix(_PREFIX) not in VARIABLES
        ]

    def unreadable_files(self) -> list[str]:
        """Return a warning for each file for TLS that cannot be read, as the driver's error does not name the file."""
        given = {name: self._environment.get(name, "") for name in _TLS_FILES}
        return [
            f"{name} is {path!r}, which is no file that can be read: give the path of a readable file"
            for name, path in given.items()
            if path and not (Path(path).is_file() and os.access(path, os.R_OK))
        ]

    def _list(self, name: str, *, keep_empty: bool = False) -> list[str]:
        text = self.text(name, "")
        if not text:
            return []
        values = [value.strip() for value in text.split(self.text("delimiter", ","))]
        return values if keep_empty else [value for value in values if value]


def _with_port(address: HostAddress) -> str:
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def _wrong(name: str, text: str, wanted: str) -> errors.OptionError:
    return errors.OptionError(f"{_PREFIX}{name} is {text!r}: give {wanted}.")
