"""`ReadYourWrites`: a client that has written reads from a replica that has replayed it, or from the master."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from inspect import ismethod
from typing import Any
from weakref import WeakMethod

from ctxdb_core.asgi import ASGIApp, Message, Receive, Scope, Send, has_unit_of_work
from ctxdb_pgstatus._following.positions import DEFAULT_MAX_AGE, Positions, current_positions, want_positions
from ctxdb_pgstatus._options import check_seconds, check_source
from ctxdb_pgstatus._token import TokenSigner, WalPosition
from ctxdb_pgstatus.errors import MiddlewareOrderError, OptionError
from ctxdb_pgstatus.source import HostSource

__all__ = ["ReadYourWrites"]

_SHORTEST_SECRET = 16
# A token (RFC 9110, section 5.6.2): the form of the names of header fields and of cookies (RFC 6265, section 4.1.1).
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

# The key by which the ASGI scope, or aiohttp's writer, keeps the positions of a request.
_KEY = "ctxdb_pgstatus.positions"


class ReadYourWrites:
    """Lets each client read what it has written, wherever it reads.

    After a committed write, the response carries the WAL position after the commit, in a signed cookie or in a header
    field. A later request that brings this position along reads from a replica that has replayed it, after a short wait
    if need be; else from the master. For clients that have written nothing, nothing changes.

    The middleware is added in one line, around the unit of work::

        app.add_middleware(DBSessionMiddleware)  # Starlette and FastAPI: what is added later is further out
        app.add_middleware(ReadYourWrites(monitor, secret=...))

        Litestar(plugins=[CtxDBPlugin(db), EnclosingPlugin(ReadYourWrites(monitor, secret=...))])

        ReadYourWrites(monitor, secret=...).setup(app)  # aiohttp

    The writes of a client are those through a `follow_master` on the same source, and its reads are those through a
    `follow_replica`. If a streamed body or a background task writes after the response has begun, it is too late to
    tell the client of that write.

    Args:
        source: knows the cluster.
        secret: the key by which the positions are signed: at least 16 bytes, the same for all processes of the
            application.
        max_age: for how many seconds a client's last write is remembered. This has to be longer than replicas may lag.
        cookie: the name of the cookie. Two clusters behind one site need different names; an application that uses both
            has one `ReadYourWrites` around another.
        header: the name of a header field of responses and requests, for clients without cookies. If it is given, no
            cookie is used.
        wait: how many seconds to wait for a replica that has replayed a position, before the master is read from.
        secure: whether the cookie is for HTTPS only; by default, if the request has come by HTTPS. Behind a proxy that
            does not tell the application so, give ``True``.

    Raises:
        OptionError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        source: HostSource,
        *,
        secret: str | bytes,
        max_age: float = DEFAULT_MAX_AGE,
        cookie: str = "ctxdb_position",
        header: str | None = None,
        wait: float = 0.1,
        secure: bool | None = None,
    ) -> None:
        check_source(source)
        if not isinstance(secret, str | bytes):
            raise OptionError(f"`secret` is of type {type(secret).__name__}: give a string, or bytes.")
        key = secret.encode() if isinstance(secret, str) else secret
        if len(key) < _SHORTEST_SECRET:
            raise OptionError(
                f"`secret` has {len(key)} bytes: give at least {_SHORTEST_SECRET}, from `secrets.token_bytes(32)` for "
                "instance."
            )
        check_seconds("max_age", max_age)
        check_seconds("wait", wait, or_zero=True)
        name: Any = cookie if header is None else header
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise OptionError(
                f"{name!r} cannot be the name of a {'cookie' if header is None else 'header field'}: give a name of "
                "letters, digits, dashes and underscores."
            )
        self.source = source
        self._max_age = max_age
        self._wait = wait
        self._secure = secure
        self._cookie = cookie if header is None else None
        self._field = "set-cookie" if header is None else header.lower()
        self._asked_field = b"cookie" if header is None else header.lower().encode()
        self._signer = TokenSigner(key, name, max_age)
        want_positions(source)

    def __call__(self, app: ASGIApp) -> ASGIApp:
        """Return an ASGI application that does what `app` does, and lets its clients read what they have written."""
        return _ReadYourWritesMiddleware(app, self)

    def setup(self, app: Any) -> None:
        """Add this middleware to an ``aiohttp.web.Application``, before or after `ctxdb_aiohttp.setup`."""

        async def read_your_writes(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
            writer = request.writer
            values = request.headers.getall(self._asked_field.decode(), ())
            positions = self.begin(vars(writer), (value.encode("utf-8", "surrogateescape") for value in values))
            # aiohttp runs each request in a task, and so in a context, of its own, which lasts until the body is sent.
            current_positions.set(positions)
            forward = _by_weak_reference(writer.write_headers)
            is_https = request.scheme == "https"

            async def write_headers_with_position(status_line: str, headers: Any) -> None:
                # The unit of work commits in the hook `on_response_prepare`, or before it: so the position is known
                # only here, where aiohttp is about to write the header fields.
                if (value := self.value_for(positions, is_https=is_https)) is not None:
                    headers.add(self._field, value)
                await forward(status_line, headers)

            writer.write_headers = write_headers_with_position
            return await handler(request)

        # What `aiohttp.web.middleware` does, without an import of aiohttp.
        read_your_writes.__middleware_version__ = 1  # type: ignore[attr-defined]
        app.middlewares.insert(0, read_your_writes)

    def begin(self, kept: MutableMapping[str, Any], values: Iterable[bytes]) -> Positions:
        """Return the positions of a request, which all `ReadYourWrites` around one application share.

        Args:
            kept: keeps the positions for a `ReadYourWrites` further in: the ASGI scope, or the attributes of aiohttp's
                writer.
            values: the values of the header field in which a request may bring a token along.
        """
        positions: Positions | None = kept.get(_KEY)
        if positions is None:
            positions = kept[_KEY] = Positions()
        positions.limit(self.source, max_age=self._max_age, wait=self._wait)
        # A browser sends several cookies of one name if they were set for several paths: the highest position counts.
        tokens = [token for value in values for token in self._tokens(value.decode("latin-1"))]
        if tokens:
            above = WalPosition(positions.timeline(self.source), positions.required(self.source) or 0)
            found = self._signer.read(tokens, above=above)
            if found is not None:
                positions.bring(self.source, found.position, found.timeline)
        return positions

    def _tokens(self, value: str) -> list[str]:
        if self._cookie is None:
            return [value.strip()]
        pairs = (pair.partition("=") for pair in value.split(";") if self._cookie in pair)
        return [token.strip().strip('"') for name, _, token in pairs if name.strip() == self._cookie]

    @property
    def asked_field(self) -> bytes:
        """The name of the header field in which requests bring tokens along."""
        return self._asked_field

    @property
    def field(self) -> str:
        """The name of the header field in which responses carry tokens."""
        return self._field

    def value_for(self, positions: Positions, *, is_https: bool) -> str | None:
        """Return the value of the response's header field; ``None`` if the request has written nothing."""
        position = positions.written_by(self.source)
        if position is None:
            return None
        token = self._signer.sign(position, positions.timeline(self.source))
        if self._cookie is None:
            return token
        secure = "; Secure" if (is_https if self._secure is None else self._secure) else ""
        return f"{self._cookie}={token}; Path=/; Max-Age={int(self._max_age)}; HttpOnly; SameSite=Lax{secure}"


class _ReadYourWritesMiddleware:
    """The ASGI middleware that `ReadYourWrites` makes of itself."""

    def __init__(self, app: ASGIApp, options: ReadYourWrites) -> None:
        self.app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if has_unit_of_work(scope):
            raise MiddlewareOrderError
        options = self._options
        asked_field = options.asked_field
        positions = options.begin(scope, (value for name, value in scope["headers"] if name == asked_field))
        token = current_positions.set(positions)

        def send_with_position(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                value = options.value_for(positions, is_https=scope.get("scheme") == "https")
                if value is not None:
                    headers = [*message.get("headers", ()), (options.field.encode(), value.encode())]
                    message = {**message, "headers": headers}
            return send(message)

        try:
            await self.app(scope, receive, send_with_position if kind == "http" else send)
        finally:
            current_positions.reset(token)


def _by_weak_reference(method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Return a function that calls a method of aiohttp's writer, and keeps the writer by a weak reference only.

    The function becomes an attribute of that very writer: with a strong reference, only the garbage collector would
    free the two.
    """
    if not ismethod(method):
        # Another `ReadYourWrites` has put its function in the place of the method already.
        return method
    found = WeakMethod(method)

    async def forward(*args: Any) -> None:
        original = found()
        assert original is not None, "the writer that calls this function is alive"
        await original(*args)

    return forward
