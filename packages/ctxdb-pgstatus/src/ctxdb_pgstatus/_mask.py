"""`mask_password`: keeps a password out of a message that a server or a driver has written, and the message short."""

from __future__ import annotations

import re
from collections.abc import Container

__all__ = ["mask_password"]

# No message of PostgreSQL comes near it.
_LONGEST = 2000
# A shorter password is part of ordinary words: masked within them, it could be read from what is missing.
_LONG_ENOUGH = 8


def mask_password(text: str, password: str | None, public: Container[str] = ()) -> str:
    """Return a message without the password of the account that it is about, and cut it if it is too long to be shown.

    No message of PostgreSQL or of a driver is known to hold the password; this is for those that are not known.

    Args:
        text: the message.
        password: the password; ``None`` if there is none.
        public: names that messages may show, of the user for instance. A password that equals one of them is not
            masked: it would hide the name from those who look for the fault, and the password from nobody.
    """
    if len(text) > _LONGEST:
        # A server may send a megabyte: it is kept, logged and shown at each poll. What is left of a password that this
        # has cut is cut off below.
        return mask_password(text[:_LONGEST], password, public)[: _LONGEST // 2] + "..."
    if not password or password in public:
        return text
    if len(password) >= _LONG_ENOUGH:
        return text.replace(password, "***")
    return re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", "***", text)
