"""The benchmarks refuse wrong results, stamp the sound ones, and their tables show what the files hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trifuse.benchmarks import harness
from trifuse.benchmarks.reporting import tables
from trifuse.benchmarks.reporting.doubts import doubts

ROOT = Path(__file__).resolve().parents[2]


REPORT = ("__init__", "report", "counted", "doubts")
TINY_BENCHMARK = """
import os
import pytest, torch
from .harness import Case, Comparison, Pass, clock

COMPARISON = Comparison(
    name="doubling",
    cases=[
        Case("four numbers", lambda device: (torch.arange(4.0, device=device),)),
        Case("elsewhere", lambda device: 1 / 0, devices=("tpu",)),
    ],
    passes=[Pass("forward", least_bytes=lambda x: 2 * x.nbytes), Pass("gradient", leaves=lambda x: [x])],
    providers={
        "add": lambda x: x + x,
        "multiply": lambda x: 2 * x,
        "wrong": lambda x: 2 * x + 0.1,
        "wrong gradient": lambda x: x + x.detach(),
        "absent": None,
    },
    truth=lambda x: 2 * x,
    missing={"absent": "no such package"},
)

@pytest.mark.benchmark(timer=clock)
@COMPARISON.parametrize()
def test_doubling(show, case, timed, provider):
    show(COMPARISON, case, timed, provider)

def test_end(benchmark):
    os._exit(7)
