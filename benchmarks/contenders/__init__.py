"""Everyone who is compared: ctxdb, hand-written code, and each published library, where it is installed."""

from benchmarks.contenders._contender import Contender, Lookup, Route
from benchmarks.contenders._registry import BASELINE, NAMES, MissingContenderError, load

__all__ = ["BASELINE", "NAMES", "Contender", "Lookup", "MissingContenderError", "Route", "load"]
