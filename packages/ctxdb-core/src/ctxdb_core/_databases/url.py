"""What a database's URL says: its host, its file, and how it may be shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["host_of", "pool_name", "sqlite_file", "without_secrets"]

_PLAIN_HOST = re.compile(r"[\w.\-:\[\],%/]+")


def host_of(url: URL) -> str:
    """Return what `url` calls its server; a file's name where there is no server."""
    query_host = url.query.get("host")
    if isinstance(query_host, tuple):
        query_host = ",".join(query_host)
    return url.host or query_host or url.database or ":memory:"


def pool_name(url: URL) -> str:
    """Return what to call the pool of connections to `url`: server, port and database, without any secret.

    It is the form that OpenTelemetry has for ``db.client.connection.pool.name`` where a pool has no name of its own.
    """
    host = without_secrets(host_of(url))
    if url.host is None and not url.query.get("host"):
        return host
    port = "" if url.port is None else f":{url.port}"
    return f"{host}{port}/{url.database}" if url.database else f"{host}{port}"


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite database; ``None`` for a database in memory."""
    database = url.database or ""
    if database.startswith("file:") and "uri" in url.query:
        # SQLite, "URI Filenames": two slashes introduce an authority, which is empty or "localhost".
        path = re.sub(r"^//(?:localhost)?(?=/)", "", unquote(database.removeprefix("file:")))
        return None if path in ("", ":memory:") or url.query.get("mode") == "memory" else Path(path)
    return None if database in ("", ":memory:") else Path(database)


def without_secrets(host: str) -> str:
    """Return `host` as it may be logged: an engine creator may be given a whole URL or DSN by that name."""
    if "://" in host:
        try:
            url = make_url(host)
        except (ArgumentError, ValueError):
            return "***"
        return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()
    return host if _PLAIN_HOST.fullmatch(host) else "***"
