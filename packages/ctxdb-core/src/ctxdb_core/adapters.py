"""What authors of adapters and of extensions use: the lifecycle of a unit of work, and its handles.

Applications need none of this; theirs is `ctxdb_core` itself.
"""

from ctxdb_core._databases.connect import EngineListener, close_all, default_session_maker
from ctxdb_core._sqlalchemy.binds import is_autocommit, is_read_only
from ctxdb_core._units.lifecycle import before_gather, begin, finalize
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.phases import FINISHING, TRANSITIONS, IllegalTransitionError, Phase, check_transition

__all__ = [
    "FINISHING",
    "TRANSITIONS",
    "EngineListener",
    "IllegalTransitionError",
    "Phase",
    "UnitOfWork",
    "before_gather",
    "begin",
    "check_transition",
    "close_all",
    "default_session_maker",
    "finalize",
    "is_autocommit",
    "is_read_only",
]
