"""The command ``ctxdb-pgstatus``: reads the settings, runs the monitor and the server until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import version

import uvicorn

from ctxdb_pgstatus.errors import OptionError
from ctxdb_pgstatus.monitor import HostMonitor
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.logs import set_up
from ctxdb_pgstatus.sidecar.settings import VARIABLES, Settings

__all__ = ["main"]

_logger = logging.getLogger("ctxdb_pgstatus.sidecar")

# Clients that ask every few seconds keep their connection.
_KEEP_ALIVE_SECONDS = 75
# For requests that are under way when it is told to stop.
_GRACE_SECONDS = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 2 for wrong settings, 1 if it cannot listen."""
    _parse(arguments)
    try:
        settings = Settings.from_environment(os.environ)
    except OptionError as exc:
        print(f"ctxdb-pgstatus: {exc}", file=sys.stderr)  # noqa: T201 - a command speaks to its user
        return 2
    set_up(settings.log_level, settings.log_format)
    try:
        listener = _listen(settings.listen_address, settings.listen_port)
    except OSError as exc:
        print(  # noqa: T201 - a command speaks to its user
            f"ctxdb-pgstatus: it cannot listen on {settings.listen_address}, port {settings.listen_port} "
            f"({exc.strerror}): set pg_status__http_listen_address and pg_status__http_port.",
            file=sys.stderr,
        )
        return 1
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(settings, listener))
    return 0


def _parse(arguments: Sequence[str] | None) -> None:
    width = max(map(len, VARIABLES))
    parser = argparse.ArgumentParser(
        prog="ctxdb-pgstatus",
        description="Says over HTTP which PostgreSQL host is the master, and which replicas are in sync.",
        epilog="It is set up by environment variables, each with the prefix pg_status__:\n\n"
        + "\n".join(f"  {name.ljust(width)}  {text}" for name, text in VARIABLES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("ctxdb-pgstatus"))
    parser.parse_args(arguments)


def _listen(address: str, port: int) -> socket.socket:
    everywhere = address == "*"
    dual_stack = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack or ":" in address else socket.AF_INET
    # With the protocol's number asyncio turns Nagle's algorithm off, for which responses would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # Where else it means that others may take the port, too.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual_stack else 1)
        listener.bind(("" if everywhere else address, port))
        # Already here, so that a port in use is noticed here.
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _loop_factory() -> Callable[[], AbstractEventLoop] | None:
    """Return uvloop's if it is installed: it nearly doubles what the server can do."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    factory: Callable[[], AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to the command: it ends with 0 when it was told to stop."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]  # a plain context manager does
        return nullcontext()


async def _run(settings: Settings, listener: socket.socket) -> None:
    monitor = HostMonitor(
        settings.hosts,
        user=settings.user,
        password=settings.password,
        database=settings.database,
        poll_interval=settings.poll_interval,
        connect_timeout=settings.connect_timeout,
        max_fails=settings.max_fails,
        sync_max_lag_ms=settings.sync_max_lag_ms,
        sync_max_lag_bytes=settings.sync_max_lag_bytes,
    )
    history = History()
    app = SidecarApp(history, settings.locality, settings.sync_max_lag_ms, settings.poll_interval)
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )

    def stop() -> None:
        # Told twice, it does not wait for requests that are under way.
        server.force_exit = server.should_exit
        server.should_exit = True

    _on_signals(stop)
    for warning in settings.warnings:
        _logger.warning("%s", warning)
    address, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _logger.info("server started", extra={"address": address, "port": port})
    watching = asyncio.create_task(_watch(monitor, app, history, settings.poll_interval))
    try:
        # It answers that it is not ready yet until the monitor has asked each host once.
        await asyncio.wait([serving, watching], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            server.should_exit = True
        await serving
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    _logger.info("server stopped")


async def _watch(monitor: HostMonitor, app: SidecarApp, history: History, interval: float) -> None:
    async with monitor:
        forget = monitor.on_change(history.note)
        try:
            app.monitor = monitor
            while True:
                history.add(monitor.status)
                await asyncio.sleep(min(max(interval, 1.0), 5.0))
        finally:
            forget()


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:
            # On Windows.
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
