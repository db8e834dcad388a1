"""Words for people: singular or plural, lists that are not too long, names in the order that people expect."""

from __future__ import annotations

import re
from collections.abc import Iterable


def count(n: int, word: str) -> str:
    """Return ``1 case`` or ``2 cases``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts ``case_2`` before ``case_10``."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def listed(names: Iterable[object], most: int = 12) -> str:
    """Join names for a message, not too many of them."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
