"""`Database`: the name of `DBConnect` in the modules that it imports."""

from __future__ import annotations

__all__ = ["Database"]


class Database:
    """A database as the application knows it. The only kind is `DBConnect`; modules below it name it by this class."""

    @property
    def host(self) -> str | None:
        """The host that new sessions go to; ``None`` before the first `DBConnect.connect`."""
        raise NotImplementedError
