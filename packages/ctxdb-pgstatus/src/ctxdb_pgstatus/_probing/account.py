"""As whom hosts are connected to, and where the password comes from."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import TypeAlias

from ctxdb_pgstatus._mask import mask_password

__all__ = ["Account", "Password"]

logger = logging.getLogger("ctxdb_pgstatus")

Password: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""A password, or a function that returns the one of the moment; the function may be a coroutine function."""


@dataclass(slots=True)
class Account:
    """As whom, and for what database, hosts are connected to.

    Attributes:
        user: the PostgreSQL role.
        password: its password, or what returns it; without one, libpq's ``PGPASSWORD`` and password file are used.
        database: the database to connect to.
        ssl: as asyncpg takes it.
        password_file: a file that holds nothing but the password; read anew for each connection.
    """

    user: str
    password: Password | None = field(repr=False)
    database: str
    ssl: SSLContext | str | bool | None = field(repr=False)
    password_file: Path | None = None
    _last_password: str | None = field(default=None, init=False, repr=False)

    @property
    def driver_password(self) -> Password | None:
        """What the driver is given: it calls a function whenever it opens a connection."""
        return self.password if self.password is None and self.password_file is None else self._current_password

    async def _current_password(self) -> str:
        """Return the password of the moment, or the last one where it cannot be had now.

        A host must not look dead because a vault is away: with an old password its server still says that it is there.
        """
        try:
            password = await self._read_password()
        except Exception:
            if self._last_password is None:
                raise
            logger.exception("The monitor's password could not be had; the last one is used.")
            return self._last_password
        self._last_password = password
        return password

    async def _read_password(self) -> str:
        if self.password_file is not None:
            # A few bytes of a local file: a thread would take longer than the read.
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        if callable(self.password):
            found = self.password()
            return await found if inspect.isawaitable(found) else found
        assert self.password is not None
        return self.password

    def mask(self, text: str) -> str:
        """Return a message without the password that was used last."""
        return mask_password(text, self._last_password, (self.user, self.database))
