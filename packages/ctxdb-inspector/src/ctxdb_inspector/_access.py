"""Who may look: by default, browsers on the same machine that come without a proxy."""

from __future__ import annotations

import inspect
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from ctxdb_core import ArgumentTypeError
from ctxdb_core.adapters import type_of

__all__ = ["Authorise", "check_authorise", "is_allowed", "is_local"]

Authorise: TypeAlias = Callable[[Any], bool | Awaitable[bool]]
"""Given the ASGI scope of a request, or aiohttp's request, returns whether its client may look; it may be async."""

# What proxies add. With one of them, the client's address is the proxy's, or what the proxy says.
_OF_PROXIES = {"cf-connecting-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-real-ip"}
_OF_PROXIES_PREFIX = "x-forwarded-"

# Pages of other origins: a permissive CORS middleware of the application would let them read what is shown here.
_STRANGE_SITES = {"cross-site", "same-site"}


def check_authorise(authorise: Authorise | None) -> None:
    """Raise the error that says what to pass if `authorise` cannot be called."""
    if authorise is not None and not callable(authorise):
        raise ArgumentTypeError(
            f"{type_of(authorise)} is given as `authorise`: give a function of the request that returns whether "
            "its client may look, or leave it out to let only clients on this machine do so."
        )


async def is_allowed(
    authorise: Authorise | None, request: Any, client: str | None, headers: Iterable[tuple[str, str]], version: str
) -> bool:
    """Return whether the client of a request may look.

    Args:
        authorise: the application's answer; without it, only a local client may.
        request: what `authorise` is given.
        client: the address that the server sees.
        headers: names, in lower case, and values.
        version: of HTTP, such as "1.1".
    """
    if authorise is None:
        return is_local(client, headers, version)
    allowed = authorise(request)
    if inspect.isawaitable(allowed):
        allowed = await allowed
    # Nothing but `True` lets a client in: neither ``None``, of a function that forgets its ``return``, nor an object.
    return allowed is True


def is_local(client: str | None, headers: Iterable[tuple[str, str]], version: str) -> bool:
    """Return whether a request was made on this machine, without a proxy, for a name of this machine.

    The name has to be one, as a page on the internet may have its own name lead to 127.0.0.1 (DNS rebinding). A
    server on a Unix socket knows no address of a client: what listens there is behind a proxy. So is what is asked by
    HTTP/1.0: browsers do not, and it is how nginx asks where it is told nothing else, with a ``Host`` of its own and
    without a word of its client.
    """
    if not _is_loopback(client) or version == "1.0":
        return False
    has_host = False
    for name, value in headers:
        if name in _OF_PROXIES or name.startswith(_OF_PROXIES_PREFIX):
            return False
        if name == "host":
            has_host = True
            if not _names_this_machine(value):
                return False
        if name == "sec-fetch-site" and value in _STRANGE_SITES:
            return False
    return has_host


def _is_loopback(address: str | None) -> bool:
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _names_this_machine(host: str) -> bool:
    name = host.lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)
