"""`enclose`: a middleware around the whole of a Litestar application."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from litestar import Litestar

from ctxdb_core.asgi import ASGIApp

__all__ = ["enclose"]


def enclose(app: Litestar, middleware: Callable[[ASGIApp], ASGIApp], key: object) -> None:
    """Put a middleware around all that `app` does for a request: CORS, routing, its `before_send` hooks.

    Litestar has no place for such a one. Its middlewares belong to routes: an unknown path reaches none of them, and
    `before_send` hooks and the exception handlers of the application run outside of all. So this one object is given a
    class of its own, whose ``__call__`` goes through the middleware.

    Args:
        app: the application.
        middleware: called with what is to be enclosed.
        key: whose middleware it is; the application is enclosed once for each.
    """
    base = type(app)
    if any(vars(each).get(_KEY) is key for each in base.__mro__):
        return
    enclosed = middleware(MethodType(base.__call__, app))

    async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:  # noqa: N807 - it becomes the method
        await enclosed(scope, receive, send)

    namespace = {
        # The same layout as the base: otherwise, Python would refuse to change the class.
        "__slots__": (),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        _KEY: key,
    }
    app.__class__ = type(base.__name__, (base,), namespace)


_KEY = "_ctxdb_key"