"""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Report on one tiny benchmark file, next to copies of the real harness, conftest and report.

    Its last test ends pytest at once, as a time limit would; the options of another pytest are none of its business.
    """
    root = tmp_path_factory.mktemp("run")
    (root / "benchmarks" / "reporting").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "harness.py", *(f"reporting/{n}.py" for n in REPORT)):
        shutil.copy(ROOT / "benchmarks" / name, root / "benchmarks" / name)
    (root / "benchmarks" / "bench_doubling.py").write_text(TINY_BENCHMARK)
    (root / "links").mkdir()
    (root / "links" / "trifuse").symlink_to(root)  # no installation and no git: a copy, linked as trifuse
    command = [sys.executable, "-m", "trifuse.benchmarks.reporting.report", "--out", "out", "--commit", "0123abc"]
    command += ["--seconds", "0.01", "--only", "doubling"]
    path = os.pathsep.join(filter(None, [str(root / "links"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTEST_ADDOPTS": "--no-such-option", "PYTHONPATH": path}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert (root / "out" / "report.md").exists(), child.stdout + child.stderr
    return child, root / "out"


def test_a_run_by_hand_leaves_the_committed_results_alone(tiny_run):
    """It may hold some cases only: it writes where nothing is committed, and says where, below the table."""
    root = tiny_run[1].parent
    device = harness.default_device().type
    committed = root / "benchmarks" / "results" / f"doubling.{device}.json"
    committed.parent.mkdir()
    committed.write_text("a whole run")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_doubling.py", "--benchmark-only", "--seconds=0.01"]
    command += ["-q", "-k", "forward", "--import-mode=importlib", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "links"), environment.get("PYTHONPATH", "")])
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert child.returncode == 1, child.stdout + child.stderr  # one form is wrong
    assert [path.read_text() for path in committed.parent.iterdir()] == ["a whole run"]
    written = Path("build", "benchmarks", committed.name)
    assert {row["pass"] for row in json.loads((root / written).read_text())["rows"]} == {"forward"}
    assert f"figures written: {written}\n" in child.stdout.partition("OPS: ")[2], "below the table, where it is seen"


@pytest.fixture(scope="module")
def record(tiny_run):
    return json.loads((tiny_run[1] / f"doubling.{harness.default_device().type}.json").read_text())


def test_sound_forms_are_timed_and_stamped(record):
    timed = {(row["pass"], row["provider"]) for row in record["rows"]}
    sound = {("forward", "add"), ("forward", "multiply"), ("gradient", "add"), ("gradient", "multiply")}
    assert timed == sound | {("forward", "wrong gradient")}
    assert record["baseline"] == "add"
    assert record["stamp"]["commit"] == "0123abc"
    assert record["stamp"]["torch"] == torch.__version__
    for row in record["rows"]:
        assert row["median_ms"] > 0
        assert row["rounds"] >= 7
        assert (row["speedup"] == 1.0) or row["provider"] != "add"
        assert (row["gb_per_s"] is None) == (row["pass"] == "gradient")


def test_wrong_forms_are_refused_and_missing_ones_skipped(tiny_run, record):
    refused = {(row["pass"], row["provider"]): row["reason"] for row in record["refused"]}
    assert refused.keys() == {("forward", "wrong"), ("gradient", "wrong"), ("gradient", "wrong gradient")}
    assert refused["forward", "wrong"].startswith("wrong: the result differs from the truth")
    assert refused["gradient", "wrong gradient"].startswith("wrong gradient: gradient 0 differs from the truth")
    assert record["absent"] == {"absent": "no such package"}
    progress = (tiny_run[1] / "logs" / "doubling.log").read_text().splitlines()[0]
    assert progress.split()[0] == "..F.s..FFs"


def test_report_tells_of_a_part_that_failed_and_keeps_what_it_had_measured(tiny_run, record):
    child, out = tiny_run
    assert child.returncode == 7
    assert "1/1  doubling" in child.stdout
    assert "exit code 7" in child.stdout
    text = (out / "report.md").read_text()
    assert re.search(r"\| doubling +\| +7 \|", text)
    assert re.search(r"\| commit +\| +0123abc \|", text)
    assert "## The end of what doubling said" in text
    assert tables.markdown(record).rstrip() in text


def test_cases_of_other_devices_are_left_out(tiny_run, record):
    assert {row["case"] for row in record["rows"]} == {"four numbers"}
    assert "elsewhere" not in (tiny_run[1] / "logs" / "doubling.log").read_text()


def test_replay_hands_over_every_sample():
    class Fixture:
        extra_info: dict = {}  # noqa: RUF012

        def pedantic(self, function, rounds):
            self.samples = []
            for _ in range(rounds):
                start = harness.clock()
                function()
                self.samples.append(round(harness.clock() - start, 6))

    fixture = Fixture()
    harness.replay(fixture, harness.Timing((0.5, 0.25, 2.0), peak_bytes=3 << 20))
    assert fixture.samples == [0.5, 0.25, 2.0]
    assert fixture.extra_info["peak_mib"] == 3


def test_tables_show_the_rows(record):
    text = tables.markdown(record)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["form", "median ms", "20–80 %", "speed-up", "peak MiB", "GB/s", "of ceiling"] in lines
    assert ["form", "median ms", "20–80 %", "speed-up", "peak MiB", "saved MiB"] in lines
    shown = [float(cells[1]) for cells in lines if cells[:1] == ["multiply"]]
    times = [row["median_ms"] for row in record["rows"] if row["provider"] == "multiply"]
    assert shown == pytest.approx(times, rel=6e-3, abs=6e-5)
    assert "**four numbers, forward**" in text
    assert "commit 0123abc" in text
    assert "Absent: absent (no such package)." in text
    assert "Refused: wrong: the result differs" in text


COMMITTED = [
    path for path in sorted((ROOT / "benchmarks/results").glob("*.json")) if "baseline" in json.loads(path.read_text())
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_are_whole_and_of_a_commit(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith(f"{record['benchmark']}.")
    assert not record["stamp"]["commit"].endswith("+changes")
    assert tables.markdown(record).count("\n|") >= len(record["rows"])


ALL_RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", ALL_RESULTS, ids=lambda path: path.name)
def test_committed_results_are_of_kernels_where_they_say_so(path):
    """A figure of a GPU on which plain PyTorch ran instead turns the suite red."""
    assert doubts(path) == []
