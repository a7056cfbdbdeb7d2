"""Whether a statement may write: only what surely does not is trusted not to."""

from __future__ import annotations

import re
from functools import lru_cache

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

__all__ = ["is_local_setting", "is_setting", "may_write"]

_SAVEPOINTS = (SavepointClause, ReleaseSavepointClause, RollbackToSavepointClause)

# What a transaction is told about itself, a statement timeout for instance.
_SETTING = re.compile(r"(?:RE)?SET\s[^;]*", re.IGNORECASE)

_LOCAL_SETTING = re.compile(r"SET\s+LOCAL\s[^;]*", re.IGNORECASE)

_STRING = re.compile(r"'(?:[^']|'')*'")
_QUOTED_NAME = re.compile(r'"(?:[^"]|"")*"')
# Where a string might end elsewhere than it seems to, and comments.
_UNCERTAIN = re.compile(r"\\|--|/\*|\$\w*\$|;")
_WORD = re.compile(r'(\.\s*)?([A-Za-z_][\w$]*|")(\s*\()?')

# In a query: an INSERT or another one in a WITH clause, SELECT INTO, and the locks of FOR UPDATE.
_WRITING = frozenset({"insert", "update", "delete", "merge", "into", "for"})

# What a parenthesis may follow: keywords, types with a length, and functions of PostgreSQL that only compute.
_NAMES = """
all and any array as between bit by case cast char character cube decimal distinct else end except exists filter
float from group having ilike in intersect interval is join lateral like limit materialized not null numeric offset
on only or order over partition precision recursive rollup row select sets some then time timestamp union using
values varchar varying when where with within

abs array_agg array_length avg bool_and bool_or cardinality ceil ceiling char_length coalesce concat concat_ws count
cume_dist current_date current_timestamp date_part date_trunc dense_rank every exp extract first_value floor
generate_series greatest grouping json_agg json_build_array json_build_object json_object_agg jsonb_agg
jsonb_build_array jsonb_build_object jsonb_object_agg lag last_value lead least left length ln localtimestamp log
lower lpad ltrim max md5 min mod mode now nth_value ntile nullif octet_length percent_rank percentile_cont
percentile_disc position power rank replace right round row_number row_to_json rpad rtrim sign split_part sqrt
stddev string_agg string_to_array strpos substr substring sum to_char to_date to_json to_jsonb to_number
to_timestamp to_tsquery to_tsvector plainto_tsquery ts_rank trim trunc unnest upper variance
"""
_HARMLESS = frozenset(_NAMES.split())


def may_write(statement: str, context: ExecutionContext | None) -> bool:
    """Return whether a statement that is about to be executed may write something.

    SQLAlchemy's own queries do not, as long as they call no functions but well-known ones, lock nothing, and have no
    other statement inside. What others have written may do anything.
    """
    compiled = None if context is None else context.compiled
    if compiled is None:
        return not is_setting(statement)
    construct = compiled.statement
    if isinstance(construct, (Select, CompoundSelect)):
        return not _only_reads(statement)
    return not isinstance(construct, _SAVEPOINTS)


def is_setting(statement: str) -> bool:
    """Return whether a statement changes a setting, and nothing else."""
    return _SETTING.fullmatch(statement) is not None


def is_local_setting(statement: str) -> bool:
    """Return whether a statement changes a setting until the end of its transaction."""
    return _LOCAL_SETTING.fullmatch(statement) is not None


@lru_cache(maxsize=4096)
def _only_reads(query: str) -> bool:
    # What is sent is looked at, not what it was compiled from: an ORM's mapping adds columns and criteria, and pieces
    # of text may be anywhere.
    text = _QUOTED_NAME.sub('"', _STRING.sub("", query))
    if _UNCERTAIN.search(query) or "'" in text:
        return False
    for qualified, word, is_called in _WORD.findall(text):
        name = word.lower()
        if name in _WRITING or (is_called and (qualified or name not in _HARMLESS)):
            return False
    return True
