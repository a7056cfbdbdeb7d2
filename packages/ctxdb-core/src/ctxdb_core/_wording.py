"""How errors call what was passed to them."""

from __future__ import annotations

__all__ = ["article", "type_of"]


def article(name: str) -> str:
    """Return `name` with the indefinite article that it is read with."""
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def type_of(value: object) -> str:
    """Return how an error calls what was passed: by its type alone, as its repr may show a password."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else article(type(value).__name__)
