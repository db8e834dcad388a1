"""What a dataclass of the library describes cannot be changed, but for those that gather something as they go."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ("kernels", "blocks", "architectures")
GATHER = {
    "Allocation",
    "Arguments",
    "Comparison",
    "Compilation",
    "Description",
    "Kernel",
    "Launches",
    "ParameterGroup",
    "ScarLoss",
    "Torture",
    "TrainerState",
    "Victim",
    "_Collected",
    "_Line",
}


def changeable(source: str) -> list[str]:
    """The dataclasses of a file that are not frozen."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if (text := ast.unparse(decorator)).startswith("dataclass") and "frozen=True" not in text
    ]


def test_a_dataclass_is_frozen_unless_it_gathers_something():
    texts = [path.read_text(encoding="utf-8") for folder in LIBRARY for path in (ROOT / folder).rglob("*.py")]
    assert {name for text in texts if "@dataclass" in text for name in changeable(text)} == GATHER
