"""The names of the contenders, and the module of each."""

from __future__ import annotations

import importlib
import warnings

from benchmarks.contenders._contender import Contender

BASELINE = "hand-written"

_MODULES = {
    BASELINE: ("hand_written", "HandWritten"),
    "floor": ("hand_written", "Floor"),
    "ctxdb": ("ctxdb", "CtxDB"),
    "ctxdb, observed": ("ctxdb", "CtxDBObserved"),
    "ctxdb, read_only": ("ctxdb", "CtxDBReadOnly"),
    "hand-written middleware": ("hand_written", "HandWrittenMiddleware"),
    "FastAPI yield dependency": ("hand_written", "YieldDependency"),
    "context-async-sqlalchemy": ("context_async", "ContextAsync"),
    "context-async-sqlalchemy (http)": ("context_async", "ContextAsyncHTTP"),
    "fastapi-async-sqlalchemy": ("fastapi_async", "FastAPIAsync"),
    "advanced-alchemy": ("alchemy", "AdvancedAlchemyStarlette"),
    "sqlalchemy-tx-context": ("tx_context", "TxContext"),
}

NAMES = tuple(_MODULES)


class MissingContenderError(Exception):
    """A published library cannot be imported here; the message says how to install it."""


def load(name: str) -> type[Contender]:
    """Return the contender called `name`.

    Raises:
        MissingContenderError: its library is not installed, or does not import with the versions at hand.
    """
    module_name, class_name = _MODULES[name]
    try:
        with warnings.catch_warnings():
            # Other libraries use names that SQLAlchemy deprecates: its warnings do not concern a reader of figures.
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"benchmarks.contenders.{module_name}")
    except ModuleNotFoundError as exc:
        raise MissingContenderError(f"{name}: not installed: uv run --group competitors python -m benchmarks") from exc
    except ImportError as exc:
        raise MissingContenderError(f"{name}: installed, but it does not import with these versions: {exc}") from exc
    contender: type[Contender] = getattr(module, class_name)
    return contender
