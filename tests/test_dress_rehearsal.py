"""Every line of Python that only runs with a GPU has run: on the stand-in GPU, in processes that have no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import stand_in_gpu
import torch
from coverage import CoverageData
from ready_python import run_python
from shared_by_workers import folder_of_run, one_at_a_time

sys.path.insert(0, str(Path(__file__).parent / "rehearsal"))
import run_report
from gpu_only_lines import ROOT, gpu_only_lines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of GPUs run on it")
REHEARSALS = sorted((ROOT / "tests" / "rehearsal").glob("rehearse_*.py"))
READY = ("stand_in_gpu.process.sitecustomize", "pytest", "hypothesis")  # of this project nothing: its lines are counted


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Return a folder for all workers of the run, in which the setting of coverage lies."""
    folder = folder_of_run(tmp_path_factory) / "rehearsals"
    folder.mkdir(exist_ok=True)
    (folder / "coveragerc").write_text("[run]\nomit = */tests/*\n")  # coverage cannot look for files among torch.ops
    return folder


def rehearse(path: Path, folder: Path) -> tuple[int, str]:
    """Run a rehearsal alone, once for all who ask: as whoever works on what it rehearses runs it, lines counted.

    Returns:
        How it ended and what it said; the lines that ran are in the folder, under the rehearsal's name.
    """
    result = folder / f"{path.stem}.json"
    with one_at_a_time(folder / f"{path.stem}.lock"):
        if not result.exists():
            measured = ("coverage", "run", f"--rcfile={folder / 'coveragerc'}", f"--data-file={folder / path.stem}")
            tests = ("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path)
            environment = stand_in_gpu.environment(OMP_NUM_THREADS="1")
            child = run_python("-m", *measured, "-m", *tests, ready=READY, limit_s=900, **environment)
            result.write_text(json.dumps([child.returncode, child.stdout[-20000:] + child.stderr]))
    code, said = json.loads(result.read_text())
    return code, said


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", REHEARSALS, ids=lambda path: path.stem)
def test_a_rehearsal_succeeds_alone(path, shared):
    code, said = rehearse(path, shared)
    assert code == 0, said


@pytest.mark.timeout(900)
def test_every_line_that_only_runs_with_a_gpu_has_run(shared):
    measured = []
    for path in REHEARSALS:
        rehearse(path, shared)
        measured.append(CoverageData(str(shared / path.stem)))
        measured[-1].read()
    listed = gpu_only_lines()
    assert sum(map(len, listed.values())) > 80, "the list is read from the code; it does not find its lines any more"
    missing = []
    for path, lines in listed.items():
        ran = {line for data in measured for line in data.lines(str(path)) or ()}
        text = path.read_text(encoding="utf-8").splitlines()
        missing += [f"{path.relative_to(ROOT)}:{line}: {text[line - 1].strip()}" for line in lines if line not in ran]
    assert not missing, "\n".join(missing)


PARTS = run_report.report.part_names()
TOOLS_ON = PARTS.index("host_cost")
REPORTS = {
    "tests and operators": [run_report.report.TESTS, *PARTS[:TOOLS_ON]],
    "tools and networks": PARTS[TOOLS_ON:],
}
"""The report's parts, in two that may run beside each other."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", REPORTS.values(), ids=REPORTS)
def test_the_report_runs_through_and_what_it_wrote_is_sound(names, tmp_path):
    """With the tests of GPUs, and a tiny case of every benchmark."""
    only = [name for name in names if name != run_report.report.TESTS]
    tests = ["--tests"] if len(only) < len(names) else []
    assert run_report.run_report(tmp_path, *tests, "--only", *only) == 0, (tmp_path / "report.md").read_text()
    assert list(run_report.amiss_in_report(tmp_path, *names)) == []
    assert list(run_report.amiss_in_results(tmp_path, *names)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_benchmarks_run_as_tests(tmp_path):
    """An operator of several comparisons, and a network; the report has run the others, file by file."""
    names = ("gates", "taff_unet")
    assert run_report.run_benchmarks(tmp_path, *names) == 0
    assert list(run_report.amiss_in_results(tmp_path, *names)) == []


def test_no_result_was_measured_on_the_stand_in():
    results = ROOT / "benchmarks" / "results"
    assert [
        path for path in results.rglob("*") if path.is_file() and stand_in_gpu.NAME.encode() in path.read_bytes()
    ] == []
    assert json.loads(next(results.glob("*.cpu.json")).read_text())["stamp"]["device"]
