"""The command: ``python -m benchmarks``; ``--help`` tells its options."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.database import create_table, drop_table
from benchmarks.questions import QUESTIONS, Settings
from benchmarks.report import ComparisonTable, Table, environment
from benchmarks.versions import ComparisonError, compare, is_callgrind_there
from ctxdb_pgstatus.testing import EmbeddedPostgres, EmbeddedPostgresError

# Every contender has a pool of its own.
_CONNECTIONS = "300"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what ctxdb costs.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", choices=QUESTIONS, action="append", help="ask only this; may be given several times")
    what.add_argument(
        "--against", metavar="REV", help="measure the packages of the working tree beside those of a git revision"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="how often each contender has its turn")
    parser.add_argument("--quick", action="store_true", help="take less time, for less exact figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument(
        "--url", help=f"a PostgreSQL of your own that grants {_CONNECTIONS} connections: postgresql+asyncpg://..."
    )
    options = parser.parse_args()
    start = time.monotonic()
    with ExitStack() as stack:
        url = options.url
        if url is None:
            try:
                url = stack.enter_context(EmbeddedPostgres({"max_connections": _CONNECTIONS})).url()
            except EmbeddedPostgresError as exc:
                print(f"{exc}\nPass one: python -m benchmarks --url postgresql+asyncpg://...", file=sys.stderr)
                return 1
        settings = Settings(url, options.rounds, quick=options.quick)
        try:
            tables = _compare(options.against, settings) if options.against else _ask(options.only, settings)
        except ComparisonError as exc:
            print(exc, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return 130
    found = environment()
    print(", ".join(f"{name} {value}" for name, value in found.items() if value != "not installed"))
    if options.json is not None:
        data = {"environment": found, "tables": [table.as_json() for table in tables]}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _ask(only: list[str] | None, settings: Settings) -> list[Table | ComparisonTable]:
    async def ask() -> None:
        for name, question in QUESTIONS.items():
            if only is None or name in only:
                for table in await question(settings).answer():
                    print(table, end="\n\n", flush=True)
                    tables.append(table)

    tables: list[Table | ComparisonTable] = []
    with _table(settings.url):
        asyncio.run(ask())
    return tables


def _compare(revision: str, settings: Settings) -> list[Table | ComparisonTable]:
    tables: list[Table | ComparisonTable] = []
    with _table(settings.url):
        rounds, counted_rounds = settings.rounds_of(120, 20), settings.rounds_of(3, 1)
        for table in compare(revision, settings.url, rounds=rounds, counted_rounds=counted_rounds):
            print(table, end="\n\n", flush=True)
            tables.append(table)
    if not is_callgrind_there():
        print("Instructions were not counted: valgrind is not installed.\n")
    return tables


@contextmanager
def _table(url: str) -> Iterator[None]:
    """Have the table of the benchmarks in the database during the block."""
    asyncio.run(create_table(url))
    try:
        yield
    finally:
        asyncio.run(drop_table(url))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
