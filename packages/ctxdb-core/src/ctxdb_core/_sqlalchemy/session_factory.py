"""Makes the sessions that a `DBConnect` hands out: of classes that are derived from the user's own ones.

`_derive` puts `GuardedSession` and `CommitSession`, or `DoorSession`, into the bases of the user's class. What that
overrides stays in effect, and ``isinstance`` holds.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from ctxdb_core._sqlalchemy.door_session import DoorSession, call_of_users_class, through_the_door
from ctxdb_core._sqlalchemy.guarded_session import GuardedSession, guard_of
from ctxdb_core._sqlalchemy.private import SessionPattern, seed_dispatch
from ctxdb_core._sqlalchemy.traced_session import CommitSession

__all__ = ["SessionFactory", "guarded"]

BeforeCommit: TypeAlias = Callable[[Any], None]

# By weak references both: SQLAlchemy 2.0 makes a class for each session maker, and a derived class knows its base.
_derived: WeakKeyDictionary[type, ref[Any]] = WeakKeyDictionary()


class PlainSession(GuardedSession, CommitSession):
    """The class that stands for SQLAlchemy's own synchronous session."""


# As a class that is derived from the user's has the names of that: polars takes an object for one of SQLAlchemy's by
# the module of its class.
for _own, _plain in ((PlainSession, Session), (DoorSession, AsyncSession)):
    _own.__module__, _own.__qualname__, _own.__name__ = _plain.__module__, _plain.__qualname__, _plain.__name__


def derive_sync(cls: type[Session]) -> type[GuardedSession]:
    """Return the class of this module that stands for `cls`: one for each class, made at the first use."""
    if cls is Session:
        return PlainSession
    if issubclass(cls, GuardedSession):
        return cls
    bases = (GuardedSession, cls, CommitSession)
    derived: type[GuardedSession] = _derive(cls, bases, {}, closes_plainly=cls.close is Session.close)
    return derived


def derive_async(cls: type[AsyncSession]) -> type[DoorSession]:
    """Return the class of this module that stands for `cls`: one for each class, made at the first use."""
    if cls is AsyncSession:
        return DoorSession
    if issubclass(cls, DoorSession):
        return cls
    derived: type[DoorSession] = _derive(
        cls, (cls, DoorSession), _own_calls(cls), closes_plainly=cls.close is AsyncSession.close
    )
    return derived


def _own_calls(cls: type[AsyncSession]) -> dict[str, Any]:
    """Return those methods of the user's class that start a greenlet themselves, through the door.

    SQLModel's ``exec`` is one: it would take its turn after the autoflush that it begins with.
    """
    classes = cls.__mro__[: cls.__mro__.index(AsyncSession)]
    own = {name: method for each in reversed(classes) for name, method in vars(each).items()}
    return {
        name: through_the_door(method, {"greenlet_spawn": call_of_users_class})
        for name, method in own.items()
        if isinstance(method, types.FunctionType) and method.__globals__.get("greenlet_spawn") is greenlet_spawn
    }


def _derive(cls: type, bases: tuple[type, ...], methods: dict[str, Any], *, closes_plainly: bool) -> Any:
    known = _derived.get(cls)
    derived = None if known is None else known()
    if derived is None:
        namespace = {
            **methods,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "closes_plainly": closes_plainly,
        }
        derived = types.new_class(cls.__name__, bases, {}, lambda body: body.update(namespace))
        _derived[cls] = ref(derived)
    return derived


_listening: WeakKeyDictionary[type, dict[BeforeCommit, ref[Any]]] = WeakKeyDictionary()


def _derive_listening(cls: type[GuardedSession], before_commit: BeforeCommit) -> type[GuardedSession]:
    """Return a class like `cls`, whose sessions call `before_commit` before each commit.

    A listener of a class costs its sessions nothing but the call; one that each session is given costs 20 microseconds.
    """
    known = _listening.setdefault(cls, {}).get(before_commit)
    derived: type[GuardedSession] | None = None if known is None else known()
    if derived is None:
        body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        derived = type(cls.__name__, (cls,), {**body, "notes_writes": True})
        event.listen(derived, "before_commit", before_commit)
        _listening[cls][before_commit] = ref(derived)
    return derived


