"""Checks what is passed to a `DBConnect`: the error for a wrong argument names the right call."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from ctxdb_core._signatures import signature_of
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "awaitable_of",
    "check_async_engine",
    "check_engine_options",
    "check_function",
    "check_held_after",
    "check_session_handler",
    "check_session_maker_creator",
    "check_url",
    "explain_missing_call",
    "parameters_of",
    "why_no_engine_creator",
]

_MAKER_EXAMPLE = (
    "session_maker_creator=lambda engine: async_sessionmaker(engine, class_=YourSession, expire_on_commit=False)"
)

_SESSION_OPTIONS = (
    inspect.signature(AsyncSession).parameters.keys()
    | inspect.signature(Session).parameters.keys()
    | inspect.signature(async_sessionmaker).parameters.keys()
) - {"execution_options", "future"}
"""The options of sessions and of session makers, without the two that an engine has as well."""


def check_function(function: object, name: str) -> None:
    """Raise the error that says what to pass if `function`, an argument called `name`, cannot be called.

    Raises:
        ArgumentTypeError: `function` cannot be called; if it is a coroutine, it is closed.
    """
    if callable(function):
        return
    if inspect.iscoroutine(function):
        function.close()
        raise ArgumentTypeError(
            f"A coroutine is given as {name}, which calls a function at its time, and may call it more than once: pass "
            "the function itself, or `functools.partial(function, ...)` with its arguments."
        )
    raise ArgumentTypeError(f"{type_of(function)} is given as {name}, which takes a function.")


def awaitable_of(result: object, function: object, name: str) -> Awaitable[object]:
    """Return the `result` of a function of the user's, which is to be awaited.

    Args:
        result: what the function has returned.
        function: the function.
        name: what it was given as.

    Raises:
        ArgumentTypeError: `result` cannot be awaited.
    """
    if inspect.isawaitable(result):
        return result
    raise ArgumentTypeError(
        f"{function!r}, given as {name}, is no async function: it has returned {type_of(result)}, which cannot be "
        "awaited. Write it with `async def`."
    )


def why_no_engine_creator(creator: object) -> str | None:
    """Return what is wrong with `creator` as a function that makes engines; ``None`` if nothing is."""
    if inspect.iscoroutinefunction(creator):
        return "an async function is given, and it is called without `await`: make it a plain one"
    if isinstance(creator, type) or not callable(creator):
        return f"{type_of(creator)} is given"
    count = parameters_of(creator)
    if count is not None and count > 1:
        return f"a function is given that needs {count} arguments, and it gets the host alone"
    return None


def parameters_of(function: Callable[..., Any]) -> int | None:
    """Return how many positional arguments `function` has to be given: 0, 1, more; ``None`` where that is not known.

    A function that can take one argument, and need not, counts as 1.
    """
    try:
        signature = signature_of(function)
    except (TypeError, ValueError):
        # Some functions that are written in C have no signature.
        return None
    for count in (1, 0, 2, 3):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count
    return None


def check_session_maker_creator(creator: object) -> None:
    """Raise the error that says what to pass if `creator` is no function that makes a session maker for an engine."""
    if isinstance(creator, async_sessionmaker):
        hint = "a session maker is given, which is bound to one engine or none: pass a function that makes it"
    elif isinstance(creator, type) and issubclass(creator, async_sessionmaker):
        # Called with the engine, it returns a session maker.
        return
    elif isinstance(creator, type):
        hint = f"the class {creator.__name__} is given: pass a function that makes a session maker of it"
    elif inspect.iscoroutinefunction(creator):
        hint = "an async function is given, and it is called without `await`: make it a plain one"
    elif not callable(creator):
        hint = f"{type_of(creator)} is given"
    elif (count := parameters_of(creator)) == 0:
        hint = "a function is given that takes no engine"
    elif count is not None and count > 1:
        hint = f"a function is given that needs {count} arguments, and it gets the engine alone"
    else:
        return
    raise ArgumentTypeError(
        f"session_maker_creator takes a function of the engine that returns its session maker; {hint}. For instance: "
        f"`{_MAKER_EXAMPLE}`."
    )


def check_session_handler(handler: Callable[..., Any]) -> None:
    """Raise the error that says what to pass if `handler` cannot be called with a `DBConnect` before its sessions."""
    check_function(handler, "`before_create_session_handler`")
    count = parameters_of(handler)
    if count is not None and count != 1:
        raise ArgumentTypeError(
            f"`before_create_session_handler` is called with the `DBConnect` alone, and a function is given that "
            f"{f'needs {count} arguments' if count else 'takes no argument'}: write `async def handler(db): ...`."
        )


def check_held_after(seconds: object) -> None:
    """Raise the error that says what to give if `seconds`, a ``warn_connection_held_after``, is no time."""
    if seconds is None:
        return
    if not isinstance(seconds, int | float):
        raise ArgumentTypeError(
            f"{type_of(seconds)} is given as `warn_connection_held_after`: give a number of seconds, or None for no "
            "warning."
        )
    if not seconds >= 0:
        raise ArgumentValueError(f"warn_connection_held_after is {seconds}: give seconds, 0 or more.")


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Raise an error if some of the `options` of an engine are options of sessions; it says where to put these."""
    if "host" in options or "port" in options:
        raise ArgumentTypeError("from_url() takes host and port as parts of the URL alone.")
    if misplaced := sorted(_SESSION_OPTIONS & options.keys()):
        raise ArgumentTypeError(
            f"from_url() passes its options on to `create_async_engine`, and {_enumerate(misplaced)} "
            f"{'is an option' if len(misplaced) == 1 else 'are options'} of sessions: give it to the session maker, by "
            f"`DBConnect.from_url(url, {_MAKER_EXAMPLE})`. Without one, sessions are made with "
            "expire_on_commit=False already."
        )


