"""Whether a transaction holds work: what its statements tell before they are sent, and what the database answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import ColumnClause, Connection, Dialect, TextClause
from sqlalchemy.exc import CompileError, DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.greenlets import call_in_greenlet

__all__ = ["UNANSWERED", "holds_work", "may_leave_work", "only_reads", "only_sets"]

_READING = re.compile(r"\s*(?:SELECT|SHOW|VALUES|TABLE|PRAGMA\s+\w+\s*(?:;|\(|$)|EXPLAIN(?!\s+ANALY))\b", re.IGNORECASE)
_WITH = re.compile(r"\s*WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b)", re.IGNORECASE | re.DOTALL)
_SETTING = re.compile(r"\s*(?:SET|RESET)\b[^;]*;?\s*$", re.IGNORECASE)


def only_reads(clause: Any) -> bool:
    """Return whether `clause` writes nothing; ``None``, as in a flush, may write anything.

    A ``SELECT`` counts as reading, although it may call a function that writes.
    """
    if isinstance(clause, TextClause):
        return _READING.match(clause.text) is not None or _WITH.match(clause.text) is not None
    return getattr(clause, "is_select", False)


def only_sets(clause: Any) -> bool:
    """Return whether `clause` only sets something for its transaction or connection, such as a role."""
    return isinstance(clause, TextClause) and _SETTING.match(clause.text) is not None


def may_leave_work(clause: Any, dialect: Dialect) -> bool:
    """Return whether `clause`, which reads, may leave anything in its transaction but what it has read.

    A function of the application's may write, and rows may be locked (``FOR UPDATE``). To tell that takes a walk
    through the whole clause.
    """
    elements = visitors.iterate(clause)
    return any(not _HARMLESS.fullmatch(name) for element in elements for name in _calls_in(element, dialect))


def _calls_in(element: Any, dialect: Dialect) -> Iterator[str]:
    """Yield the names of the functions that one element of a statement calls, and the words before parentheses.

    Locks of rows count as calls of the name `_LOCK`.
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
        yield name
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
            yield name.strip('"')


_LOCK = "FOR UPDATE"

# What is no call is matched as well, so that each part of the text is looked at once.
_CALL = re.compile(
    r"""
    '[^']*' | --[^\n]* | /\*.*?\*/  # a literal, or a comment
    | (?: \b(?:AS|WITH(?:\s+RECURSIVE)?)\s+ | ::\s* ) (?: "[^"]*+" | [\w$]++ )  # a name with columns, or a type
    | \b (?P<lock> FOR\s+(?: UPDATE | NO\s+KEY | (?:KEY\s+)?SHARE ) | LOCK\s+IN\s+SHARE ) \b
    | (?P<name> "[^"]*+" | [\w$]++ ) \s* \(  # a call; its schema is not looked at
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


UNANSWERED = (DBAPIError, PendingRollbackError)
"""What `holds_work` raises where the database cannot tell: the transaction is aborted, or it was lost with its
connection, as when a time limit interrupts a statement.
"""


async def holds_work(session: AsyncSession, door: Door, by_statements: Callable[[], bool]) -> bool:
    """Ask the database whether the open transaction of `session` holds work, in a turn at its `door`.

    For a database that cannot be asked, the answer is that of `by_statements`.

    Raises:
        DBAPIError, PendingRollbackError: see `UNANSWERED`.
    """
    connections = {each for each in begun_connections(session) if not is_autocommit(each)}
    if not connections:
        return False
    drivers = {each: f"{each.dialect.name}+{each.dialect.driver}" for each in connections}
    if not _ANSWERS.keys() >= set(drivers.values()):
        return by_statements()
    async with door.turn():
        for each, driver in drivers.items():
            if await call_in_greenlet(_ANSWERS[driver], each):
                return True
    return False


def _has_written_postgresql(connection: Connection) -> bool:
    # A transaction has an id from its first write or row lock on (PostgreSQL, "Transactions and Identifiers"). The
    # statements alone do not tell: a function of a SELECT may write, and `SET LOCAL` is no write.
    return bool(connection.exec_driver_sql("SELECT txid_current_if_assigned() IS NOT NULL").scalar())


def _has_written_sqlite(connection: Connection) -> bool:
    # The driver begins a transaction before INSERT, UPDATE and DELETE alone (sqlite3, "Transaction control").
    driver_connection: Any = connection.connection.driver_connection
    return bool(driver_connection.in_transaction)


# A test's shared transaction, whose driver is "shared", has no entry: all work in it has one transaction id.
_ANSWERS: dict[str, Callable[[Connection], bool]] = {
    "postgresql+asyncpg": _has_written_postgresql,
    "postgresql+psycopg": _has_written_postgresql,
    "postgresql+psycopg_async": _has_written_postgresql,
    "sqlite+aiosqlite": _has_written_sqlite,
}
