"""What an application of a scenario does, said without a framework: each adapter builds the same one its own way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ctxdb_core import DBConnect, commit_below_400
from ctxdb_core.adapters import BeforeCommit, CommitPolicy

Background: TypeAlias = Callable[[], Awaitable[None]]


@dataclass
class Reply:
    """A response with its whole body at once."""

    body: str = ""
    status: int = 200
    background: Background | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Stream:
    """A response whose body is made while it is sent."""

    chunks: AsyncGenerator[str, None]
    status: int = 200
    background: Background | None = None


class Refusal(Exception):  # noqa: N818 - not every HTTP exception is an error
    """Stands for the framework's own HTTP exception with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Request:
    """What a handler may want to know of its request."""

    query: str
    """The query string."""
    read: Callable[[], Awaitable[bytes]]
    """Reads the whole body, and raises the framework's error if the client leaves meanwhile."""


current_request: ContextVar[Request] = ContextVar("current_request")
"""The request that a handler is answering: each adapter sets it before it calls one."""


class Socket(Protocol):
    """A websocket whose handshake was accepted."""

    async def receive(self) -> str | None:
        """Return the next text message, or ``None`` once the client has left."""

    async def send(self, text: str) -> None:
        """Send a text message."""

    async def close(self, code: int) -> None:
        """Close the connection."""


Handler: TypeAlias = Callable[[], Awaitable[Reply | Stream]]
SocketHandler: TypeAlias = Callable[[Socket], Awaitable[None]]


Around: TypeAlias = Callable[[Callable[[], None]], Awaitable[Reply]]
"""A middleware that gives up on handlers: it is given a function that starts one, calls that, and answers instead."""


@dataclass
class Application:
    """One application: its routes, its exception handlers, and the options of the adapter."""

    routes: dict[str, Handler] = field(default_factory=dict)
    sockets: dict[str, SocketHandler] = field(default_factory=dict)
    """Handlers of websockets, by path; returning closes with 1000."""
    mounts: dict[str, Application] = field(default_factory=dict)
    """Complete applications, the adapter in them included, by the prefix of their paths."""
    around: Around | None = None
    exception_statuses: dict[type[Exception], int] = field(default_factory=dict)
    before_commit: BeforeCommit | None = None
    commit_policy: CommitPolicy = commit_below_400
    dbs: tuple[DBConnect, ...] = ()
    """The databases that are closed when the application shuts down."""
    errors: list[BaseException] = field(default_factory=list)
    """The exceptions that have come out of the adapter, on their way to the server."""

    def route(self, path: str) -> Callable[[Handler], Handler]:
        """Register a handler; it answers every method."""

        def register(handler: Handler) -> Handler:
            self.routes[path] = handler
            return handler

        return register
