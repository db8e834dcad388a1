"""Words for people: what a mistyped one may have meant, and singular or plural."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word that is spelt most like ``word``; None where none is at least ``cutoff`` like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def count(n: int, word: str) -> str:
    """Return ``1 case`` or ``2 cases``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
