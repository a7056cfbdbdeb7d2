"""WAL positions as PostgreSQL writes them."""

from __future__ import annotations

import pytest

from ctxdb_pgstatus.positions import format_position, parse_position


@pytest.mark.parametrize(
    ("text", "position"), [("0/0", 0), ("0/3000060", 0x3000060), ("1/0", 2**32), ("FFFFFFFF/FFFFFFFF", 2**64 - 1)]
)
def test_positions_are_read_and_written(text: str, position: int) -> None:
    assert parse_position(text) == position
    assert format_position(position) == text


def test_small_letters_are_read_too() -> None:
    assert parse_position("a/ff") == 0xA_0000_00FF


@pytest.mark.parametrize(
    "text", ["", "0", "/", "0/", "/0", "0/0/0", " 0/0", "0/0\n", "x/0", "-1/0", "0/123456789", "0/²"]
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no WAL position"):
        parse_position(text)
