"""Two versions of ctxdb, measured side by side: each in a process of its own, in turns."""

from benchmarks.versions.comparison import compare, is_callgrind_there
from benchmarks.versions.process import ComparisonError

__all__ = ["ComparisonError", "compare", "is_callgrind_there"]
