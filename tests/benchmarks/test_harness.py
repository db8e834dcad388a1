"""The benchmarks refuse wrong results, stamp the sound ones, and their tables show what the files hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


harness, tables = load("harness"), load("tables")

TINY_BENCHMARK = """
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
"""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Run a tiny benchmark file next to copies of the real harness and conftest."""
    root = tmp_path_factory.mktemp("run")
    (root / "benchmarks").mkdir()
    for name in ("__init__.py", "harness.py", "conftest.py"):
        shutil.copy(ROOT / "benchmarks" / name, root / "benchmarks" / name)
    (root / "benchmarks" / "bench_doubling.py").write_text(TINY_BENCHMARK)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_doubling.py", "--benchmark-only", "-rA"]
    command += ["--results", "results", "--seconds", "0.01", "-p", "no:cacheprovider"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
    }  # no worker of ours
    environment |= {"TRIFUSE_COMMIT": "0123abc", "COLUMNS": "200"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert (root / "results").exists(), child.stdout + child.stderr
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return child.stdout, json.loads((root / "results" / f"doubling.{kind}.json").read_text())


def test_sound_forms_are_timed_and_stamped(tiny_run):
    output, record = tiny_run
    timed = {(row["pass"], row["provider"]) for row in record["rows"]}
    sound = {("forward", "add"), ("forward", "multiply"), ("gradient", "add"), ("gradient", "multiply")}
    assert timed == sound | {("forward", "wrong gradient")}
    assert record["baseline"] == "add"
    assert record["stamp"]["commit"] == "0123abc"
    assert record["stamp"]["torch"] == torch.__version__
    assert record["stamp"]["copy_gb_per_s"] > 0
    for row in record["rows"]:
        assert row["median_ms"] > 0
        assert row["rounds"] >= 7
        assert (row["speedup"] == 1.0) or row["provider"] != "add"
        assert (row["gb_per_s"] is None) == (row["pass"] == "gradient")
    assert "doubling: four numbers: forward" in output


def test_wrong_forms_are_refused_and_missing_ones_skipped(tiny_run):
    output, _ = tiny_run
    assert "wrong: the result differs from the truth" in output
    assert "wrong gradient: gradient 0 differs from the truth" in output
    assert "no such package" in output
    assert "3 failed" in output
    assert "2 skipped" in output


def test_cases_of_other_devices_are_left_out(tiny_run):
    output, _ = tiny_run
    assert "elsewhere" not in output


@pytest.mark.parametrize(
    ("dtype", "noise", "refused"),
    [
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-4, True),
        (torch.bfloat16, 1e-3, False),
        (torch.bfloat16, 1e-1, True),
        (torch.float64, 1e-9, True),
    ],
)
def test_judge(dtype, noise, refused):
    truth = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = (truth * (1 + noise)).to(dtype)
    if refused:
        with pytest.raises(harness.WrongResult, match="form: the result differs"):
            harness.judge("form", [got], [truth])
    else:
        harness.judge("form", [got], [truth])


def test_judge_refuses_nan_shapes_and_labels():
    truth = torch.ones(4)
    with pytest.raises(harness.WrongResult, match="differs"):
        harness.judge("form", [truth * torch.nan], [truth])
    with pytest.raises(harness.WrongResult, match=r"shape \(4, 1\), expected \(4,\)"):
        harness.judge("form", [truth[:, None]], [truth])
    with pytest.raises(harness.WrongResult, match="expected 2 tensors, got 1"):
        harness.judge("form", [truth], [truth, truth])
    labels = torch.zeros(10_000, dtype=torch.uint8)
    few, many = labels.clone(), labels.clone()
    few[:5], many[:50] = 1, 1
    harness.judge("form", [few], [labels])
    with pytest.raises(harness.WrongResult):
        harness.judge("form", [many], [labels])


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


def test_tables_show_the_rows(tiny_run):
    _, record = tiny_run
    text = tables.markdown(record)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["form", "median ms", "fifths", "speed-up", "peak MiB", "GB/s", "of ceiling"] in lines
    assert ["form", "median ms", "fifths", "speed-up", "peak MiB", "saved MiB"] in lines
    assert ["multiply", f"{record['rows'][1]['median_ms']:.3g}"] in [cells[:2] for cells in lines]
    assert "**four numbers, forward**" in text
    assert "commit 0123abc" in text
    assert "Absent: absent (no such package)." in text
    assert "Refused: wrong: the result differs" in text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_are_whole_and_of_a_commit(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith(f"{record['benchmark']}.")
    assert not record["stamp"]["commit"].endswith("+changes")
    assert tables.markdown(record).count("\n|") >= len(record["rows"])


def test_gpu_report_can_be_rehearsed_by_anyone():
    """Its parts name files that exist, and end in time."""
    report = load("gpu_report")
    listed = report.parts(Path("out"), 0.5, quick=False)
    assert sum(part.limit_s for part in listed) <= 8 * 60
    named = [word for part in listed for word in part.command if word.startswith(("tests/", "benchmarks/"))]
    assert [word for word in named if not (ROOT / word).exists()] == []
    benchmarked = {Path(word).name for word in named if word.startswith("benchmarks/")}
    assert benchmarked == {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}


def test_gpu_report_of_a_part_that_fails_and_one_that_hangs(tmp_path):
    report = load("gpu_report")
    variables = report.environment(tmp_path, "0123abc")
    say = "import trifuse.kernels, os; print(os.environ['TRIFUSE_COMMIT'])"
    for code, expected in ((say, 0), ("import sys; sys.exit(3)", 3), ("import time; time.sleep(60)", 124)):
        part = report.Part("a part", (sys.executable, "-c", code), limit_s=20 if expected == 0 else 2)
        assert report.run_part(part, tmp_path, variables)[0] == expected
    part = report.Part("said", (sys.executable, "-c", say), limit_s=30)
    report.run_part(part, tmp_path, variables)
    assert (tmp_path / "said.log").read_text().strip() == "0123abc"
