"""Every line of Python that only runs with a GPU has run: on the stand-in GPU, in a process that has no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_gpu
import torch
from coverage import CoverageData

sys.path.insert(0, str(Path(__file__).parent / "rehearsal"))
import run_report
from gpu_only_lines import ROOT, gpu_only_lines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of GPUs run on it")
REHEARSALS = sorted((ROOT / "tests" / "rehearsal").glob("rehearse_*.py"))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], CoverageData]:
    """Run all rehearsals; return how that ended, and the lines that ran."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "coveragerc").write_text("[run]\nomit = */tests/*\n")  # coverage cannot look for files among torch.ops
    measured = ("-m", "coverage", "run", f"--rcfile={folder / 'coveragerc'}", f"--data-file={folder / 'data'}")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, REHEARSALS))
    child = subprocess.run(
        [sys.executable, *measured, *tests],
        cwd=ROOT,
        env=stand_in_gpu.environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    data = CoverageData(str(folder / "data"))
    data.read()
    return child, data


@pytest.mark.timeout(900)
def test_the_rehearsals_succeed(rehearsed):
    child, _ = rehearsed
    assert child.returncode == 0, child.stdout[-20000:] + child.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", REHEARSALS, ids=lambda path: path.stem)
def test_a_rehearsal_succeeds_alone(path):
    """As whoever works on what it rehearses runs it."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path))
    environment = stand_in_gpu.environment(OMP_NUM_THREADS="1")
    child = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-20000:] + child.stderr


@pytest.mark.timeout(900)
def test_every_line_that_only_runs_with_a_gpu_has_run(rehearsed):
    listed = gpu_only_lines()
    assert sum(map(len, listed.values())) > 80, "the list is read from the code; it does not find its lines any more"
    missing = []
    for path, lines in listed.items():
        ran, text = set(rehearsed[1].lines(str(path)) or ()), path.read_text(encoding="utf-8").splitlines()
        missing += [f"{path.relative_to(ROOT)}:{line}: {text[line - 1].strip()}" for line in lines if line not in ran]
    assert not missing, "\n".join(missing)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """Return the folder of a report with the tests of GPUs, and a tiny case of every benchmark."""
    out = tmp_path_factory.mktemp("report")
    assert run_report.run_report(out, ["--tests"]) == 0, (out / "report.md").read_text()
    return out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_report_runs_through_and_what_it_wrote_is_sound(reported):
    assert list(run_report.amiss_in_report(reported)) == []
    assert list(run_report.amiss_in_results(reported)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_benchmarks_run_as_tests(tmp_path):
    """An operator of several comparisons, and a network; the report has run the others, file by file."""
    files = ("bench_gates.py", "bench_taff_unet.py")
    assert run_report.run_benchmarks(tmp_path, *files) == 0
    assert list(run_report.amiss_in_results(tmp_path, *files)) == []


def test_no_result_was_measured_on_the_stand_in():
    results = ROOT / "benchmarks" / "results"
    assert [
        path for path in results.rglob("*") if path.is_file() and stand_in_gpu.NAME.encode() in path.read_bytes()
    ] == []
    assert json.loads(next(results.glob("*.cpu.json")).read_text())["stamp"]["device"]
