"""Cancellation at a chosen step of some work, whatever the step is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any


class Interruption:
    """Lets work be cancelled when it waits for the n-th time."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.waits = 0
        self.is_over = False
        self._cancel: Callable[[], object] | None = None

    def cancel_when(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel

    @property
    def has_been_missed(self) -> bool:
        """Whether the work was done before."""
        return self.is_over and self.waits < self.step

    @coroutine
    def run(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Do what ``yield from work`` does, and count what it waits for."""
        resume: Callable[[Any], Any] = work.send
        argument: Any = None
        while True:
            try:
                awaited = resume(argument)
            except BaseException as exc:
                self.is_over = True
                if isinstance(exc, StopIteration):
                    return
                raise
            self.waits += 1
            if self.waits == self.step and self._cancel is not None:
                asyncio.get_running_loop().call_soon(self._cancel)
            resume = work.send
            try:
                argument = yield awaited
            except BaseException as exc:  # noqa: BLE001 - it is the work's
                resume, argument = work.throw, exc
