"""Checks what applications pass: the error for a wrong option names the option, and says what to give."""

from __future__ import annotations

import math

from ctxdb_pgstatus._lazy import errors

__all__ = ["check_name", "check_number", "check_seconds", "check_source", "is_number"]


def is_number(value: object) -> bool:
    """Return whether `value` is a number; a ``bool`` is none here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(name: str, value: float, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    """Refuse what is no finite number from `least` to `most`.

    Raises:
        OptionError: always then.
    """
    is_fit = is_number(value) and least <= value <= most and value != math.inf
    if not is_fit or (whole and not isinstance(value, int)):
        kind = "a whole number" if whole else "a number"
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise errors.OptionError(f"`{name}` is {value!r}: give {kind} {bounds}.")


def check_seconds(name: str, value: float, *, or_zero: bool = False) -> None:
    """Refuse what is no finite number of seconds above 0, or of at least 0.

    Raises:
        OptionError: always then.
    """
    if not is_number(value) or not 0 <= value < math.inf or (value == 0 and not or_zero):
        raise errors.OptionError(f"`{name}` is {value!r}: give seconds, {'0 or more' if or_zero else 'more than 0'}.")


def check_name(name: str, value: object) -> None:
    """Refuse an option that is to be the name of a user or a database, and is none.

    Raises:
        OptionError: always then.
    """
    if not isinstance(value, str) or not value:
        raise errors.OptionError(f"`{name}` is {value!r}: give the name of a {name}.")


def check_source(source: object) -> None:
    """Refuse what does not know the hosts of a cluster.

    Raises:
        OptionError: always then.
    """
    # A source of the application's may have no more methods than are called: each source has this one.
    if isinstance(source, type) or not callable(getattr(source, "find_master", None)):
        shown = f"the class {source.__name__}" if isinstance(source, type) else f"of type {type(source).__name__}"
        raise errors.OptionError(
            f"`source` is {shown}, which does not know the hosts of a cluster: give a `HostMonitor`, a "
            "`PgStatusClient`, or an object with the methods of `HostSource`."
        )
