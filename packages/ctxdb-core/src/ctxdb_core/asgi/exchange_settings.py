"""`ExchangeSettings`: what the exchanges of one middleware are told when they begin."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from ctxdb_core._units.settings import UnitSettings
from ctxdb_core.policy import RequestPolicy

__all__ = ["ExchangeSettings", "Options"]


class Options(Protocol):
    """What a middleware says of all its exchanges."""

    commits: RequestPolicy
    """Given the status of a response, and the ASGI scope of its request: whether to commit."""
    has_boundary: bool
    """Whether an `ASGIStreamBoundary` may be beneath, which tells of handlers that a middleware gives up on."""


@dataclass(frozen=True, slots=True)
class ExchangeSettings(UnitSettings):
    """The settings of the exchanges of one middleware."""

    _: KW_ONLY
    middleware: Options
