"""README.md and the pages of docs/: their texts, and the code that stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (README, *sorted((ROOT / "docs").rglob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def fenced(language: str) -> list[tuple[str, str]]:
    """Return the page and the text of every block of code in a language."""
    return [(name, code) for name, text in TEXTS.items() for found, code in FENCE.findall(text) if found == language]


def inline(text: str) -> list[str]:
    """Return the pieces of code within a page's sentences and tables."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def shell_lines(text: str) -> list[str]:
    """Return the lines of a page's shell blocks, continued ones as one."""
    scripts = "\n".join(code for language, code in FENCE.findall(text) if language == "sh")
    return scripts.replace("\\\n", " ").splitlines()
