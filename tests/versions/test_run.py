"""Pairs of torch and Triton: the runner counts what came of tests, and keeps one verdict for each pair."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.version import Version

from trifuse.kernels.tested_versions import VERSIONS, read_verdicts


def _load_runner():
    spec = spec_from_file_location("versions_runner", Path(__file__).with_name("run.py"))
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runner = _load_runner()
SETTINGS = tomllib.loads((runner.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
THREE_TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert False

@pytest.mark.skip(reason="needs a GPU")
def test_skips(): pass
"""


def row(torch: str, **values: str) -> dict[str, str]:
    return dict.fromkeys(runner.COLUMNS, "1") | {"torch": torch, "others": ""} | values


def supported() -> list[tuple[str, str]]:
    return [(pair["torch"], pair["triton"]) for pair in runner.read_pairs() if not pair["others"]]


def test_the_oldest_pair_is_the_oldest_that_may_be_installed_and_the_default_one_is_among_them():
    pairs = supported()
    wanted = " ".join(SETTINGS["project"]["dependencies"])
    floors = [re.search(rf"\b{name}>=([\d.]+)", wanted)[1] for name in ("torch", "triton")]
    assert [version.startswith(floor) for version, floor in zip(pairs[0], floors, strict=True)] == [True, True]
    default = (runner.ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert tuple(re.findall(r"==([\d.]+)", default)) in pairs


def test_verdicts_are_in_a_wheel():
    shipped = SETTINGS["tool"]["setuptools"]["package-data"]["trifuse.kernels.testing"]
    assert any(VERSIONS.match(pattern) for pattern in shipped)


def test_every_pair_has_a_verdict_without_a_failure():
    verdicts = [row for row in read_verdicts(VERSIONS) if not row["others"]]
    assert [(row["torch"], row["triton"], row["failed"]) for row in verdicts] == [(*pair, "0") for pair in supported()]
    # A file of tests that an old version does not collect would shrink a row.
    counts = [int(row["passed"]) + int(row["skipped"]) for row in verdicts]
    assert min(counts) == max(counts) > 1000


def test_the_floors_of_other_packages_are_the_versions_that_were_tested():
    named = {requirement for extra in SETTINGS["project"]["optional-dependencies"].values() for requirement in extra}
    named |= {*SETTINGS["project"]["dependencies"]}
    without = {one for one in named if ">=" not in one and not one.startswith("trifuse[")}
    tools = SETTINGS["project"]["optional-dependencies"]["docs"]
    without -= {"ruff", "mypy", "build", "cosmic-ray", *tools}  # no test depends on a version of these
    # One loads what we build, and stands beside an old transformers in old versions alone; no code uses the next; of
    # MLflow the newest alone is tested.
    assert without <= {"kernels", "lightning", "mlflow-skinny", "sqlalchemy", "alembic"}
    tested = {row["others"]: row for row in read_verdicts(VERSIONS) if row["others"]}
    held = {
        bound: {name: Version(version) for name, version in (one.split("==") for one in row["packages"].split())}
        for bound, row in tested.items()
    }
    floors = {name: Version(version) for name, version in runner.floors().items()}
    assert held["floors"] == floors
    assert tested["floors"]["torch"] == supported()[0][0]
    for bound, row in tested.items():
        assert held[bound].keys() == floors.keys()
        assert (row["failed"], int(row["passed"]) > 1000) == ("0", True)


def test_tests_run_on_this_tree_and_are_counted_by_what_came_of_them(tmp_path):
    tests = tmp_path / "test_four.py"
    where = f"str(pathlib.Path(trifuse.kernels.__file__).resolve()).startswith('{runner.ROOT}')"
    tests.write_text(f"import pathlib, trifuse.kernels\n{THREE_TESTS}\ndef test_where(): assert {where}\n")
    counts, failures = runner.run_tests(Path(sys.executable), [str(tests)], 1, tmp_path / "cache")
    seconds = int(counts.pop("seconds"))
    assert counts == {"passed": "2", "failed": "1", "skipped": "1", "why_skipped": "1 needs a GPU"}
    assert 0 <= seconds < 300
    assert [name.rpartition("::")[2] for name in failures] == ["test_fails"]


def test_an_error_before_a_test_counts_as_a_failure(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite errors="1" failures="0" skipped="0" tests="2"><testcase classname="a" name="b">'
        '<error message="no fixture"/></testcase><testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    assert runner.counts_of(report) | {"why_skipped": ""} == {
        "passed": "1", "failed": "1", "skipped": "0", "why_skipped": ""
    }  # fmt: skip
    assert runner.failures_of(report) == ["a::b"]


def test_an_environment_is_made_once_with_its_versions_pinned(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **settings: commands.append(command))
    pair = {"torch": "2.10.0", "triton": "3.6.0", "numpy": "<2.4", "others": ""}
    place = tmp_path / "torch-2.10.0"
    place.mkdir()  # which `venv` would have done
    python = runner.environment_of(pair, tmp_path)
    assert python == place / "bin" / "python"
    assert (place / "constraints.txt").read_text() == "torch==2.10.0\ntriton==3.6.0\nnumpy<2.4\n"
    assert [command[2] for command in commands] == ["venv", "pip", "pip"]
    assert all(str(place / "constraints.txt") in command for command in commands[1:])
    assert runner.environment_of(pair, tmp_path) == python
    assert len(commands) == 3
    runner.environment_of(pair | {"triton": "3.6.1"}, tmp_path)  # another pair for the same torch
    assert len(commands) > 3


def test_other_packages_are_at_their_floors_or_at_their_newest(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **settings: commands.append(command))
    monkeypatch.setattr(runner, "floors", lambda: {"numpy": "1.2", "einops": "0.8"})
    pair = {"torch": "2.10.0", "triton": "3.6.0", "numpy": "", "others": "floors"}
    for name in ("torch-2.10.0-floors", "torch-2.10.0"):
        (tmp_path / name).mkdir()
    python = runner.environment_of(pair, tmp_path)
    constraints = (python.parents[1] / "constraints.txt").read_text().splitlines()
    assert {"torch==2.10.0", "numpy==1.2", "einops==0.8"} <= {*constraints}
    assert not any("--upgrade" in command for command in commands)
    for _ in range(2):  # what was the newest once need not be so now
        commands.clear()
        assert runner.environment_of(pair | {"others": "newest"}, tmp_path).parents[1].name == "torch-2.10.0"
        assert all("eager" in command for command in commands[-2:])


def test_a_verdict_takes_the_place_of_the_last_one(tmp_path):
    file = tmp_path / "versions.csv"
    first, second = (torch for torch, _ in supported()[:2])
    floors = row(first, others="floors", passed="9")
    for verdict in (row(second), row("1.0"), floors, row(first), row(second, passed="7")):
        runner.write_verdict(verdict, file)
    assert [(each["torch"], each["others"], each["passed"]) for each in read_verdicts(file)] == [
        (first, "", "1"), (second, "", "7"), (first, "floors", "9")
    ]  # fmt: skip


@pytest.mark.parametrize("commit", ["0123abc", ""])
def test_a_verdict_is_written_for_a_commit_alone(commit, tmp_path, monkeypatch, capsys):
    written = []
    counts = {"passed": "5", "failed": "2", "skipped": "0", "why_skipped": "", "seconds": "9"}
    monkeypatch.setattr(runner, "clean_commit", lambda: commit)
    monkeypatch.setattr(runner, "environment_of", lambda pair, folder: Path(sys.executable))
    monkeypatch.setattr(runner, "run_tests", lambda *arguments: (counts, ["test_a::test_b"]))
    monkeypatch.setattr(runner, "write_verdict", written.append)
    assert runner.run_pairs(runner.read_pairs()[:1], tmp_path, 1) == 2
    assert ("no verdict is written" in capsys.readouterr().out) == (not commit)
    assert [set(verdict) for verdict in written] == ([set(runner.COLUMNS)] if commit else [])
