"""`enclose`: a middleware around the whole of a Litestar application, or around its router."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

from ctxdb_core.asgi import ASGIApp

__all__ = ["enclose"]

M = TypeVar("M", bound=ASGIApp)


def enclose(app: Any, middleware: Callable[[ASGIApp], M], key: object, *, is_foreign: bool = False) -> M:
    """Put a middleware around all that `app` does for a request, and return it.

    Litestar has no place for such a middleware. Its own belong to routes: an unknown path reaches none of them, and
    `before_send` hooks and the exception handlers of the application run outside of all. So this one object is given a
    class of its own, whose ``__call__`` goes through the middleware.

    Args:
        app: the application, or its router.
        middleware: called with what is to be enclosed.
        key: whose middleware it is; `app` is enclosed once for each.
        is_foreign: whether `middleware` makes objects of any kind. Servers, and a Litestar application around `app`,
            want a coroutine function with certain parameters. An object of ctxdb has such a method, which requests get
            to without a call in between.
    """
    base = type(app)
    for each in base.__mro__:
        if vars(each).get(_KEY) is key:
            existing: M = vars(each)[_MIDDLEWARE]
            return existing
    enclosed = middleware(app.__call__)
    method: Any = enclosed.__call__  # type: ignore[operator]  # it is callable, as its bound says

    async def call(scope: Any, receive: Any, send: Any) -> None:
        await enclosed(scope, receive, send)

    namespace = {
        # The same layout as the base: otherwise, Python would refuse to change the class.
        "__slots__": (),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": staticmethod(call if is_foreign else method),
        # Of a static method, the first parameter would be taken for ``self``.
        "__signature__": signature(app),
        _KEY: key,
        _MIDDLEWARE: enclosed,
    }
    app.__class__ = type(base.__name__, (base,), namespace)
    return enclosed


_KEY = "_ctxdb_key"
_MIDDLEWARE = "_ctxdb_middleware"
