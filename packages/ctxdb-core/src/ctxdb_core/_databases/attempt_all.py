"""Closes several things, each of them also if closing another one fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

__all__ = ["attempt_all"]


async def attempt_all(closers: Collection[Callable[[], Awaitable[None]]]) -> None:
    """Await each of `closers`, also if another one has failed.

    Raises:
        Exception: the only error; an ``ExceptionGroup`` if there were several.
    """
    errors: list[Exception] = []
    for close in closers:
        try:
            await close()
        except Exception as exc:  # noqa: BLE001 - every one is attempted before an error surfaces
            errors.append(exc)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup("Not everything could be closed.", errors)