def _enumerate(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def check_url(url: object) -> URL:
    """Return `url` parsed; raise the error that says what to pass if it is no URL, or has no driver for asyncio."""
    if isinstance(url, AsyncEngine):
        raise ArgumentTypeError("from_url() is given an engine: there is `DBConnect.from_engine(engine)` for that.")
    if not isinstance(url, str | URL):
        hint = ": `DBConnect(engine_creator)` takes a function" if callable(url) else ""
        raise ArgumentTypeError(f"from_url() takes a string or a `sqlalchemy.URL`, and {type_of(url)} is given{hint}.")
    try:
        parsed = make_url(url)
    except ValueError:
        # What is taken for the port may be a part of the password: neither the message nor the cause may show it.
        raise ArgumentValueError(
            "The port in the URL of a database is no number. An `@` in a password ends it there: write it as `%40`, or "
            "make the URL by `sqlalchemy.URL.create`."
        ) from None
    _check_asyncio_driver(parsed)
    return parsed


def _check_asyncio_driver(url: URL) -> None:
    """Raise the error that says what to write if the driver in `url` is not for asyncio, or SQLAlchemy has none."""
    driver = _ASYNCIO_DRIVERS.get(url.get_backend_name())
    hint = "name a driver that is" if driver is None else f"write {driver!r}, for instance"
    try:
        dialect = url.get_dialect()
    except NoSuchModuleError as exc:
        raise ArgumentValueError(
            f"The driver of a {url.drivername!r} URL is not known to SQLAlchemy, nor to a package that is installed: "
            f"{hint}."
        ) from exc
    if not dialect.get_async_dialect_cls(url).is_async:
        raise ArgumentValueError(f"The driver of a {url.drivername!r} URL is not for asyncio: {hint}.")


_ASYNCIO_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    # Many providers of databases give their addresses so; SQLAlchemy took it until 1.4.
    "postgres": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}


def check_async_engine(engine: object) -> AsyncEngine:
    """Return `engine`, or raise the error that says what to pass instead."""
    if isinstance(engine, AsyncEngine):
        return engine
    if isinstance(engine, Engine):
        hint = "a synchronous Engine is given: make it by `sqlalchemy.ext.asyncio.create_async_engine`"
    elif isinstance(engine, str | URL):
        hint = "a URL is given: there is `DBConnect.from_url(url)` for that"
    elif isinstance(engine, async_sessionmaker):
        hint = "a session maker is given: pass its engine, and how it makes sessions as `session_maker_creator=`"
    elif callable(engine) and not isinstance(engine, type):
        hint = "a function is given: `DBConnect(engine_creator)` takes one that creates engines"
    else:
        hint = f"{type_of(engine)} is given"
    raise ArgumentTypeError(f"from_engine() takes an AsyncEngine; {hint}.")


def looks_like_url(value: object) -> bool:
    """Return whether `value` is a database's URL."""
    if isinstance(value, URL):
        return True
    try:
        return isinstance(value, str) and bool(make_url(value))
    except (ArgumentError, ValueError):
        return False


def explain_missing_call(method: Any, result: type, call: str) -> None:
    """Have the methods of `result` say what is missing when they are called on `method` itself.

    ``db.engine.begin()`` is a mistake for ``(await db.engine()).begin()``. A bound method has the attributes of its
    function, so `method` gets one attribute for each method of `result`.

    Args:
        method: a function that returns a `result`, once it is awaited.
        result: the class whose methods explain themselves.
        call: the code that gets a `result`, for the error to show.
    """

    def explaining(name: str) -> Callable[..., Any]:
        def explain(*args: object, **kwargs: object) -> None:
            raise ArgumentTypeError(
                f"`db.{method.__name__}` is a method that is to be called and awaited, and `{name}` is asked of the "
                f"method itself: write `{call}`, then `{call.partition(' ')[0]}.{name}(...)`."
            )

        return explain

    for name, member in inspect.getmembers(result):
        if not name.startswith("_") and callable(member):
            setattr(method, name, explaining(name))
