"""The token in which a client keeps the position of what it has written: signed, and valid for a time."""

from __future__ import annotations

import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from hashlib import sha256

__all__ = ["TokenSigner"]

_TOKEN = re.compile(r"(?P<position>[0-9a-f]{1,16})\.(?P<expires>[0-9a-f]{1,12})\.[A-Za-z0-9_-]{24}", re.ASCII)
# A browser has one cookie of a name, or a few, which were set for several domains and paths.
_MOST_SIGNATURES = 4


class TokenSigner:
    """Signs positions and reads them again.

    Args:
        secret: what nobody else knows.
        purpose: what the tokens are for: those of another purpose are not accepted.
        max_age: for how many seconds a token is valid.
    """

    def __init__(self, secret: bytes, purpose: str, max_age: float) -> None:
        # A key of its own, as the application may use its secret for other things.
        self._key = hmac.digest(secret, f"ctxdb_pgstatus read your writes: {purpose}".encode(), sha256)
        self._max_age = max_age

    def sign(self, position: int) -> str:
        """Return a token for a position, of letters, digits, dots, dashes and underscores."""
        payload = f"{position:x}.{int(time.time() + self._max_age):x}"
        return f"{payload}.{self._signature(payload)}"

    def read(self, tokens: Iterable[str], *, above: int = 0) -> int | None:
        """Return the highest position of tokens that are ours and valid; ``None`` if none is, or none is above a limit.

        A request may carry as many tokens as its header fields have room for. What a token's own text rules out costs
        no signature: another form, a time that is over, a position that does not matter. Of the rest, the signatures of
        four are computed, the highest positions first.

        Args:
            tokens: what a client has sent.
            above: a position up to which nothing is to be known.
        """
        now = time.time()
        candidates: dict[str, int] = {}
        for token in tokens:
            match = _TOKEN.fullmatch(token)
            if match is not None and int(match["expires"], 16) >= now and int(match["position"], 16) > above:
                candidates[token] = int(match["position"], 16)
        for token in sorted(candidates, key=candidates.__getitem__, reverse=True)[:_MOST_SIGNATURES]:
            payload, _, signature = token.rpartition(".")
            if hmac.compare_digest(self._signature(payload), signature):
                return candidates[token]
        return None

    def _signature(self, payload: str) -> str:
        return urlsafe_b64encode(hmac.digest(self._key, payload.encode(), sha256)[:18]).decode()
