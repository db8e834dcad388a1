"""What the README shows works: its examples run, its commands parse, its tables are the result files'."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from trifuse.architectures.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line for line in SHELL.splitlines() if line.startswith("trifuse ")]


def test_there_are_three_examples_and_some_commands():
    assert len(EXAMPLES) >= 3
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[-1][:40])
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: " ".join(line.split()[1:3]))
def test_command_parses(command):
    words = shlex.split(command, comments=True)[1:]
    assert build_parser().parse_args(words).run


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word.split()[1] for word in re.findall(r"make [a-z]+", README)} <= targets


def test_plan_names_what_is_there():
    folder, seen = ROOT, 0
    plan = README.split("## The plan of the house")[1].split("```")[1]
    for line in plan.strip().splitlines():
        names = line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = ROOT / names.split()[0]
            assert folder.is_dir(), line
        elif "<" not in names:
            assert all((folder / name).exists() for name in names.split(", ")), line
            seen += 1
    assert seen >= 8


def test_tables_are_those_of_the_result_files():
    named = re.findall(r"<!-- results: (\S+) -->", README)
    assert len(named) >= 5
    with_results = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["with_results"]
    assert with_results(README, ROOT / "benchmarks" / "results") == README, "run: python benchmarks/reporting/tables.py"
