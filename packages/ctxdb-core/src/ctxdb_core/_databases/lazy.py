"""`LazySessionMaker`: a session maker that is there before any engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

__all__ = ["LazySessionMaker"]

SessionT = TypeVar("SessionT", bound=AsyncSession)


class LazySessionMaker(async_sessionmaker[SessionT]):
    """Makes each session anew on the engine that its database has then: see `DBConnect.lazy_session_maker`.

    Args:
        create: makes a session, with further options of it.
        find_class: returns the class of the sessions.
    """

    def __init__(self, create: Callable[..., SessionT], find_class: Callable[[], type[SessionT]]) -> None:
        # `async_sessionmaker.__init__` would need the session class, and so an engine, now.
        self.kw = {}
        self._create = create
        self._find_class = find_class

    @property
    def class_(self) -> type[SessionT]:  # type: ignore[override]  # only read, by libraries that want to know the kind
        """The class of the sessions."""
        return self._find_class()

    def __call__(self, **local_kw: Any) -> SessionT:
        """Return a new session, which its caller closes.

        Args:
            **local_kw: options of this one session.
        """
        options = {**self.kw, **local_kw}
        if "info" in self.kw and "info" in local_kw:
            options["info"] = {**cast("dict[Any, Any]", self.kw["info"]), **local_kw["info"]}
        return self._create(**options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._create.__self__!r}>"  # type: ignore[attr-defined]  # a bound method
