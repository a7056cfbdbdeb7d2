"""The token in which a client keeps the position of what it has written: signed, and valid for a time."""

from __future__ import annotations

import hmac
import time
from base64 import urlsafe_b64encode
from hashlib import sha256

__all__ = ["TokenSigner"]

_LONGEST = 100


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

    def read(self, token: str) -> int | None:
        """Return the position of a token; ``None`` if it is none of ours, or is not valid any more."""
        payload, _, signature = token.rpartition(".")
        if len(token) > _LONGEST or not hmac.compare_digest(self._signature(payload).encode(), _bytes(signature)):
            return None
        # Signed, so it is well-formed.
        position, _, expires = payload.partition(".")
        return int(position, 16) if int(expires, 16) >= time.time() else None

    def _signature(self, payload: str) -> str:
        return urlsafe_b64encode(hmac.digest(self._key, _bytes(payload), sha256)[:18]).decode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
