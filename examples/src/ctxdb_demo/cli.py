"""The command ``ctxdb-demo``: its options, its exit statuses, and what a signal does to it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from ctxdb_demo.frameworks import DEFAULT, FRAMEWORKS
from ctxdb_demo.options import Options

BROKEN_PROMISE = 1
CANNOT_RUN = 2
SIGNALLED = 128

_DESCRIPTION = """\
Start a small bank, a web application that uses ctxdb, on a real server and a real database; drive it over HTTP; and
print what was asked of it, what it answered, what was in the database before and after, and how long it held a
connection. Nothing stays behind.
"""
_EPILOG = """\
Exit status: 0 if every promise was kept, 1 if one was not, 2 if the demo could not run, 130 after Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status.

    Args:
        arguments: those of the command line, without its name; by default, the ones of this process.
    """
    signals = _Signals()
    try:
        with signals:
            return _run(arguments, signals)
    except BrokenPipeError:
        # The reader of the output has closed the pipe; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PROMISE
    except (KeyboardInterrupt, asyncio.CancelledError):
        if signals.received is None:
            raise
        print("\nctxdb-demo: stopped; nothing is left behind.", file=sys.stderr)
        return SIGNALLED + signals.received


def _run(arguments: Sequence[str] | None, signals: _Signals) -> int:
    options = _parse(arguments)
    # Imported here, as this takes a moment: a Ctrl-C in it must already be no traceback, and `--help` does without it.
    from ctxdb_demo.errors import DemoError  # noqa: PLC0415

    if options.watch:
        from ctxdb_demo.watch import run_watch as run  # noqa: PLC0415
    elif options.cluster:
        from ctxdb_demo.cluster_demo import run_cluster as run  # noqa: PLC0415
    else:
        from ctxdb_demo.demo import run  # noqa: PLC0415

    async def run_until_signal() -> bool:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        assert task is not None

        def cancel() -> None:
            loop.call_soon_threadsafe(task.cancel)

        signals.react = cancel
        return await run(options)

    try:
        kept = asyncio.run(run_until_signal())
    except DemoError as exc:
        print(f"ctxdb-demo: {exc}", file=sys.stderr)
        return CANNOT_RUN
    return 0 if kept else BROKEN_PROMISE


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="ctxdb-demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--framework", choices=FRAMEWORKS, default=DEFAULT, help="what the application is written for (%(default)s)"
    )
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help="your own PostgreSQL or SQLite, in which the demo makes tables named ctxdb_demo_... and drops them again; "
        "sqlite:// for SQLite in a temporary file (by default, an embedded PostgreSQL)",
    )
    parser.add_argument("--port", type=_port, help="the application's port on 127.0.0.1 (by default, a free one)")
    parser.add_argument("--serve", action="store_true", help="leave the application running afterwards, until Ctrl-C")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="another show: a primary with two replicas, clients that write and read, a failover (on FastAPI, with "
        "its own servers)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="another show: the inspector's page over the application under load, with faults to be switched on, until "
        "Ctrl-C (on FastAPI; with --cluster, over a primary with two replicas)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.watch and (parsed.serve or parsed.framework != DEFAULT):
        parser.error(f"--watch runs on {DEFAULT} until Ctrl-C: give neither --framework nor --serve with it")
    if parsed.cluster and (parsed.database_url is not None or parsed.serve or parsed.framework != DEFAULT):
        parser.error(
            f"--cluster brings its own databases, runs on {DEFAULT}, and ends: give none of --framework, "
            "--database-url and --serve with it"
        )
    return Options(
        FRAMEWORKS[parsed.framework], parsed.database_url, parsed.port, parsed.serve, parsed.cluster, parsed.watch
    )


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return int(text)


class _Signals:
    """Turns the first signal that ends a process into an orderly end; the others are ignored, as that is under way."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.react: Callable[[], None] = _interrupt
        # Not all platforms have all of them; nohup and shells without job control have some ignored.
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]

    def __enter__(self) -> None:
        for number in self._numbers:
            signal.signal(number, self._receive)

    def __exit__(self, *exc_info: object) -> None:
        # Not the default, which would give an impatient second Ctrl-C the last word on the exit status.
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            self.react()


def _interrupt() -> None:
    raise KeyboardInterrupt
