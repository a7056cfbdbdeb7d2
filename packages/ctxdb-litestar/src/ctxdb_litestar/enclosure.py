"""`enclose`: a middleware around the whole of a Litestar application, or around its router."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from ctxdb_core.asgi import ASGIApp

__all__ = ["enclose"]

M = TypeVar("M", bound=ASGIApp)


def enclose(app: Any, middleware: Callable[[ASGIApp], M], key: object) -> M:
    """Put a middleware around all that `app` does for a request, and return it.

    Litestar has no place for such a one. Its middlewares belong to routes: an unknown path reaches none of them, and
    `before_send` hooks and the exception handlers of the application run outside of all. So this one object is given a
    class of its own, whose ``__call__`` goes through the middleware.

    Args:
        app: the application, or its router.
        middleware: called with what is to be enclosed.
        key: whose middleware it is; `app` is enclosed once for each.
    """
    base = type(app)
    for each in base.__mro__:
        if vars(each).get(_KEY) is key:
            existing: M = vars(each)[_MIDDLEWARE]
            return existing
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
        _MIDDLEWARE: enclosed,
    }
    app.__class__ = type(base.__name__, (base,), namespace)
    return enclosed


_KEY = "_ctxdb_key"
_MIDDLEWARE = "_ctxdb_middleware"
