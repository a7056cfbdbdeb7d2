"""`HandlerResponse`: a response that the handler, or a middleware, prepares and sends by itself."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ctxdb_aiohttp.exchange import UNSTARTED, Exchange
from ctxdb_aiohttp.response import take_back
from ctxdb_aiohttp.writer import Delivery, WatchedWriter, start_over, status_in
from ctxdb_core.adapters import FINISHING, Phase, finalize

__all__ = ["HandlerResponse"]


class HandlerResponse(Delivery):
    """A response that is sent while its handler runs: committed in ``prepare()``, and again before its body ends.

    Args:
        exchange: that of the request.
        request: the request, or the copy of it that the response is prepared with.
        response: the response.
    """

    def __init__(self, exchange: Exchange, request: web.Request, response: web.StreamResponse) -> None:
        self.exchange = exchange
        self.request = request
        self.response = response

    async def start(self, watched: WatchedWriter, status_line: str, headers: Any) -> None:
        """Write the head, once the transactions are ended as its status demands.

        Raises:
            BaseException: why they could not be ended. ``prepare()`` raises it, and the response is as it was before.
        """
        exchange = self.exchange
        if exchange.unit.calls is not None:
            exchange.unit.calls.note_running_response()
        try:
            await exchange.settle_start(self.request, self.response, status_in(status_line))
        except BaseException as exc:
            await exchange.roll_back(exc)
            if exchange.phase in UNSTARTED:
                start_over(watched.writer)
            take_back(self.response)
            raise
        await watched.forward_head(status_line, headers)

    async def progress(self) -> None:
        """Give the connections back of transactions that have only read: a client may be slow to read."""
        await self.exchange.end_reading()

    async def end(self, watched: WatchedWriter, chunk: bytes) -> None:
        """Write the end of the body, once what it has done is committed.

        Raises:
            BaseException: the error of the commit. The body has no end then.
        """
        exchange = self.exchange
        if exchange.phase is Phase.BODY:
            try:
                await finalize(exchange.unit, commit=True, last=False, ends_body=True)
            except Exception as exc:
                await self.break_off(exc)
                raise
            exchange.move_to(Phase.AFTER)
        elif exchange.phase is Phase.BROKEN:
            assert exchange.refusal is not None
            raise exchange.refusal.error
        await watched.forward_eof(chunk)

    def release(self) -> None:
        """Do nothing: only the request's writer led here."""

    async def break_off(self, error: Exception) -> None:
        """Let the response break off, as what was done for it behind its head cannot be committed."""
        self.exchange.break_off(self.response, error)

    async def finish(self, returned: object) -> None:
        """End the unit of work when the middlewares have returned.

        Args:
            returned: what they have returned. If that is another response, the handler has failed in the middle of the
                body, and a middleware has answered its error: what the body has done is not whole.

        Raises:
            BaseException: the error of a commit, also of one that failed before: aiohttp would end the body else.
        """
        exchange = self.exchange
        before = exchange.phase
        try:
            await exchange.end(commit=before in FINISHING and (before is not Phase.BODY or returned is self.response))
        except Exception as exc:
            if before is not Phase.BROKEN:
                await self.break_off(exc)
            raise
        if before is Phase.BROKEN:
            assert exchange.refusal is not None
            raise exchange.refusal.error
