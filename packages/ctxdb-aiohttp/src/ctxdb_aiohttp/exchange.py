"""`Exchange`: a request and its response as one unit of work, ended by what the request's writer is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from aiohttp import WSCloseCode, web

from ctxdb_aiohttp.response import is_complete, start_over, status_of, take_back, write_server_error
from ctxdb_core import CommitPolicy, UnitOfWork, finalize

__all__ = ["Exchange", "current_exchange", "note_response"]

logger = logging.getLogger("ctxdb")

current_exchange: ContextVar[Exchange] = ContextVar("ctxdb_aiohttp_exchange")
"""The exchange of the running code. Tasks and servers inherit it: compare its writer with the one of the request."""

_SWITCHING_PROTOCOLS = 101

# WebSocket close codes that say that all went well (RFC 6455, section 7.4.1).
_NORMAL_CLOSES = (WSCloseCode.OK, WSCloseCode.GOING_AWAY)


# Units of responses that were cut off, each with the task that ends it.
_cleaning_up: set[asyncio.Task[None]] = set()


class Exchange:
    """The unit of work of one request, from the first middleware to the last byte of the response.

    Whatever is sent for a request goes through its writer, whoever prepares it and with whichever copy of the request.
    So that is where transactions end: before the head of a response is written, and before the end of its body is.

    Args:
        unit: what `ctxdb_core.begin` returned.
        commit_policy: given the status of the response: whether to commit.
        request: the request.
    """

    # Defaults are the class's: a request that uses no database pays for what it sets.
    attempted = False
    """Whether a handler has come to its end."""
    response: web.StreamResponse | None = None
    """The response that is being prepared, or was."""
    started = False
    """Whether the head of a response has been written."""
    handed_over = False
    """Whether the middlewares have returned, and what is sent from now on is sent by aiohttp."""
    task: asyncio.Task[None] | None = None
    """The one after which nothing will be sent, once that is aiohttp's to do."""
    refused: web.StreamResponse | None = None
    """A response that was not let through."""
    failure: BaseException
    """Why it was not."""
    replaced: Mapping[str, Any] | None = None
    """What the writer's methods were replaced by before, if they are replaced now."""

    def __init__(self, unit: UnitOfWork, commit_policy: CommitPolicy, request: web.Request) -> None:
        self.unit = unit
        self.commit_policy = commit_policy
        self.request = request
        # Of any type, as methods are replaced: on this one object, which serves this one request.
        self.writer: Any = request.writer
        self.token = current_exchange.set(self)

    @property
    def is_over(self) -> bool:
        """Whether the middlewares have nothing more to do with it."""
        return self.handed_over or self.unit.closed

    @property
    def has_work(self) -> bool:
        """Whether there may be something to commit or to roll back, or a response that was refused for it."""
        return bool(self.unit.sessions or self.unit.callbacks or self.refused)

    # --- what handlers and middlewares do -----------------------------------------------------------------------------

    async def begin_attempt(self) -> None:
        """Roll back what an earlier call of the handler has left: a middleware tries again."""
        self.attempted = False
        await self._end_transactions(commit=False)

    async def commit_success(self, request: web.Request, response: object) -> None:
        """Commit if the handler's response calls for it; one that does not may still become another one.

        Raises:
            BaseException: the error of the commit, or the one that kept this very response from being prepared.
        """
        if not self.started and await self._calls_for_commit(request, response):
            await finalize(self.unit, commit=True, last=False)

    def end_idle(self, response: object) -> bool:
        """End the unit without waiting for anything, if nothing was done in it and nobody can use it any more.

        Returns:
            Whether it was ended so.
        """
        if self.started or self.has_work or not is_complete(response) or self._has_signal_handlers():
            return False
        self._leave()
        self.unit.finish_idle()
        self.unit.leave()
        return True

    async def respond(self, request: web.Request, response: object) -> None:
        """End the transactions as the response demands that the middlewares have made of it all.

        Raises:
            BaseException: as `commit_success`.
        """
        if self.started:
            await self._end_started()
            return
        commit = self.has_work and await self._calls_for_commit(request, response)
        if is_complete(response) and not self._has_signal_handlers():
            await self.end(commit=commit)
        else:
            await self._hand_over(commit=commit)

    async def fail(self, error: BaseException) -> None:
        """Roll back for an error that no middleware has answered."""
        if not self.started:
            # It may have been raised while a response was being prepared.
            start_over(self.writer)
            if isinstance(error, Exception) and self._has_signal_handlers():
                # aiohttp will answer it.
                await self._hand_over(commit=False, error=error)
                return
        await self.end(commit=False, error=error)

    async def end(self, *, commit: bool, error: BaseException | None = None) -> None:
        """End the unit of work.

        Args:
            commit: whether to commit what is open.
            error: what made the end necessary.
        """
        self._leave()
        await finalize(self.unit, commit=commit, error=error)

    async def _calls_for_commit(self, request: web.Request, response: object) -> bool:
        if self.refused is not None and response is self.refused:
            raise self.failure
        # Anything else than a response ends in a 500, or becomes one in a middleware.
        return isinstance(response, (web.StreamResponse, web.HTTPException)) and self.commit_policy(
            await status_of(response, request)
        )

    async def _end_started(self) -> None:
        try:
            await self.end(commit=True)
        except Exception:
            if isinstance(self.response, web.WebSocketResponse):
                await self.response.close(code=WSCloseCode.INTERNAL_ERROR)
            raise

    async def _hand_over(self, *, commit: bool, error: BaseException | None = None) -> None:
        """End the transactions, and let the unit live until aiohttp has sent the response: its body may use it."""
        await self._end_transactions(commit=commit, error=error)
        self.handed_over = True
        self._watch_writer()
        self.writer.write_eof = self.write_eof
        # Of the connection: the running one may be a middleware's, and end before anything is sent.
        self.task = self.request.task
        self.task.add_done_callback(self._clean_up)

    def re_enter(self) -> None:
        """Make the unit of work the current one of the task that sends the response, if it was handed over by another.

        A middleware outside of this application may have called it in a task of its own.
        """
        if current_exchange.get(None) is not self:
            self.token = current_exchange.set(self)
            self.unit.enter()

    async def _end_transactions(self, *, commit: bool, error: BaseException | None = None) -> None:
        if self.has_work:
            await finalize(self.unit, commit=commit, last=False, error=error)

    def _has_signal_handlers(self) -> bool:
        for app in self.request.match_info.apps:
            for handler in app.on_response_prepare:
                if handler is not note_response:
                    return True
        return False

    # --- what the writer is told --------------------------------------------------------------------------------------

    def watch(self, response: web.StreamResponse) -> None:
        """Wait for the start of `response`, which is being prepared."""
        self.response = response
        self._watch_writer()

    def _watch_writer(self) -> None:
        if self.replaced is None:
            # Middlewares further out may watch it, too.
            methods = vars(self.writer)
            self.replaced = {name: methods[name] for name in ("write_headers", "write_eof") if name in methods}
            self.forward_head, self.forward_eof = self.writer.write_headers, self.writer.write_eof
            self.writer.write_headers, self.writer.write_eof = self.write_headers, self.end_body

    async def write_headers(self, status_line: str, headers: Any) -> None:
        """Stand in for ``AbstractStreamWriter.write_headers``: end the transactions before a response starts.

        Raises:
            BaseException: why they could not be ended; the response is not sent.
        """
        response = self.response
        if self.unit.calls is not None:
            self.unit.calls.note_running_response()
        if self.handed_over:
            self.re_enter()
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(self._clean_up)
        try:
            await self._begin_response(response, status_line)
        except BaseException as exc:
            await self._refuse(exc)
            raise
        await self.forward_head(status_line, headers)
        self.started = True
        if isinstance(response, web.WebSocketResponse):
            self._end_before_close(response)

    async def end_body(self, chunk: bytes = b"") -> None:
        """Stand in for ``AbstractStreamWriter.write_eof`` where a handler sends the response: commit before it ends.

        Raises:
            BaseException: the error of a commit; the body breaks off, which says that it is not complete.
        """
        if self.started:
            await self._end_transactions(commit=True)
        await self.forward_eof(chunk)

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Stand in for ``AbstractStreamWriter.write_eof`` once aiohttp sends the response: end the unit before it ends.

        Raises:
            BaseException: the error of a commit; the body breaks off, which says that it is not complete.
        """
        await self.end(commit=True)
        await self.forward_eof(chunk)

    async def _begin_response(self, response: web.StreamResponse | None, status_line: str) -> None:
        if self.refused is not None and response is self.refused:
            raise self.failure
        if self.has_work:
            status = int(status_line.split(" ", 2)[1])
            # A policy is about what requests ask for: the switch to a websocket is none of its business.
            commit = status == _SWITCHING_PROTOCOLS or self.commit_policy(status)
            await finalize(self.unit, commit=commit, last=False)

    async def _refuse(self, error: BaseException) -> None:
        """Make it as if the response had never been prepared: the error's own comes instead."""
        await self._end_transactions(commit=False, error=error)
        start_over(self.writer)
        if self.response is not None:
            self.refused, self.failure = self.response, error
            take_back(self.response)
        if self.handed_over and isinstance(error, Exception):
            # No middleware is left to see it, and aiohttp would hang up: its own client would then ask again.
            logger.error("A response was replaced by a 500, as its transactions could not be ended", exc_info=error)
            if self.response is not None:
                self.response.set_status(500)  # for the access log
            await write_server_error(self.request, self.forward_head, self.forward_eof)
            raise ConnectionResetError("The response was replaced by a 500.") from error

    def _leave(self) -> None:
        replaced, self.replaced = self.replaced, None
        if replaced is not None:
            methods = vars(self.writer)
            methods.pop("write_headers", None)
            methods.pop("write_eof", None)
            methods.update(replaced)
        if self.task is not None:
            # It may serve many more requests.
            self.task.remove_done_callback(self._clean_up)
            self.task = None
        # Left in it, the exchange would be in a reference cycle, as its unit knows the context.
        try:  # noqa: SIM105 - `suppress` costs an idle request too much
            current_exchange.reset(self.token)
        except ValueError:
            # The request was passed on in a task of its own, which went with its context.
            pass

    def _clean_up(self, task: asyncio.Task[Any]) -> None:
        """End the unit of a response that did not come to its end."""
        if self.unit.closed:
            return
        self._leave()
        if not self.unit.finish_idle():
            error = None if task.cancelled() else task.exception()
            cleaning_up = asyncio.create_task(finalize(self.unit, commit=False, error=error))
            _cleaning_up.add(cleaning_up)
            cleaning_up.add_done_callback(_cleaning_up.discard)

    def _end_before_close(self, socket: web.WebSocketResponse) -> None:
        """End the transactions before the close frame, where the handler closes the connection."""
        close = socket.close

        async def end_and_close(**options: Any) -> bool:
            # Not where the client closes, as the handler has not been told yet; nor where others do, as the shutdown.
            if socket.close_code is None and not socket.closed and current_exchange.get(None) is self:
                try:
                    commit = options.get("code", WSCloseCode.OK) in _NORMAL_CLOSES
                    await finalize(self.unit, commit=commit, last=False)
                except Exception:
                    await close(code=WSCloseCode.INTERNAL_ERROR)
                    raise
            return await close(**options)

        socket.close = end_and_close  # type: ignore[method-assign]  # on this one object only


async def note_response(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Note which response is about to be sent, to be able to take it back: a handler for ``on_response_prepare``."""
    exchange = current_exchange.get(None)
    if exchange is None or exchange.writer is not request.writer:
        exchange = _handed_over_with(request.writer)
        if exchange is None:
            return
        exchange.re_enter()
    exchange.watch(response)


def _handed_over_with(writer: object) -> Exchange | None:
    write_eof = vars(writer).get("write_eof")
    exchange = getattr(write_eof, "__self__", None)
    return exchange if isinstance(exchange, Exchange) and exchange.handed_over else None
