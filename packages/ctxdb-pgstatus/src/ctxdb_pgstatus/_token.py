"""`TokenSigner`: signs the tokens in which clients keep the WAL position of their last write, and reads them again."""

from __future__ import annotations

import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

__all__ = ["TokenSigner", "WalPosition"]

_TOKEN = re.compile(
    r"(?P<position>[0-9a-f]{1,16})\.(?P<expires>[0-9a-f]{1,12})(?:\.(?P<timeline>[0-9a-f]{1,8}))?\.[A-Za-z0-9_-]{24}",
    re.ASCII,
)
# How many signatures are computed for one request. A browser sends several cookies of one name only if they were set
# for several domains or paths.
_MOST_SIGNATURES = 4


class WalPosition(NamedTuple):
    """A position, and the timeline that it is on: one that is on a later timeline is the higher one.

    Attributes:
        timeline: the timeline; 0 if it is not known.
        position: the position in bytes.
    """

    timeline: int
    position: int


_NO_LIMIT = WalPosition(0, 0)


class TokenSigner:
    """Signs WAL positions and reads them again.

    Args:
        secret: bytes that only the processes of the application know.
        purpose: what the tokens are for. A token that was signed for another purpose is not accepted.
        max_age: for how many seconds a token is valid.
    """

    def __init__(self, secret: bytes, purpose: str, max_age: float) -> None:
        # The key is derived from the secret, as the application may sign other things with the secret itself.
        self._key = hmac.digest(secret, f"ctxdb_pgstatus read your writes: {purpose}".encode(), sha256)
        self._max_age = max_age

    def sign(self, position: int, timeline: int = 0) -> str:
        """Return a token for a position, of letters, digits, dots, dashes and underscores."""
        payload = f"{position:x}.{int(time.time() + self._max_age):x}"
        if timeline:
            payload = f"{payload}.{timeline:x}"
        return f"{payload}.{self._signature(payload)}"

    def read(self, tokens: Iterable[str], *, above: WalPosition = _NO_LIMIT) -> WalPosition | None:
        """Return the highest position above a limit of which a client has brought a valid token; ``None`` without one.

        A client may forge as many tokens as its header fields have room for. So no signature is computed for a token
        whose text rules it out: by its form, by a time that is over, or by a position that is not above the limit. Of
        the other tokens, the signatures of four are computed, those of the highest positions first.

        Args:
            tokens: the tokens that a client has sent.
            above: the limit.
        """
        now = time.time()
        candidates: dict[str, WalPosition] = {}
        for token in tokens:
            match = _TOKEN.fullmatch(token)
            if match is not None and int(match["expires"], 16) >= now:
                position = WalPosition(int(match["timeline"] or "0", 16), int(match["position"], 16))
                if position > above:
                    candidates[token] = position
        for token in sorted(candidates, key=candidates.__getitem__, reverse=True)[:_MOST_SIGNATURES]:
            payload, _, signature = token.rpartition(".")
            if hmac.compare_digest(self._signature(payload), signature):
                return candidates[token]
        return None

    def _signature(self, payload: str) -> str:
        return urlsafe_b64encode(hmac.digest(self._key, payload.encode(), sha256)[:18]).decode()
