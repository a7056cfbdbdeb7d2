"""What is imported when it is first used: the sidecar, which uses neither SQLAlchemy nor httpx, starts without them.

SQLAlchemy takes a second of CPU and 30 MiB. The errors of this package derive from those of ctxdb-core, which imports
it. So the modules that the sidecar consists of name errors by `errors`, as in ``raise errors.OptionError(...)``, and
import them when they raise or catch one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["errors"]

if TYPE_CHECKING:
    from ctxdb_pgstatus import errors
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._name), name)

    errors = _LazyModule("ctxdb_pgstatus.errors")
