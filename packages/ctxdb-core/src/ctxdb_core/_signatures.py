"""The parameters of functions, whatever their annotations name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

if sys.version_info >= (3, 14):
    from annotationlib import Format

__all__ = ["signature_of"]


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return ``inspect.signature(function)``.

    From Python 3.14 on (PEP 649), that evaluates the annotations, which may name what only type checkers import.

    Raises:
        TypeError: `function` cannot be called.
        ValueError: it is written in C, and has no signature.
    """
    if sys.version_info >= (3, 14):
        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)
