"""The tokens in which clients keep the positions of what they have written."""

from __future__ import annotations

import hmac
from typing import Any

import pytest

from ctxdb_pgstatus._token import TokenSigner, WalPosition

SIGNER = TokenSigner(b"s" * 32, "ctxdb_position", 300)


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every signature that is computed."""
    computed: list[Any] = []
    digest = hmac.digest

    def counted(*args: Any) -> bytes:
        computed.append(args)
        return digest(*args)

    monkeypatch.setattr(hmac, "digest", counted)
    return computed


def test_the_highest_of_several_positions_is_read() -> None:
    assert SIGNER.read([SIGNER.sign(position) for position in (7, 4711, 12)]) == WalPosition(0, 4711)


def test_a_position_on_a_later_timeline_is_the_higher_one() -> None:
    assert SIGNER.read([SIGNER.sign(4711, 9), SIGNER.sign(12, 10), SIGNER.sign(5000)]) == WalPosition(10, 12)


def test_a_forged_token_does_not_hide_a_true_one() -> None:
    payload, _, signature = SIGNER.sign(4711).rpartition(".")
    assert SIGNER.read([f"f{payload}.{signature}", SIGNER.sign(4711)]) == WalPosition(0, 4711)


def test_a_position_that_is_not_above_the_limit_is_not_read() -> None:
    assert SIGNER.read([SIGNER.sign(4711)], above=WalPosition(0, 4711)) is None
    assert SIGNER.read([SIGNER.sign(4711)], above=WalPosition(0, 4710)) == WalPosition(0, 4711)


def test_a_token_is_valid_for_a_time() -> None:
    assert TokenSigner(b"s" * 32, "ctxdb_position", -1).read([SIGNER.sign(1)]) == WalPosition(0, 1)
    assert SIGNER.read([TokenSigner(b"s" * 32, "ctxdb_position", -5).sign(1)]) is None


def test_the_highest_position_that_there_is_can_be_signed() -> None:
    highest = WalPosition(2**32 - 1, 2**64 - 1)
    assert SIGNER.read([SIGNER.sign(highest.position, highest.timeline)]) == highest


def test_a_flood_of_tokens_costs_four_signatures(signatures: list[Any]) -> None:
    expires = SIGNER.sign(1).split(".")[1]
    signatures.clear()
    forged = [f"{position:x}.{expires}.{'A' * 24}" for position in range(1, 2000)]
    assert SIGNER.read(forged) is None
    assert len(signatures) == 4


def test_malformed_token_is_rejected_without_a_signature(signatures: list[Any]) -> None:
    signatures.clear()
    assert SIGNER.read(["", "..", "x" * 100_000, f"1.{'f' * 13}.{'A' * 24}", f"-1.f.{'A' * 24}"]) is None
    assert signatures == []


def test_a_repeated_token_costs_one_signature(signatures: list[Any]) -> None:
    token = SIGNER.sign(4711)
    signatures.clear()
    assert SIGNER.read([token] * 1000) == WalPosition(0, 4711)
    assert len(signatures) == 1
