"""docs/augmentation.md lists every strength of every augmentation with its default, and which networks take which."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from trifuse.architectures.data.samples.augmentation_recipe import KINDS, AugmentationRecipe
from trifuse.architectures.runs.registry import experiments

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "augmentation.md").read_text(encoding="utf-8")


def table(header):
    """Return the rows of a table, by their first cell."""
    lines = TEXT[TEXT.index(f"| `{header}` |") :].split("\n\n")[0].splitlines()
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    return {row[0].strip("`"): dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def test_every_strength_has_its_defaults():
    rows = table("data.augmentation.")
    assert list(rows) == [field.name for field in fields(AugmentationRecipe)]
    for kind, made in KINDS.items():
        defaults = {field.name: field.default for field in fields(made)}
        said = {name: row[f"`{kind}`"] for name, row in rows.items()}
        listed = {name: json.loads(cell) for name, cell in said.items() if cell}
        assert {name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()} == defaults


def test_every_network_has_its_augmentation():
    networks = {kind: set(re.findall(r"`(\w+)`", row["default of"])) for kind, row in table("data.augment").items()}
    found = {kind: set() for kind in ("none", *KINDS)}
    for known in experiments():
        found[known.load(known.recipe)().data.augment].add(known.name)
    assert networks == found
