"""The log of the sidecar: a line on standard error for each record, as text or as JSON, with the record's fields."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from ctxdb_pgstatus.sidecar.settings import LogFormat

__all__ = ["JSONFormatter", "TextFormatter", "set_up"]

# The attributes that every record has; further ones were given as `extra`. Formatters set the last two.
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def set_up(level: int, log_format: LogFormat) -> None:
    """Have all loggers write to standard error.

    Args:
        level: the least severe level that is logged. asyncio's own records are logged from warnings on.
        log_format: how the lines are written.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(max(level, logging.WARNING))


class TextFormatter(logging.Formatter):
    """``2026-08-21T12:35:01.245Z WARNING monitor: host state changed host=n2``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        text = f"{_time(record)} {record.levelname} {_component(record)}: {record.getMessage()}{fields}"
        if record.exc_info:
            text += " " + self.formatException(record.exc_info)
        return _printable(text)


class JSONFormatter(logging.Formatter):
    """One JSON object a line, with the names of members that pg-status uses, and a member for each field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        content: dict[str, object] = {
            "@timestamp": _time(record),
            "levelStr": "ERROR" if record.levelno >= logging.ERROR else record.levelname,
            "component": _component(record),
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            content.setdefault(name, value)
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        # DEL is the only ASCII control character that `json.dumps` does not escape.
        return json.dumps(content, default=str).replace("\x7f", "\\u007f")


def _printable(text: str) -> str:
    """Return text as one line that moves no cursor and changes no colour.

    Names of hosts and messages of servers are not ours: by an escape sequence, one of them could change what other
    lines say on the reader's terminal.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}


def _component(record: logging.LogRecord) -> str:
    root, _, rest = record.name.partition(".")
    return (rest or "monitor") if root == "ctxdb_pgstatus" else record.name


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(sign in text for sign in ' "=\n') else text
