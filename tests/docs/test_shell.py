"""Every line of shell that the pages show is run here, or is of a kind that some test checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from written_pages import ROOT, TEXTS, fenced, inline, shell_lines

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
BLOCKS = [code for _, code in fenced("sh")]
SHOWN = [line for text in TEXTS.values() for line in (*shell_lines(text), *inline(text))]
PROGRAM = re.compile(r"(?:\w+=\S+ )*python (?:-m (?P<module>[\w.]+)|(?P<file>[\w/]+\.py))(?P<arguments>[^#]*)")
BENCHMARK = re.compile(r"pytest benchmarks/[^#]*")
INSTALL = re.compile(r"pip install \"?\.\[([\w,]+)\]\"?")
OTHERS = r"tensorboard|mlflow|nnUNetv2_train"  # tools that are not ours
CHECKED = re.compile(rf"#|(?:\w+=\S+ )*(?:trifuse|torchrun|make|{OTHERS}) ")  # ours by test_docs.py


def block_with(words: str) -> str:
    """Return the one block of shell that holds some words."""
    (block,) = [code for code in BLOCKS if words in code]
    return block


def run(script: str, folder: Path, **variables: str) -> str:
    """Run a script in a folder, with the virtual environment of this Python, and return what it printed."""
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euc", script]
    child = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


ARRANGE = block_with("mkdir -p sunnybrook").split("trifuse train")[0]
LINK = block_with("mktemp -d").splitlines()[0]


def test_every_line_is_run_or_of_a_kind_that_is_checked():
    others = {
        line
        for text in TEXTS.values()
        for line in map(str.strip, shell_lines(text))
        if line and not any(kind.match(line) for kind in (CHECKED, PROGRAM, BENCHMARK, INSTALL))
    }
    assert others - {*map(str.strip, [*ARRANGE.splitlines(), LINK])} == set(), "run these in tests/docs/test_shell.py"


def test_the_public_example_is_arranged_as_a_cohort(tmp_path):
    frames = tmp_path / "data" / "sunnybrook_cine_sax" / "SC-HF-I-4"
    frames.mkdir(parents=True)
    for name in ("a", "a_gt", "b", "b_gt", "without_labels"):
        (frames / f"{name}.nii.gz").write_text(name)
    run(ARRANGE, tmp_path, TRIFUSE_DATA=str(tmp_path / "data"))
    found = {path.relative_to(tmp_path / "sunnybrook").as_posix(): path.read_text() for path in tmp_path.glob("s*/*/*")}
    assert found == {
        "images/a.nii.gz": "a",
        "images/b.nii.gz": "b",
        "labels/a.nii.gz": "a_gt",
        "labels/b.nii.gz": "b_gt",
    }


def test_a_checkout_is_linked_under_the_name_of_the_package(tmp_path):
    printed = run(f'{LINK}\nreadlink "$links/trifuse"', ROOT, TMPDIR=str(tmp_path))
    assert Path(printed.strip()).resolve() == ROOT.resolve()


def programs() -> list[tuple[str, str]]:
    """Return the file of each Python program that the pages run, but for the command, and its options."""
    found = []
    for match in filter(None, map(PROGRAM.match, SHOWN)):
        module = find_spec(match["module"]) if match["module"] else None
        file = match["file"] or Path(str(module and module.origin)).resolve().relative_to(ROOT.resolve()).as_posix()
        found += [(file, option) for option in re.findall(r"(?<= )--[\w-]+", match["arguments"])]
    return sorted({*found})


@pytest.mark.parametrize(("file", "option"), programs())
def test_programs_have_the_options_that_are_shown(file, option):
    assert f'"{option}"' in (ROOT / file).read_text(encoding="utf-8")


def test_there_are_programs_with_options():
    assert len(programs()) >= 3


BENCHMARKS = sorted({match[0].strip() for match in map(BENCHMARK.match, SHOWN) if match})


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_that_are_shown_select_some_cases(command):
    assert re.search(r"^\d+(/\d+)? tests collected", run(f"{command} -q --collect-only", ROOT), re.MULTILINE)


def test_a_command_for_one_benchmark_is_shown():
    assert any("-k " in command for command in BENCHMARKS)


def test_extras_that_are_installed_exist():
    named = {extra for text in TEXTS.values() for found in INSTALL.findall(text) for extra in found.split(",")}
    assert {"med", "ecg"} <= named <= {*EXTRAS}
