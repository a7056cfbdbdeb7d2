"""The command ``ctxdb-pgstatus``: reads the settings, and runs the monitor and the server until a signal stops it."""

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
from contextlib import suppress

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus.monitor import HostMonitor
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.logs import set_up
from ctxdb_pgstatus.sidecar.server import Server
from ctxdb_pgstatus.sidecar.settings import VARIABLES, Settings

__all__ = ["main"]

_logger = logging.getLogger("ctxdb_pgstatus.sidecar")

# After the first signal to stop, requests that are under way have so many seconds to be answered.
_GRACE_SECONDS = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for wrong settings, 1 if it cannot listen on its address."""
    _parse(arguments)
    try:
        settings = Settings.from_environment(os.environ)
    except errors.OptionError as exc:
        print(f"ctxdb-pgstatus: {exc}", file=sys.stderr)  # noqa: T201 - a command speaks to its user
        return 2
    set_up(settings.log_level, settings.log_format)
    try:
        listener = _listen(settings.listen_address, settings.listen_port)
    except OSError as exc:
        print(  # noqa: T201 - a command speaks to its user
            f"ctxdb-pgstatus: cannot listen on {settings.listen_address}, port {settings.listen_port} "
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
        + "\n".join(f"  {name.ljust(width)}  {text}" for name, text in VARIABLES.items())
        + "\n\nThe signal USR1 has the present state of the cluster accepted, though a higher timeline was seen: send "
        "it after you have undone a promotion.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    parser.parse_args(arguments)


class _Version(argparse.Action):
    """Shows the version. It is looked up only here, as a look-up takes as long as the start of the server."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.exit(message=importlib.import_module("importlib.metadata").version("ctxdb-pgstatus") + "\n")


def _listen(address: str, port: int) -> socket.socket:
    everywhere = address == "*"
    dual_stack = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack or ":" in address else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that were made with the protocol's number. Without that, Nagle's
    # algorithm and the delayed acknowledgements of a client would hold some responses back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # On Windows, the option would let another process listen on the same port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual_stack else 1)
        listener.bind(("" if everywhere else address, port))
        # A port that is in use shows at `listen` at the latest: so it is called here, where the error is caught.
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _loop_factory() -> Callable[[], AbstractEventLoop] | None:
    """Return the factory of uvloop if that is installed: with it, the server answers about a fifth more requests."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    factory: Callable[[], AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory


async def _run(settings: Settings, listener: socket.socket) -> None:
    monitor = HostMonitor(
        settings.discovery or settings.hosts,
        user=settings.user,
        password=settings.password,
        password_file=settings.password_file,
        database=settings.database,
        poll_interval=settings.poll_interval,
        connect_timeout=settings.connect_timeout,
        conn_max_age=settings.conn_max_age,
        nofailover=settings.nofailover,
        noloadbalance=settings.noloadbalance,
        subscribers=settings.subscribers,
        max_fails=settings.max_fails,
        sync_max_lag_ms=settings.sync_max_lag_ms,
        sync_max_lag_bytes=settings.sync_max_lag_bytes,
    )
    history = History()
    app = SidecarApp(history, settings.locality, settings.sync_max_lag_ms, settings.poll_interval)
    server = Server(app)
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            # At the second signal, the server does not wait for requests that are under way.
            server.abort()
        stopping.set()

    _on_signals(stop)
    accepting: set[asyncio.Task[object]] = set()

    def accept_lower_timeline() -> None:
        task = asyncio.create_task(monitor.accept_lower_timeline())
        accepting.add(task)
        task.add_done_callback(accepting.discard)

    if hasattr(signal, "SIGUSR1"):
        # Sent by an operator who has undone a promotion (see `HostMonitor.accept_lower_timeline`).
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, accept_lower_timeline)
    for warning in settings.warnings:
        _logger.warning("%s", warning)
    address, port = listener.getsockname()[:2]
    await server.start(listener)
    _logger.info("server started", extra={"address": address, "port": port})
    # The server answers from now on. Until the monitor has asked each host once, it answers that it is not ready.
    watching = asyncio.create_task(_watch(monitor, app, history, settings.poll_interval))
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([stopped, watching], return_when=asyncio.FIRST_COMPLETED)
        await server.stop(_GRACE_SECONDS)
    finally:
        stopped.cancel()
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
            # Event loops on Windows have no signal handlers.
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
