"""The ids of units of work: each is told from all others, also from those of other processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

__all__ = ["give_unit_ids", "id_of_request", "new_unit_id", "process", "unit_id_givers", "unit_numbers"]


class _Process:
    """What the units of this process are called by: processes that are forked from one another have different names."""

    def __init__(self) -> None:
        self.rename()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.rename)

    def rename(self) -> None:
        self.name = os.urandom(4).hex()


process = _Process()
"""Its `name` begins the ids that are made here."""

unit_numbers = itertools.count(1)
"""What they go on with."""

unit_id_givers: list[Callable[[Any], str | None]] = []
"""What `give_unit_ids` was called with."""


def give_unit_ids(giver: Callable[[Any], str | None]) -> None:
    """Ask `giver` for the id of a request's unit of work, when that is first wanted; once for each function.

    Args:
        giver: given the ASGI scope, or the framework's request, returns an id that `new_unit_id` has made for it;
            ``None`` where there is none.
    """
    if giver not in unit_id_givers:
        unit_id_givers.append(giver)


def id_of_request(origin: Any) -> str | None:
    """Return the id that was given to the unit of work of a request; ``None`` if none was, and outside of requests."""
    if origin is not None:
        for giver in unit_id_givers:
            given = giver(origin)
            if given is not None:
                return given
    return None


def new_unit_id() -> str:
    """Return an id that no unit of work has, of this process or of any other one."""
    return f"{process.name}-{next(unit_numbers)}"
