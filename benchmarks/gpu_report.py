"""Test and time everything on a machine with a GPU, and bring home one folder.

The machine needs torch, triton, hypothesis, pytest and pytest-benchmark (for the networks also transformers and
nibabel), but no network, no installation and no git: the folder that holds this repository is linked as ``trifuse`` on
the import path, and the commit is given by hand::

    python benchmarks/gpu_report.py --commit 0123abc --out report

It runs the tests that only a GPU can fail, then the benchmarks, each with a time limit, and writes ``report.md``, one
log for each part, and the result files. A part that fails does not keep the next one from running; the exit code is
that of the worst. Without a GPU it is a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Part:
    """A command of the report, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def parts(out: Path, seconds: float, quick: bool) -> list[Part]:
    """Return what is run: fewer tests and no networks for a quick look."""
    benchmark = ("--benchmark-only", f"--results={out}", f"--seconds={seconds}")
    listed = [
        Part("tests on the GPU", (*PYTEST, "tests/kernels/test_on_gpu.py"), 100),
        Part("fusion", (*PYTEST, "benchmarks/bench_weighted_block_fusion.py", *benchmark), 60),
        Part("attention", (*PYTEST, "benchmarks/bench_attention.py", *benchmark), 25),
        Part("dilated attention", (*PYTEST, "benchmarks/bench_dilated_attention.py", *benchmark), 60),
        Part("mutation loss", (*PYTEST, "benchmarks/bench_mutation_loss.py", *benchmark), 45),
        Part("Dice and cross-entropy", (*PYTEST, "benchmarks/bench_dice_ce_loss.py", *benchmark), 20),
        Part("depthwise kernels", (*PYTEST, "benchmarks/bench_depthwise_multi_kernel.py", *benchmark), 25),
        Part("Monte Carlo attention", (*PYTEST, "benchmarks/bench_monte_carlo_attention.py", *benchmark), 20),
        Part("context-aware fusion", (*PYTEST, "benchmarks/bench_context_aware_fusion.py", *benchmark), 20),
        Part("temporal FiLM gate", (*PYTEST, "benchmarks/bench_temporal_film_gate.py", *benchmark), 20),
        Part("labels", (*PYTEST, "benchmarks/bench_upsample_argmax.py", *benchmark), 15),
        Part("FIAS", (*PYTEST, "benchmarks/bench_fias.py", *benchmark), 30),
        Part("DINO U-Net", (*PYTEST, "benchmarks/bench_dino_unet.py", *benchmark), 40),
    ]
    return listed[1:3] if quick else listed


def environment(links: Path, commit: str) -> dict[str, str]:
    """Return the environment in which the repository is importable as trifuse, wherever it is installed or not."""
    (links / "trifuse").symlink_to(ROOT)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    metadata = links / f"trifuse-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trifuse\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\ntrifuse = trifuse.kernels.testing\n")
    path = os.pathsep.join(filter(None, [str(links), os.environ.get("PYTHONPATH", "")]))
    # Without the working folder on the path: transformers would take our `kernels` for a package of that name.
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TRIFUSE_COMMIT": commit}
    return {**os.environ, **own}


def run_part(part: Part, out: Path, variables: dict[str, str]) -> tuple[int, float]:
    """Run one part into its log; returns the exit code, 124 if it ran out of time, and the seconds it took."""
    start = time.monotonic()
    with open(out / f"{part.name.replace(' ', '_')}.log", "w") as log:
        process = subprocess.Popen(part.command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 124
    return code, time.monotonic() - start


def write_report(out: Path, outcomes: list[tuple[Part, int, float]], commit: str) -> str:
    """Write ``report.md``: what passed, and the tables of every result file."""
    from tables import markdown_of_file

    lines = [f"# GPU report, commit {commit}", "", "| part | exit code | seconds |", "| --- | ---: | ---: |"]
    lines += [f"| {part.name} | {code} | {seconds:.0f} |" for part, code, seconds in outcomes]
    lines += [f"\n## {path.stem}\n\n{markdown_of_file(path)}" for path in sorted(out.glob("*.json"))]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="test and time trifuse on this machine's GPU")
    parser.add_argument("--commit", required=True, help="what is being measured, for the stamp of the results")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for the report")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each form of a computation")
    parser.add_argument("--quick", action="store_true", help="only time the operators")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="trifuse-links-") as links:
        variables = environment(Path(links), options.commit)
        sys.path.insert(0, links)
        for part in parts(out, options.seconds, options.quick):
            code, seconds = run_part(part, out, variables)
            outcomes.append((part, code, seconds))
            print(f"{part.name}: exit code {code} after {seconds:.0f} s", flush=True)
        print(write_report(out, outcomes, options.commit))
    return max(code for _, code, _ in outcomes)


if __name__ == "__main__":
    sys.exit(main())
