"""`errors`: the module of this package's errors, imported when one of them is first raised or caught.

The errors derive from those of ctxdb-core, which imports SQLAlchemy: about a second of CPU and 30 MiB. The sidecar uses
neither SQLAlchemy nor httpx, and starts without them. So each module that the sidecar imports names an error by way of
`errors`, as in ``raise errors.OptionError(...)``.
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
