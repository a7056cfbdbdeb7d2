"""Which statements that read may leave work in their transaction all the same: by a function, or by a lock of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnClause, Dialect, TextClause
from sqlalchemy.exc import CompileError
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

__all__ = ["may_leave_work"]


def may_leave_work(clause: Any, dialect: Dialect) -> bool:
    """Return whether `clause`, which reads, may leave anything in its transaction but what it has read.

    A function of the application's may write, and rows may be locked (``FOR UPDATE``). To tell that takes a walk
    through the whole clause.
    """
    elements = visitors.iterate(clause)
    return any(not _HARMLESS.fullmatch(name) for element in elements for name in _calls_in(element, dialect))


def _calls_in(element: Any, dialect: Dialect) -> Iterator[str]:
    """Yield the names of the functions that one element of a statement calls, and the words before parentheses.

    A function in a schema of the application's is named with its schema. Locks of rows count as calls of the name
    `_LOCK`.
    """
    if isinstance(element, ForUpdateArg):
        yield _LOCK
        return
    if isinstance(element, TextClause):
        text = element.text
    elif isinstance(element, ColumnClause) and element.is_literal:
        text = element.name
    elif not isinstance(element, FunctionElement):
        return
    elif isinstance(name := getattr(element, "name", None), str):
        yield _named(name, ".".join(getattr(element, "packagenames", ())))
        return
    else:
        # A construct of the application's (SQLAlchemy, "Custom SQL Constructs and Compilation Extension").
        try:
            text = str(element.compile(dialect=dialect))
        except CompileError:
            yield ""
            return
    for call in _CALL.finditer(text):
        if call["lock"] is not None:
            yield _LOCK
        elif (name := call["name"]) is not None:
            yield _named(name.strip('"'), (call["schema"] or "").strip('"'))


def _named(name: str, schema: str) -> str:
    return name if schema.lower() in _SHARED_SCHEMAS else f"{schema}.{name}"


# Where the functions of databases and of extensions are.
_SHARED_SCHEMAS = frozenset({"", "extensions", "pg_catalog", "public"})

_LOCK = "FOR UPDATE"

# What is no call is matched as well, so that each part of the text is looked at once.
_CALL = re.compile(
    r"""
    '[^']*' | --[^\n]* | /\*.*?\*/  # a literal, or a comment
    | (?: \b(?:AS|WITH(?:\s+RECURSIVE)?)\s+ | ::\s* ) (?: "[^"]*+" | [\w$]++ )  # a name with columns, or a type
    | \b (?P<lock> FOR\s+(?: UPDATE | NO\s+KEY | (?:KEY\s+)?SHARE ) | LOCK\s+IN\s+SHARE ) \b
    | (?: (?P<schema> "[^"]*+" | [\w$]++ ) \s*+ \. \s*+ )?+ (?P<name> "[^"]*+" | [\w$]++ ) \s*+ \(  # a call
    | "[^"]*+" | [\w$]++
    """,
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)

# Functions of databases and of usual extensions that write nothing, and words that a parenthesis may follow.
_HARMLESS = re.compile(
    r"""
    abs|age|aggregate_strings|all|and|any|as|ascii|avg|bernoulli|between|bit|bit_(?:and|count|length|or|xor)|
    array|array_(?:agg|append|cat|dims|length|lower|ndims|positions?|prepend|remove|replace|sort|to_json|to_string|upper)|
    bool_(?:and|or)|btrim|by|cardinality|case|cast|cbrt|ceil|ceiling|char|character|char_length|chr|clock_timestamp|
    coalesce|collate|concat|concat_ws|corr|cosine_distance|count|crypt|cube|cume_dist|curdate|curtime|
    current_(?:catalog|database|date|query|role|schemas?|setting|time|timestamp|user)|
    date|date_(?:add|bin|diff|format|part|sub|subtract|trunc)|daterange|datediff|datetime|day|decimal|decode|degrees|
    dense_rank|digest|distinct|div|else|encode|every|except|exists|exp|extract|filter|find_in_set|first|first_value|
    float|floor|for|format|from|gen_random_(?:bytes|uuid)|generate_series|generate_subscripts|glob|greatest|group_concat|
    grouping|having|hex|hmac|hour|if|ifnull|iif|ilike|in|initcap|inner_product|instr|int4range|int8range|intersect|
    interval|isempty|isfinite|join|julianday|justify_(?:days|hours|interval)|
    jsonb?_(?:agg|array|array_elements|array_elements_text|array_length|arrayagg|build_array|build_object|contains|each|
        each_text|exists|extract|extract_path|extract_path_text|group_array|group_object|insert|keys|length|object|
        object_agg|object_keys|objectagg|patch|path_exists|path_match|path_query|path_query_array|path_query_first|
        pretty|populate_record|populate_recordset|query|remove|replace|search|set|set_lax|strip_nulls|table|to_record|
        to_recordset|tree|type|typeof|unquote|valid|value)|
    l2_distance|lag|last_day|last_value|lateral|lcase|lead|least|left|length|levenshtein|like|limit|ln|localtime|
    localtimestamp|locate|log|log10|log2|lower|lower_inc|lpad|ltrim|
    make_(?:date|interval|time|timestamp|timestamptz)|materialized|max|md5|mid|min|minute|mod|mode|month|nchar|next|not|
    now|nth_value|ntile|nullif|numeric|numrange|nvarchar|octet_length|offset|on|only|or|ordinality|over|overlay|
    partition|percent_rank|percentile_(?:cont|disc)|phraseto_tsquery|pi|plainto_tsquery|position|pow|power|printf|
    pg_(?:backend_pid|blocking_pids|column_size|database_size|has_role|indexes_size|is_in_recovery|
        get_(?:constraintdef|expr|functiondef|indexdef|serial_sequence|triggerdef|userbyid|viewdef)|
        last_wal_(?:receive|replay)_lsn|last_xact_replay_timestamp|postmaster_start_time|relation_size|size_pretty|
        sleep|sleep_for|sleep_until|table_is_visible|table_size|total_relation_size|typeof|wal_lsn_diff)|
    quarter|quote|quote_(?:ident|literal|nullable)|radians|random|range_(?:agg|intersect_agg|merge)|rank|
    regexp_(?:count|instr|like|match|matches|replace|split_to_array|split_to_table|substr)|repeat|replace|returning|
    reverse|right|rollup|round|row|row_number|row_to_json|rpad|rtrim|second|select|session_user|sets|setweight|
    sha(?:1|2|224|256|384|512)|sign|similar|similarity|some|soundex|space|split_part|sqrt|st_\w+|starts_with|
    statement_timestamp|stddev|stddev_(?:pop|samp)|str_to_date|strftime|strict_word_similarity|string_agg|
    string_to_array|string_to_table|strpos|substr|substring|substring_index|sum|sysdate|system|
    then|time|timediff|timeofday|timestamp|timestampdiff|timestamptz|timetz|timezone|
    to_(?:char|date|hex|json|jsonb|number|regclass|regproc|regtype|timestamp|tsquery|tsvector)|total|
    transaction_timestamp|translate|trim|trunc|truncate|ts_(?:headline|rank|rank_cd|rewrite)|
    tsrange|tstzrange|typeof|ucase|unaccent|unicode|union|unix_timestamp|unixepoch|unnest|upper|upper_inc|user|
    using|utc_(?:date|time|timestamp)|uuid_generate_v[14]|uuidv[47]|values|var_(?:pop|samp)|varchar|variance|varying|
    version|websearch_to_tsquery|week|weekday|when|where|width_bucket|window|with|within|word_similarity|year
    """,
    re.IGNORECASE | re.VERBOSE,
)
