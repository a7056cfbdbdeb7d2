"""The application of a scenario in bare ASGI."""

from __future__ import annotations

import asyncio

from tests.support.application import Application, Around, Handler, Refusal, Reply, Request, Stream, current_request

from ctxdb_core.asgi import (
    ASGIApp,
    ASGIHTTPDBSessionMiddleware,
    ASGIStreamBoundary,
    Message,
    Receive,
    Scope,
    Send,
)


def build_asgi(application: Application) -> ASGIApp:
    mounts = {prefix: build_asgi(mounted) for prefix, mounted in application.mounts.items()}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(application, receive, send)
            return
        for prefix, mounted in mounts.items():
            if scope["path"].startswith(f"{prefix}/"):
                await mounted({**scope, "path": scope["path"].removeprefix(prefix)}, receive, send)
                return
        if scope["type"] == "websocket":
            await _converse(application, scope, receive, send)
        else:
            await _respond(application.routes.get(scope["path"]), scope, receive, send)

    inner: ASGIApp = app
    if application.around is not None:
        inner = giving_up(ASGIStreamBoundary(app), application.around)
    middleware = ASGIHTTPDBSessionMiddleware(inner, application.before_commit, application.commit_policy)
    return recording(middleware, application)


def giving_up(app: ASGIApp, around: Around) -> ASGIApp:
    """Have `around` answer in the place of `app`, which goes on."""

    async def give_up(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        calls: list[asyncio.Future[None]] = []

        async def drop(message: Message) -> None:
            """Drop what the application sends, as `around` has answered in its place."""

        try:
            reply = await around(lambda: calls.append(asyncio.ensure_future(app(scope, receive, drop))))
            await send({"type": "http.response.start", "status": reply.status, "headers": []})
            await send({"type": "http.response.body", "body": reply.body.encode()})
        except Exception:
            for call in calls:
                call.cancel()
            raise
        finally:
            await asyncio.gather(*calls, return_exceptions=True)

    return give_up


async def _respond(handler: Handler | None, scope: Scope, receive: Receive, send: Send) -> None:
    async def read() -> bytes:
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(chunks)

    current_request.set(Request(scope["query_string"].decode(), read))
    try:
        reply = Reply(status=404) if handler is None else await handler()
    except Refusal as refusal:
        reply = Reply(status=refusal.status)
    headers = getattr(reply, "headers", {})
    start: Message = {
        "type": "http.response.start",
        "status": reply.status,
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }
    await send(start)
    if isinstance(reply, Stream):
        await _send_until_disconnect(reply, receive, send)
    else:
        await send({"type": "http.response.body", "body": reply.body.encode()})
    if reply.background is not None:
        await reply.background()


class _Socket:
    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.open = True

    async def receive(self) -> str | None:
        message = await self._receive()
        if message["type"] == "websocket.receive":
            text: str = message["text"]
            return text
        self.open = False
        return None

    async def send(self, text: str) -> None:
        await self._send({"type": "websocket.send", "text": text})

    async def close(self, code: int) -> None:
        self.open = False
        await self._send({"type": "websocket.close", "code": code})


async def _converse(application: Application, scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    handler = application.sockets.get(scope["path"])
    if handler is None:
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    socket = _Socket(receive, send)
    await handler(socket)
    if socket.open:
        await socket.close(1000)


async def _send_until_disconnect(reply: Stream, receive: Receive, send: Send) -> None:
    async def send_all() -> None:
        async for chunk in reply.chunks:
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(send_all()), asyncio.create_task(wait_for_disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await reply.chunks.aclose()
    if not tasks[0].cancelled():
        tasks[0].result()


async def _lifespan(application: Application, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    for db in application.dbs:
        await db.close()
    await send({"type": "lifespan.shutdown.complete"})


def recording(app: ASGIApp, application: Application) -> ASGIApp:
    """Wrap `app` so that what it raises is noted."""

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as exc:
            application.errors.append(exc)
            raise

    return record
