"""The formatters of the sidecar's log."""

from __future__ import annotations

import json
import logging

import pytest

from ctxdb_pgstatus.sidecar.logs import JSONFormatter, TextFormatter


def record(message: str, *args: object, name: str = "ctxdb_pgstatus", **extra: object) -> logging.LogRecord:
    made = logging.getLogger(name).makeRecord(name, logging.WARNING, __file__, 1, message, args, None, extra=extra)
    made.created = 1_771_763_701.245
    return made


def test_a_line_of_text_has_the_time_the_component_and_the_fields() -> None:
    assert TextFormatter().format(record("the host is %s", "dead", host="n2", error="no answer", lag=None)) == (
        '2026-02-22T12:35:01.245Z WARNING monitor: the host is dead host=n2 error="no answer" lag=None'
    )


def test_a_json_line_has_the_names_of_pg_status_and_a_member_for_each_field() -> None:
    assert json.loads(JSONFormatter().format(record("the host is %s", "dead", host="n2", lag=5))) == {
        "@timestamp": "2026-02-22T12:35:01.245Z",
        "levelStr": "WARNING",
        "component": "monitor",
        "message": "the host is dead",
        "host": "n2",
        "lag": 5,
    }


@pytest.mark.parametrize(
    ("name", "component"),
    [("ctxdb_pgstatus.sidecar", "sidecar"), ("ctxdb_pgstatus.http", "http"), ("asyncpg", "asyncpg")],
)
def test_the_component_of_a_record_is_the_module_that_logs(name: str, component: str) -> None:
    assert json.loads(JSONFormatter().format(record("x", name=name)))["component"] == component


@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter()])
def test_a_record_is_one_line_with_its_exception(formatter: logging.Formatter) -> None:
    made = record("two\nlines", host="a\nb")
    try:
        raise ValueError("what happened")
    except ValueError as exc:
        made.exc_info = (ValueError, exc, exc.__traceback__)
    line = formatter.format(made)
    assert "\n" not in line
    assert "what happened" in line


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        ("\x1b[2Kall is well", r"\x1b[2Kall is well"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
        ("a\u2028b\u202ec", r"a\u2028b\u202ec"),
        ("größe", "größe"),
    ],
    ids=["an escape sequence", "a C1 control", "C0 controls", "other lines and directions", "other letters"],
)
def test_a_line_of_text_shows_control_characters_instead_of_sending_them(sent: str, logged: str) -> None:
    message = record("Host n2 does not answer: %s", sent, host=f"n2{sent}")
    line = TextFormatter().format(message)
    assert f"answer: {logged} host=" in line
    assert line.isprintable()
    assert json.dumps(sent)[1:-1] in JSONFormatter().format(message) or "\x7f" in sent
    assert JSONFormatter().format(message).isprintable()
