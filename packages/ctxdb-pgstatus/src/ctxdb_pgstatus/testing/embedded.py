"""The name under which `ctxdb_core.testing.EmbeddedPostgres` was first known."""

from __future__ import annotations

from ctxdb_core.testing.postgres import EmbeddedPostgres

__all__ = ["EmbeddedPostgres"]
