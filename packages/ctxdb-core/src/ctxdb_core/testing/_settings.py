"""What a session sets on PostgreSQL for its transaction alone, told from the statement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctxdb_core.testing._statement import Kind, Statement, literal, start_of

_WORD = r'(?:"[^"]+"|[\w$]+)'
_SET = re.compile(
    rf"(?:SET\s+(?:LOCAL\s+|SESSION\s+(?!AUTHORIZATION))?|RESET\s+)"
    rf"(?:(?P<special>TIME\s+ZONE|SESSION\s+AUTHORIZATION|ROLE|SCHEMA|NAMES)\b|(?P<name>{_WORD}(?:\.{_WORD})*))",
    re.IGNORECASE,
)
_SPECIAL = {
    "TIME ZONE": "timezone",
    "SESSION AUTHORIZATION": "session_authorization",
    "ROLE": "role",
    "SCHEMA": "search_path",
    "NAMES": "client_encoding",
}
_SET_CONFIG = re.compile(
    r"\bset_config\s*\(\s*(?P<name>'[^']+'|\$\d+|%\(\w+\)s)[^,]*,"
    r"(?:[^(),']|'[^']*'|\([^()]*\))*,\s*(?P<local>'\w+'|\$\d+|%\(\w+\)s|\w+)",
    re.IGNORECASE,
)
# Roles decide what the session may do: they are given up first, and taken last.
_ROLES = ("session_authorization", "role")


@dataclass(slots=True, eq=False)
class Settings:
    """The values of what was set, by name."""

    values: dict[str, str] = field(default_factory=dict)


def names_set_by(statement: Statement, *, local: bool) -> set[str]:
    """Return what `statement` sets: until the end of the transaction if `local`, else for longer.

    What a function sets that is called by the statement is not seen, but for ``set_config()``.
    """
    sql = str(statement.arguments[0])
    if statement.kind is (Kind.SET_LOCAL if local else Kind.SET):
        match = _SET.match(sql, start_of(sql))
        if match is None:
            return set()
        if match["special"]:
            return {_SPECIAL[" ".join(match["special"].upper().split())]}
        return {match["name"].replace('"', "").lower()}
    return set(_set_by_function(sql, statement.arguments[1:], local=local))


def assignment(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    """Return the statement that puts the values `new` in the place of `old`; ``None`` if there is nothing to do."""
    order = [*sorted(old, key=lambda name: name not in _ROLES), *sorted(new, key=lambda name: name in _ROLES)]
    values = {**old, **new}
    calls = [f"set_config({literal(name)}, {literal(values[name])}, true)" for name in order]
    return f"SELECT {', '.join(calls)}" if calls else None


def query(names: Sequence[str]) -> str:
    """Return the query for the values of settings; the value of an unknown setting is empty."""
    values = [f"coalesce(current_setting({literal(name)}, true), '')" for name in names]
    return f"SELECT {', '.join(values)}"


def _set_by_function(sql: str, parameters: tuple[Any, ...], *, local: bool) -> Iterator[str]:
    for match in _SET_CONFIG.finditer(sql):
        name = _resolve(match["name"], parameters)
        is_local = str(_resolve(match["local"], parameters)).lower() in ("true", "t", "on", "yes", "1")
        if isinstance(name, str) and is_local is local:
            yield name.lower()


def _resolve(expression: str, parameters: tuple[Any, ...]) -> Any:
    """Return the value of a literal, or of a parameter."""
    given: Any = parameters[0] if parameters else ()
    try:
        if expression.startswith("$"):
            return given[int(expression[1:]) - 1]
        if expression.startswith("%"):
            return given[expression[2:-2]]
    except (LookupError, TypeError):
        # The statement is executed for several sets of parameters.
        return None
    return expression.strip("'")
