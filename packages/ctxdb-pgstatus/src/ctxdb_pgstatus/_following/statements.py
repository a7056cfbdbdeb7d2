"""Whether a statement may write. A statement counts as reading only if it surely writes nothing."""

from __future__ import annotations

import re
from functools import lru_cache

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

__all__ = ["is_local_setting", "is_setting", "may_write"]

_SAVEPOINTS = (SavepointClause, ReleaseSavepointClause, RollbackToSavepointClause)

# A statement that sets a parameter, such as a statement timeout.
_SETTING = re.compile(r"(?:RE)?SET\s[^;]*", re.IGNORECASE)

_LOCAL_SETTING = re.compile(r"SET\s+LOCAL\s[^;]*", re.IGNORECASE)

_STRING = re.compile(r"'(?:[^']|'')*'")
_QUOTED_NAME = re.compile(r'"(?:[^"]|"")*"')
# Signs by which a string might end elsewhere than `_STRING` takes it to end: backslashes, comments, dollar quotes. And
# a semicolon, behind which another statement may follow.
_UNCERTAIN = re.compile(r"\\|--|/\*|\$\w*\$|;")
_WORD = re.compile(r'(\.\s*)?([A-Za-z_][\w$]*|")(\s*\()?')

# Words by which a query writes: a statement in its WITH clause, SELECT INTO, and FOR UPDATE, whose row locks write,
# too.
_WRITING = frozenset({"insert", "update", "delete", "merge", "into", "for"})

# Words that a parenthesis may follow: keywords, types with a length, and functions of PostgreSQL that only compute.
# Other functions may be the user's own, and write.
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

    A query that SQLAlchemy has compiled does not, as long as it calls no functions but well-known ones, locks nothing,
    and has no other statement inside. A statement that was given as text may write, unless it only changes a setting.

    Args:
        statement: the statement as it is sent.
        context: what SQLAlchemy knows of the statement.
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
    # The text that is sent is looked at, and not the construct that it was compiled from: mappings of the ORM add
    # columns and criteria of their own, and `text()` may stand anywhere in a construct.
    text = _QUOTED_NAME.sub('"', _STRING.sub("", query))
    if _UNCERTAIN.search(query) or "'" in text:
        return False
    for qualified, word, is_called in _WORD.findall(text):
        name = word.lower()
        if name in _WRITING or (is_called and (qualified or name not in _HARMLESS)):
            return False
    return True
