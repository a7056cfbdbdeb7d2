"""The command: ``python -m benchmarks [--only NAME] [--rounds N] [--quick] [--json FILE] [--url URL]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.database import create_table, drop_table
from benchmarks.questions import QUESTIONS, Settings
from benchmarks.report import Table, environment
from ctxdb_pgstatus.testing import EmbeddedPostgres, EmbeddedPostgresError

# Every contender has a pool of its own.
_CONNECTIONS = "300"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what ctxdb costs.")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="ask only this; may be given several times")
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
            tables = asyncio.run(_ask(options.only or list(QUESTIONS), settings))
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


async def _ask(names: list[str], settings: Settings) -> list[Table]:
    await create_table(settings.url)
    tables = []
    try:
        for name, question in QUESTIONS.items():
            if name in names:
                for table in await question(settings).answer():
                    print(table, end="\n\n", flush=True)
                    tables.append(table)
    finally:
        await drop_table(settings.url)
    return tables


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
