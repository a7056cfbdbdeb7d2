"""`mask_password`: takes the password out of a message that a server or a driver has written, and cuts the message."""

from __future__ import annotations

import re
from collections.abc import Container

__all__ = ["mask_password"]

# In characters. PostgreSQL refuses a connection in far fewer.
_LONGEST = 2000
# A password of fewer characters may be a part of ordinary words. If it were masked inside of them, a reader could tell
# it from the letters that are missing: "a***uthentication".
_LONG_ENOUGH = 8


def mask_password(text: str, password: str | None, public: Container[str] = ()) -> str:
    """Return the message `text` without `password`, and cut it if it is too long to be shown.

    No message of PostgreSQL or of a driver is known to hold the password. This is a precaution against a message that
    is not known yet.

    Args:
        text: the message.
        password: the password of the account that the message is about; ``None`` if there is none.
        public: names that messages may show, such as the user's. A password that equals such a name is not masked:
            that would hide the name from a reader who looks for the fault, and hide no secret.
    """
    if len(text) > _LONGEST:
        # A server may send a message of a megabyte, which would be kept, logged and shown at each poll. The password is
        # masked before the message is cut, as a part of a password would not be recognised.
        return _masked(text, password, public)[: _LONGEST // 2] + "..."
    return _masked(text, password, public)


def _masked(text: str, password: str | None, public: Container[str]) -> str:
    if not password or password in public:
        return text
    if len(password) >= _LONG_ENOUGH:
        return text.replace(password, "***")
    return re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", "***", text)
