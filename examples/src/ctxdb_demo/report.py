"""The table that the demo prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ctxdb_demo.demo_database import AUDIT, TRANSFERS, Contents
from ctxdb_demo.probe import most_at_once
from ctxdb_demo.scenarios import Outcome, Scenario

WIDTH = 120

_LEGEND = (
    "database: balances and numbers of rows, as another connection sees them. connection held: how long the request "
    "had a connection of the pool, of how long it took until its last byte. kept: whether all of this is as promised."
)


def print_report(title: str, outcomes: Sequence[Outcome]) -> None:
    """Print the table of the outcomes and, below it, every promise that was not kept."""
    # In a file, the table has the width that it needs, unless the environment says otherwise.
    knows_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if knows_width else WIDTH, highlight=False)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=_LEGEND,
        caption_justify="left",
        box=box.ROUNDED,
        show_lines=True,
        width=min(console.width, WIDTH),
    )
    table.add_column("request", ratio=1, overflow="fold")
    table.add_column("status", justify="right")
    table.add_column("database before", width=16)
    table.add_column("database after", width=16)
    table.add_column("connection held", width=13)
    table.add_column("kept", width=4)
    for outcome in outcomes:
        table.add_row(
            _request(outcome.scenario),
            Text(str(outcome.status), style="green" if outcome.status < 400 else "yellow"),
            _contents(outcome.before),
            _contents(outcome.after, highlight_changes_from=outcome.before),
            _holds(outcome),
            Text("NO", style="bold red") if outcome.broken_promises() else Text("yes", style="green"),
        )
    console.print(table)
    kept = sum(not outcome.broken_promises() for outcome in outcomes)
    console.print(f"{kept} of {len(outcomes)} promises kept.", style="bold")
    for outcome in outcomes:
        for broken in outcome.broken_promises():
            console.print(f"{outcome.scenario.title}: {broken}", style="red", markup=False)


def _request(scenario: Scenario) -> Text:
    text = Text.assemble((scenario.title, "bold"), f"\n{scenario.promise}\n", (scenario.request, "cyan"))
    if scenario.json is not None:
        text.append("\n" + json.dumps(scenario.json, separators=(",", ":")), style="cyan")
    return text


def _contents(contents: Contents, highlight_changes_from: Contents | None = None) -> Text:
    owners = [name for name in contents if name not in (TRANSFERS, AUDIT)]
    # Two accounts a line.
    lines = [owners[start : start + 2] for start in range(0, len(owners), 2)] + [[TRANSFERS], [AUDIT]]
    text = Text()
    for line in lines:
        for name in line:
            changed = highlight_changes_from is not None and highlight_changes_from.get(name, 0) != contents[name]
            text.append(f"{name} {contents[name]}", style="bold magenta" if changed else "")
            text.append(", " if name != line[-1] else "\n")
    text.right_crop(1)
    return text


def _holds(outcome: Outcome) -> Group:
    lines = [Text.assemble((_milliseconds(outcome.held_seconds), "bold"), f" of {_milliseconds(outcome.seconds)} ms")]
    if len(outcome.holds) > 1:
        lines.append(Text(f"taken {len(outcome.holds)} times"))
    if (at_once := most_at_once(outcome.holds)) > 1:
        lines.append(Text(f"{at_once} at once"))
    return Group(*lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f}"
