"""What was asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from ctxdb_demo.frameworks import Framework

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    framework: Framework
    database_url: str | None = None
    port: int | None = None
    serve: bool = False
    cluster: bool = False
    watch: bool = False
