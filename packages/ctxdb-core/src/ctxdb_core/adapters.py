"""What authors of adapters and of extensions use: the lifecycle of a unit of work, its handles, and types of arguments.

Applications need none of this; theirs is `ctxdb_core` itself. What happens in sessions is told by `ctxdb_core.events`.
"""

from ctxdb_core._blocks.atomic import CurrentTransaction
from ctxdb_core._blocks.transactional import Propagation
from ctxdb_core._databases.acquiring_code import CodePlace, acquiring_code, acquiring_instruction, acquiring_place
from ctxdb_core._databases.arguments import check_function
from ctxdb_core._databases.connect import EngineListener, SessionT, SessionT_co, close_all, default_session_maker
from ctxdb_core._databases.url import without_secrets
from ctxdb_core._sqlalchemy.binds import is_autocommit, is_read_only
from ctxdb_core._sqlalchemy.connection_context import call_out_of_sight
from ctxdb_core._sqlalchemy.lost_commits import AskOutcome, LostCommit, ask_outcome_by
from ctxdb_core._sqlalchemy.private import (
    calls_on_return,
    connection_of_context,
    follow_dialect,
    follow_raw_connection,
    listeners_of,
    swap_connection,
    wrap_in_dialect,
)
from ctxdb_core._transactions.isolation import IsolationLevel
from ctxdb_core._transactions.statement_timeout import check_statement_timeout
from ctxdb_core._units.abandonment import Call, HandlerCalls
from ctxdb_core._units.callbacks import OnCommit
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.hook_functions import OnBegin
from ctxdb_core._units.ids import give_unit_ids, new_unit_id
from ctxdb_core._units.lifecycle import before_gather, begin, finalize, is_context_initiated, is_inside
from ctxdb_core._units.reading import SAFE_METHODS, ReadsFrom, check_reads_from
from ctxdb_core._units.request_unit import RequestUnit, follow_calls
from ctxdb_core._units.unit import UnitOfWork, running_unit
from ctxdb_core._units.watcher import Headers, UnitWatcher
from ctxdb_core._wording import type_of
from ctxdb_core.phases import FINISHING, TRANSITIONS, IllegalTransitionError, Phase, check_transition
from ctxdb_core.policy import CommitPolicy, RequestPolicy, with_request

__all__ = [
    "FINISHING",
    "SAFE_METHODS",
    "TRANSITIONS",
    "AskOutcome",
    "BeforeCommit",
    "Call",
    "CodePlace",
    "CommitPolicy",
    "CurrentTransaction",
    "EngineListener",
    "HandlerCalls",
    "Headers",
    "IllegalTransitionError",
    "IsolationLevel",
    "LostCommit",
    "OnBegin",
    "OnCommit",
    "Phase",
    "Propagation",
    "ReadsFrom",
    "RequestPolicy",
    "RequestUnit",
    "SessionT",
    "SessionT_co",
    "UnitOfWork",
    "UnitWatcher",
    "acquiring_code",
    "acquiring_instruction",
    "acquiring_place",
    "ask_outcome_by",
    "before_gather",
    "begin",
    "call_out_of_sight",
    "calls_on_return",
    "check_function",
    "check_reads_from",
    "check_statement_timeout",
    "check_transition",
    "close_all",
    "connection_of_context",
    "default_session_maker",
    "finalize",
    "follow_calls",
    "follow_dialect",
    "follow_raw_connection",
    "give_unit_ids",
    "is_autocommit",
    "is_context_initiated",
    "is_inside",
    "is_read_only",
    "listeners_of",
    "new_unit_id",
    "running_unit",
    "swap_connection",
    "type_of",
    "with_request",
    "without_secrets",
    "wrap_in_dialect",
]
