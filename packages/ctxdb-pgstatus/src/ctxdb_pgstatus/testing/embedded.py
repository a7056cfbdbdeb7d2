"""`EmbeddedPostgres`, which was first published here, and is `ctxdb_core.testing.EmbeddedPostgres` now."""

from __future__ import annotations

from ctxdb_core.testing.postgres import EmbeddedPostgres

__all__ = ["EmbeddedPostgres"]
