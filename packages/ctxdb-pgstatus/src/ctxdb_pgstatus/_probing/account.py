"""`Account`: the PostgreSQL role by which a monitor connects to hosts, and where its password comes from."""

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
"""A password, or a function that returns the password of the moment; it may be a coroutine function."""


@dataclass(slots=True)
class Account:
    """The role and the database by which a monitor connects to hosts.

    Attributes:
        user: the PostgreSQL role.
        password: the password of the role, or a function that returns it. Without a password and a password file,
            asyncpg uses ``PGPASSWORD`` and libpq's password file.
        database: the database to connect to.
        ssl: the option `ssl` of ``asyncpg.connect``.
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
        """The option `password` of ``asyncpg.connect``, which calls a function for each connection that it opens."""
        return self.password if self.password is None and self.password_file is None else self._current_password

    async def _current_password(self) -> str:
        """Return the password of the moment; the last password if that cannot be read now.

        A host must not look dead because a vault is away: a server that refuses an old password shows that it runs.
        """
        try:
            password = await self._read_password()
        except Exception:
            if self._last_password is None:
                raise
            logger.exception("The monitor's password could not be read; the last password is used.")
            return self._last_password
        self._last_password = password
        return password

    async def _read_password(self) -> str:
        if self.password_file is not None:
            # The file has a few bytes: to start a thread for the read would take longer than the read.
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        if callable(self.password):
            found = self.password()
            return await found if inspect.isawaitable(found) else found
        assert self.password is not None
        return self.password

    def mask(self, text: str) -> str:
        """Return a message without the password that was used last."""
        return mask_password(text, self._last_password, (self.user, self.database))
