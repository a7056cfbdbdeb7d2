"""WAL positions as PostgreSQL writes them."""

from __future__ import annotations

import pytest

from ctxdb_pgstatus.lsn import format_lsn, parse_lsn


@pytest.mark.parametrize(
    ("text", "position"), [("0/0", 0), ("0/3000060", 0x3000060), ("1/0", 2**32), ("FFFFFFFF/FFFFFFFF", 2**64 - 1)]
)
def test_a_position_is_parsed_and_formatted(text: str, position: int) -> None:
    assert parse_lsn(text) == position
    assert format_lsn(position) == text


def test_a_position_in_lower_case_is_parsed() -> None:
    assert parse_lsn("a/ff") == 0xA_0000_00FF


@pytest.mark.parametrize(
    "text", ["", "0", "/", "0/", "/0", "0/0/0", " 0/0", "0/0\n", "x/0", "-1/0", "0/123456789", "0/²"]
)
def test_invalid_wal_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no WAL position"):
        parse_lsn(text)