class SessionFactory:
    """Makes sessions as a session maker does, of the derived classes.

    Args:
        maker: the user's session maker. What ``maker.configure()`` changes later is seen.
        before_commit: called with each session before it commits, which knows whether it has written then.
    """

    __slots__ = (
        "_async_class",
        "_before_commit",
        "_class",
        "_is_constructed_plainly",
        "_pattern",
        "_settings",
        "_sync_class",
        "_sync_class_given",
        "maker",
    )

    def __init__(self, maker: async_sessionmaker[Any], before_commit: BeforeCommit | None = None) -> None:
        self.maker: async_sessionmaker[Any] = maker
        self._before_commit = before_commit
        self._class: Any = None
        self._sync_class_given: Any = None
        self._settings: dict[str, Any] | None = None
        """The session maker's options when the pattern was looked for; ``None`` before that."""
        self._pattern: SessionPattern | None = None

    def __call__(self, **options: Any) -> AsyncSession:
        """Return a new session, with `options` in the place of those of the session maker."""
        maker = self.maker
        if self._pattern is not None and not options and maker.kw == self._settings and self._has_same_classes():
            return self._pattern()
        if type(maker) is not async_sessionmaker:
            # A class derived from `async_sessionmaker` may make sessions in a way of its own.
            return self._guarded(maker(**options))
        if not isinstance(self._given_sync_class(), type) or not isinstance(maker.class_, type):
            # The session maker was given a function instead of a class: the class of a session is known once it is
            # made.
            return self._guarded(maker(**options))
        if not self._has_same_classes():
            self._class, self._sync_class_given = maker.class_, self._given_sync_class()
            self._async_class, self._sync_class = derive_async(self._class), self._derive_sync(self._sync_class_given)
            self._is_constructed_plainly = self._has_plain_constructors()
            self._settings = self._pattern = None
        if not options and maker.kw != self._settings:
            self._settings = maker.kw.copy()
            self._pattern = self._find_pattern()
        settings = {**maker.kw, **options}
        if "info" in options and "info" in maker.kw:
            settings["info"] = {**maker.kw["info"], **options["info"]}
        return self._construct(settings)

    def _derive_sync(self, cls: type[Session]) -> type[GuardedSession]:
        derived = derive_sync(cls)
        return derived if self._before_commit is None else _derive_listening(derived, self._before_commit)

    def _guarded(self, session: AsyncSession) -> AsyncSession:
        if self._before_commit is not None:
            # A session has the listeners of the class that it was made of: those of a derived class would come too
            # late.
            event.listen(session.sync_session, "before_commit", self._before_commit)
            guard_of(guarded(session)).notes_writes = True
        return guarded(session)

    def _given_sync_class(self) -> Any:
        return self.maker.kw.get("sync_session_class") or self.maker.class_.sync_session_class

    def _has_same_classes(self) -> bool:
        return self.maker.class_ is self._class and self._given_sync_class() is self._sync_class_given

    def _construct(self, settings: dict[str, Any]) -> AsyncSession:
        settings["sync_session_class"] = self._sync_class
        session: AsyncSession = self._async_class(**settings)
        if self._is_constructed_plainly:
            # Another constructor, such as that of `ShardedSession`, may have given the session listeners.
            seed_dispatch(session.sync_session)
        return session

    def _has_plain_constructors(self) -> bool:
        classes: tuple[Any, ...] = (self._async_class, self._sync_class)
        return (
            all(cls.__new__ is object.__new__ for cls in classes)
            and self._async_class.__init__ is AsyncSession.__init__
            and self._sync_class.__init__ is Session.__init__
        )

    def _find_pattern(self) -> SessionPattern | None:
        """Return a pattern of the sessions that the settings make; ``None`` if their classes do more to make one."""
        if not self._is_constructed_plainly:
            return None
        if any(isinstance(value, Mapping) for value in self.maker.kw.values()):
            # The user's code may change the mapping later, which a pattern would not see.
            return None
        return SessionPattern.of(lambda: self._async_class(**{**self.maker.kw, "sync_session_class": self._sync_class}))


def guarded(session: AsyncSession) -> AsyncSession:
    """Return a session that was made elsewhere, with its classes replaced by ctxdb's derived ones."""
    sync_session = session.sync_session
    if not isinstance(sync_session, GuardedSession):
        sync_session.__class__ = derive_sync(type(sync_session))
    if not isinstance(session, DoorSession):
        session.__class__ = derive_async(type(session))
    return session
