"""CHANGELOG.md and CITATION.cff say what pyproject.toml and the package say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from trifuse import kernels
from trifuse.architectures.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
NUMBERS = {14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen"}


@pytest.mark.parametrize(("field", "key"), [("title", "name"), ("version", "version"), ("license", "license")])
def test_citation_is_of_this_package(field, key):
    found = re.findall(rf"^{field}: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found == [PROJECT[key]]


def test_changelog_begins_with_this_version():
    assert re.findall(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)[0].split(" - ")[0] == PROJECT["version"]


def test_first_version_names_what_there_is():
    (first,) = re.findall(r"^## 0\.1\.0 .*?(?=^## |\Z)", CHANGELOG, flags=re.MULTILINE | re.DOTALL)
    assert f"{NUMBERS[len(kernels.OPERATORS)]} functions" in first
    assert {*COMMANDS} <= {*re.findall(r"`(\w+)`", first)}
