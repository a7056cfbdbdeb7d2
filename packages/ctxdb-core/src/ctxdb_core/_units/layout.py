"""`share_layout`: where the attributes of units of work are kept."""

from __future__ import annotations

from inspect import get_annotations
from typing import TypeVar

__all__ = ["share_layout"]

T = TypeVar("T")


def share_layout(kind: type[T]) -> type[T]:
    """Reserve a place in the instances of a class for each attribute, whatever the first of them set.

    CPython keeps attributes of instances in such places, and those that have none in a dict. A class is given places
    for what is set in its first thirty instances, and for no more. Where these are the units of requests without
    database use, such as the health checks at the start of a service, the unit of each later request with a session
    would need a dict, which takes a microsecond.
    """
    instance = kind.__new__(kind)
    for base in reversed(kind.__mro__):
        for name, annotation in get_annotations(base).items():
            if not annotation.startswith("ClassVar"):
                setattr(instance, name, None)
    return kind
