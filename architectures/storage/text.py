"""Words for people: singular or plural."""

from __future__ import annotations


def count(n: int, word: str) -> str:
    """Return ``1 case`` or ``2 cases``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
