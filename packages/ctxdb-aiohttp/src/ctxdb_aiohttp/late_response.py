"""`LateResponse`: a response that aiohttp sends, and for which code of the application runs meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web

from ctxdb_aiohttp.exchange import Exchange
from ctxdb_aiohttp.response import take_back
from ctxdb_aiohttp.writer import Delivery, WatchedWriter, start_over, status_in, write_server_error
from ctxdb_core.adapters import FINISHING, Phase, finalize, is_inside

__all__ = ["LateResponse"]

logger: logging.Logger = logging.getLogger("ctxdb")

# The ends of units of work whose responses were cut off.
_cleaning_up: set[asyncio.Task[None]] = set()


class LateResponse(Delivery):
    """A response that is sent when the middlewares have returned: its unit of work lives until then.

    Its body may still have to be made, or there are handlers for ``on_response_prepare``. The transactions of the
    handler have ended before. What is done since is committed before the head is written, and before the body ends.

    Args:
        exchange: that of the request.
        request: the request.
    """

    response: web.StreamResponse | None = None
    """What is about to be sent, once aiohttp prepares it: it answers an exception by a response of its own."""

    def __init__(self, exchange: Exchange, request: web.Request) -> None:
        self.exchange = exchange
        self.request: web.Request = request
        # The task of the connection, which serves many requests. The running task may be a middleware's, and end before
        # anything is sent.
        self.task: asyncio.Task[None] = request.task
        self.task.add_done_callback(self._clean_up)

    def expect(self, request: web.Request, response: web.StreamResponse) -> None:
        """Note that `response` is being prepared."""
        self.request, self.response = request, response
        self._re_enter()

    async def start(self, watched: WatchedWriter, status_line: str, headers: Any) -> None:
        """Write the head, once the transactions are ended as its status demands.

        If they cannot be ended, a 500 is written instead. No middleware is left to see the error, and aiohttp would
        hang up, which makes its own client ask again.

        Raises:
            ConnectionResetError: the 500 was written.
        """
        exchange = self.exchange
        self._re_enter()
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._clean_up)
        try:
            await exchange.settle_start(self.request, self.response, status_in(status_line))
        except BaseException as exc:
            await exchange.roll_back(exc)
            start_over(watched.writer)
            if self.response is not None:
                take_back(self.response)
            if not isinstance(exc, Exception):
                raise
            logger.exception("A response was replaced by a 500, as its transactions could not be ended")
            if self.response is not None:
                self.response.set_status(500)  # for the access log
            await write_server_error(self.request, watched)
            raise ConnectionResetError("The response was replaced by a 500.") from exc
        await watched.forward_head(status_line, headers)

    async def progress(self) -> None:
        """Give the connections back of transactions that have only read: a client may be slow to read."""
        await self.exchange.end_reading()

    async def end(self, watched: WatchedWriter, chunk: bytes) -> None:
        """Write the end of the body, once the unit of work has ended.

        Raises:
            BaseException: the error of the commit. The body has no end then.
        """
        exchange = self.exchange
        try:
            await exchange.end(commit=exchange.phase in FINISHING)
        except Exception as exc:
            exchange.break_off(self.response, exc)
            raise
        if exchange.phase is Phase.BODY:
            exchange.move_to(Phase.AFTER)
        await watched.forward_eof(chunk)

    def release(self) -> None:
        self.task.remove_done_callback(self._clean_up)

    def _re_enter(self) -> None:
        """Make the unit of work the current one of the running task, if another task has left it to aiohttp.

        A middleware outside of this application may have called it in a task of its own.
        """
        if not is_inside(self.exchange.unit):
            self.exchange.unit.enter()

    def _clean_up(self, task: asyncio.Task[Any]) -> None:
        """End the unit of work of a response that did not come to its end."""
        exchange = self.exchange
        if exchange.unit.closed:
            return
        exchange.leave()
        if not exchange.unit.finish_idle():
            error = None if task.cancelled() else task.exception()
            cleaning_up = asyncio.create_task(finalize(exchange.unit, commit=False, error=error))
            _cleaning_up.add(cleaning_up)
            cleaning_up.add_done_callback(_cleaning_up.discard)
