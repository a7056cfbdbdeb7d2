"""What a statement does, as far as a shared transaction has to know: told from its first words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from ctxdb_core.testing._errors import SharedTransactionError


class Kind(Enum):
    """What a statement does to the transaction that it is in."""

    READ = auto()
    LOCK = auto()
    WRITE = auto()
    DDL = auto()
    SET = auto()
    SET_LOCAL = auto()
    ISOLATION_LEVEL = auto()
    SAVEPOINT = auto()
    BEGIN = auto()
    COMMIT = auto()
    ROLL_BACK = auto()


_COMMENTS = re.compile(r"(?:\s+|--[^\n]*\n|/\*.*?\*/|\()*", re.DOTALL)
_LOCK = r"FOR\s+(?:NO\s+KEY\s+)?UPDATE|FOR\s+(?:KEY\s+)?SHARE|pg_(?:try_)?advisory_xact_lock(?:_shared)?"
_LEVEL = r"SERIALIZABLE|REPEATABLE\s+READ|READ\s+(?:UN)?COMMITTED"
_PATTERNS = (
    (Kind.SAVEPOINT, r"SAVEPOINT\b|RELEASE\b|ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\b"),
    (Kind.BEGIN, r"BEGIN\b|START\s+TRANSACTION\b"),
    (Kind.COMMIT, r"(?:COMMIT|END)(?:\s+(?:WORK|TRANSACTION))?\s*;?\s*$"),
    (Kind.ROLL_BACK, r"(?:ROLLBACK|ABORT)(?:\s+(?:WORK|TRANSACTION))?\s*;?\s*$"),
    # A transaction must wait before such a statement is sent: on one connection, there is no lock to wait for.
    (Kind.LOCK, rf"SELECT\b(?!.*\bINTO\b)(?=.*\b(?:{_LOCK})\b)"),
    (Kind.READ, r"(?:SELECT|VALUES|TABLE)\b(?!.*\bINTO\b)|SHOW\b|EXPLAIN\b(?!.*\bANALY[SZ]E\b)|PRAGMA\b"),
    (Kind.READ, r"WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE|INTO)\b)"),
    (Kind.DDL, r"(?:CREATE|ALTER|DROP)\b"),
    (Kind.ISOLATION_LEVEL, rf"SET\s+TRANSACTION\s+ISOLATION\s+LEVEL\s+(?:{_LEVEL})\s*;?\s*$"),
    # A setting of the transaction itself, such as `transaction_read_only`, ends with its savepoint.
    (Kind.SET_LOCAL, r"SET\s+LOCAL\s+(?!\"?transaction_)"),
    (Kind.SET, r"SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b|SESSION\s+CHARACTERISTICS\b)|RESET\b"),
)
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for kind, pattern in _PATTERNS)
_SAVEPOINT = re.compile(
    r"(?P<verb>SAVEPOINT|RELEASE|ROLLBACK)\s+(?:(?:WORK|TRANSACTION)\s+)?(?:TO\s+)?(?:SAVEPOINT\s+)?"
    r"(?P<name>\"[^\"]+\"|[^\s;]+)",
    re.IGNORECASE,
)
_CONTROL = r"(?:COMMIT|ROLLBACK(?!\s+(?:WORK\s+|TRANSACTION\s+)?TO)|END|ABORT|PREPARE\s+TRANSACTION)\b"
_LEFT_CONTROL = re.compile(_CONTROL, re.IGNORECASE)
# In the body of a function, END and COMMIT mean something else.
_HIDDEN_CONTROL = re.compile(rf"^[^$']*;\s*{_CONTROL}", re.IGNORECASE)


def kind_of(sql: str) -> Kind:
    """Return what `sql` does.

    A function that is called by SELECT may write as well; that counts as reading, which makes no difference unless its
    transaction is rolled back after others have committed in the meantime.

    Raises:
        SharedTransactionError: `sql` would end the shared transaction itself, or prepare it for a two-phase commit.
    """
    start = start_of(sql)
    hides_control = ";" in sql and _HIDDEN_CONTROL.match(sql)
    if not hides_control:
        for kind, pattern in _KINDS:
            if pattern.match(sql, start):
                return kind
    if hides_control or _LEFT_CONTROL.match(sql, start):
        raise SharedTransactionError(
            f"{sql!r} would end the shared transaction for good. End transactions by the session, by `COMMIT` or "
            "`ROLLBACK` in a statement of its own; or test this with real commits (the fixture `ctxdb_clean_tables`)."
        )
    return Kind.WRITE


def open_savepoints(names: list[str], sql: str) -> list[str]:
    """Return the savepoints that are open after a statement of `Kind.SAVEPOINT`, where `names` were open before it."""
    match = _SAVEPOINT.match(sql, start_of(sql))
    if match is None:
        return names
    verb, name = match["verb"].upper(), match["name"]
    name = name if name.startswith('"') else name.lower()
    if verb == "SAVEPOINT":
        return [*names, name]
    if name not in names:
        return names
    # The last savepoint of the name ends, and all later ones. After ROLLBACK TO the savepoint itself stays open, but
    # SQLAlchemy never comes back to a savepoint that it has named itself.
    index = len(names) - 1 - names[::-1].index(name)
    stays = verb == "ROLLBACK" and not name.startswith("sa_savepoint_")
    return names[: index + stays]


def literal(text: str) -> str:
    """Return a text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def start_of(sql: str) -> int:
    """Return where the first word of a statement is."""
    comments = _COMMENTS.match(sql)
    return 0 if comments is None else comments.end()


@dataclass(slots=True)
class Result:
    """All that a cursor says after a statement."""

    description: Any
    rowcount: int
    lastrowid: Any
    rows: list[Any]


@dataclass(slots=True)
class Statement:
    """One call of a cursor, to be made on the shared connection."""

    kind: Kind
    method: str
    arguments: tuple[Any, ...]
    cursor_arguments: tuple[Any, ...] = ()
    cursor_options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the dialect has set on the cursor."""

    def run(self, dbapi_connection: Any) -> Result:
        """Run it, and fetch everything: the rows cross over to another thread."""
        cursor = dbapi_connection.cursor(*self.cursor_arguments, **self.cursor_options)
        try:
            for name, value in self.attributes.items():
                setattr(cursor, name, value)
            getattr(cursor, self.method)(*self.arguments)
            description = cursor.description
            rows = list(cursor.fetchall()) if description else []
            return Result(description, cursor.rowcount, getattr(cursor, "lastrowid", None), rows)
        finally:
            cursor.close()
