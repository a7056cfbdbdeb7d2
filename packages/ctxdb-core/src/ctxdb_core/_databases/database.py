"""`Database`: what modules below `DBConnect` call it by."""

from __future__ import annotations

__all__ = ["Database"]


class Database:
    """A database as the application knows it. There is one kind: `DBConnect`, from which its listeners are told."""

    @property
    def host(self) -> str | None:
        """The host that new sessions go to; ``None`` before the first `DBConnect.connect`."""
        raise NotImplementedError
