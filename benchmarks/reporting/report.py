"""Time every operator and every network on this machine, and write one report.

    python -m trifuse.benchmarks.reporting.report --out FOLDER  # `make bench` brings the pages' tables up to date, too
    trifuse bench --out FOLDER                                  # the same, wherever trifuse is installed

Every ``bench_*.py`` is a part, run by pytest in a process of its own. So are two tools that time something else:
``host_cost.py``, what a call costs the host, and ``scaling.py``, how cost grows.
A part that fails does not keep the next one from running; the exit code is that of the worst, 124 for one that ran out
of time. Launches of our Triton kernels are counted. A part fails if kernels of some operator could not be built, if a
figure of ours is of a GPU on which it launched none, and, for the tests, if they launched none. The folder gets the
result files (after each case, so that a part which is ended keeps what it has), ``report.md`` with all tables, and one
log for each part. What a part that was ended had counted until then is told as such, and the part is refused: each case
in its result files was measured to its end, but cases are missing.

On a machine with a GPU all parts together take eight minutes at most. Each has its share of the time that is left, so
that one which is done early leaves more to the rest; where compiled forms took too long, the same command with
``--only`` goes on, with what the compiler has cached. Such a machine needs torch, triton, a C compiler, pytest and
pytest-benchmark, for ``--tests`` hypothesis, for the networks einops, safetensors, nibabel and scipy; no network, no
git, and no installation: the folder that holds this one is linked as ``trifuse`` on the import path::

    links=$(mktemp -d) && ln -s "$PWD" "$links/trifuse"  # in the repository
    PYTHONPATH="$links" python -m trifuse.benchmarks.reporting.report --out FOLDER --tests --commit COMMIT
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trifuse.kernels import OPERATORS
from trifuse.kernels.testing.tables import markdown, table

from .doubts import doubts

FOLDER = Path(__file__).resolve().parents[1]
ROOT = FOLDER.parent
GPU_TESTS = ROOT / "tests" / "kernels" / "gpu" / "test_on_gpu.py"
# Parts that pytest does not run, and their share of the time of one form: of a curve, each of four points has a part.
TOOLS = {"host_cost": 1.0, "scaling": 0.25}
OUT_OF_TIME = 124
REFUSED = 1  # the exit code of a part that ended well, but without the kernels that it shall run
TESTS = "tests on the GPU"
GPU_SECONDS = 480
# The parts' shares of that time, in the order in which they run; a guess, mostly from the number of forms to compile.
GPU_SHARES = {
    TESTS: 160,
    "weighted_block_fusion": 55,
    "dilated_attention": 65,
    "mutation_loss": 25,
    "depthwise_multi_kernel": 28,
    "memory_efficient_attention": 28,
    "dice_ce_loss": 28,
    "monte_carlo_pool": 16,
    "gates": 32,
    "context_aware_fusion": 16,
    "temporal_film_gate": 20,
    "segment_film_gate": 20,
    "instance_norm_leaky_relu": 20,
    "residual_layer_norm": 20,
    "batch_norm_activation": 20,
    "upsample_argmax": 14,
    "host_cost": 15,
    "fias": 20,
    "taff_unet": 18,
    "dino_unet": 25,
    "scaling": 25,
}
SHARE_OF_OTHERS = 20
MACHINE = """
import json
from trifuse.kernels.testing.machine import default_device, identity
device = default_device()
print(json.dumps({"kind": device.type, **identity(device)}))
"""


@dataclass(frozen=True)
class Part:
    """A command of the report, and its share of the time where that is limited."""

    name: str
    command: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: which one.
        code: its exit code.
        seconds: how long it took.
        limit_s: how long it might have; None where it could take its time.
        launches: of our Triton kernels, as far as they were counted; None where none were: it never started.
        whole: whether it was counted to its end.
        refused: why what it found does not count.
    """

    part: Part
    code: int
    seconds: float
    limit_s: float | None
    launches: int | None = None
    whole: bool = False
    refused: list[str] = field(default_factory=list)


def part_names() -> list[str]:
    """Return the names of the benchmark files and `TOOLS`: those with a share in its order, then any others."""
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")} | TOOLS.keys()
    return [name for name in GPU_SHARES if name in found] + sorted(found - GPU_SHARES.keys())


def parts(
    names: Sequence[str], out: Path, scratch: Path, seconds: float, *, tests: bool, tiny: bool = False
) -> list[Part]:
    """Return what is run; nothing of it depends on pytest settings of whoever runs it, or on the folder he is in."""
    pytest = ("pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider")
    pytest += ("-c", str(scratch / "pytest.ini"), f"--rootdir={ROOT}", f"--confcutdir={ROOT}")
    cases = ("--tiny",) if tiny else ()
    benchmark = ("--benchmark-only", f"--results={out}", f"--seconds={seconds}", *cases)
    modules = {TESTS: (*pytest, str(GPU_TESTS))} if tests else {}
    for name in names:
        modules[name] = (
            (f"trifuse.benchmarks.reporting.{name}", f"--out={out}", f"--seconds={seconds * TOOLS[name]}", *cases)
            if name in TOOLS
            else (*pytest, str(FOLDER / f"bench_{name}.py"), *benchmark)
        )
    counted = (sys.executable, "-m", "trifuse.benchmarks.reporting.counted")
    return [
        Part(name, (*counted, str(count_of(scratch, name)), *module), GPU_SHARES.get(name, SHARE_OF_OTHERS))
        for name, module in modules.items()
    ]


def count_of(scratch: Path, name: str) -> Path:
    """Return where a part writes its launches down."""
    return scratch / f"{name.replace(' ', '_')}.launches.json"


def environment(scratch: Path, commit: str | None) -> dict[str, str]:
    """Return the environment in which this very copy is importable as trifuse, wherever it is installed or not."""
    (scratch / "trifuse").symlink_to(ROOT)
    (scratch / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n    slow: takes its time\n")
    project = ROOT / "pyproject.toml"
    if project.exists():  # not an installed copy: say what an installation would
        version = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
        metadata = scratch / f"trifuse-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trifuse\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text("[pytest11]\ntrifuse = trifuse.kernels.testing\n")
    # No options of another pytest, no interpreted kernels, and no working folder on the path: transformers would take
    # our `kernels` for a package of that name.
    unwanted = ("PYTEST_", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    path = os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return inherited | own | ({"TRIFUSE_COMMIT": commit} if commit else {})


def run_part(part: Part, limit_s: float | None, log: Path, scratch: Path, variables: dict[str, str]) -> Outcome:
    """Run one part into its log, and end it and whatever it started when its time is over."""
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            part.command, cwd=scratch, env=variables, stdout=stream, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = process.wait(limit_s)
        except BaseException as error:  # out of time, or stopped by hand
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = OUT_OF_TIME
    return Outcome(part, code if code >= 0 else 128 - code, time.monotonic() - start, limit_s)


def examined(outcome: Outcome, scratch: Path, written: Sequence[Path], kind: str = "cuda") -> Outcome:
    """Return an outcome with its launches, failed where plain PyTorch ran instead of kernels, or where it has no end.

    Of a part that was ended, each case in its result files was measured to its end; cases are missing.
    """
    path = count_of(scratch, outcome.part.name)
    counted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    fallbacks = counted["fallbacks"] if counted else {}
    refused = [f"{op} fell back to plain PyTorch on {reason}" for op, reason in fallbacks.items()]
    refused += [doubt for file in written if file.suffix == ".json" for doubt in doubts(file)]
    launches = sum(counted["kernels"].values()) if counted else None
    if outcome.part.name == TESTS and (launches == 0 or (launches is None and not outcome.code)):
        because = {
            "cuda": "not one Triton kernel was launched",
            "cpu": "torch sees no GPU here, all tests were skipped; run them on a machine with one",
        }
        refused.append(because[kind])
    whole = counted is not None and counted["ended"]
    if outcome.code == OUT_OF_TIME or (counted and not whole):
        how = f"out of time after {outcome.seconds:.0f} s" if outcome.code == OUT_OF_TIME else "ended in its midst"
        told = "nothing was counted" if launches is None else f"{launches} launches of our kernels until then"
        refused.append(f"{how}, so that cases are missing; {told}")
    code = outcome.code or (REFUSED if refused else 0)
    return replace(outcome, code=code, launches=launches, whole=whole, refused=refused)


def report(machine: dict[str, Any], outcomes: Sequence[Outcome], out: Path, written: Sequence[Path]) -> str:
    """Return the report as Markdown: the machine, how each part ended, why some failed, and every table."""
    facts = [[key.replace("_", " "), str(value)] for key, value in machine.items() if value is not None]
    ended = [
        [
            outcome.part.name,
            str(outcome.code),
            f"{outcome.seconds:.0f}",
            "" if outcome.limit_s is None else f"{outcome.limit_s:.0f}",
            launches_told(outcome),
        ]
        for outcome in outcomes
    ]
    lines = ["# Benchmarks of trifuse", "", *table(facts, ["machine", ""]), ""]
    lines += table(ended, ["part", "exit code", "seconds", "limit", "launches of our kernels"])
    lines += ["", *(f"* Refused: {outcome.part.name}: {why}." for outcome in outcomes for why in outcome.refused)]
    for outcome in outcomes:
        if outcome.code:
            said = log_of(out, outcome.part).read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
            lines += ["", f"## The end of what {outcome.part.name} said", "", "```", *said, "```"]
    for path in written:
        if text := text_of(path):
            lines += ["", f"## {path.stem}", "", text.rstrip()]
    return "\n".join(lines) + "\n"


def launches_told(outcome: Outcome) -> str:
    """Return how many kernels a part launched, in words where they were not counted to its end."""
    if outcome.launches is None:
        return "not counted"
    ended = "out of time" if outcome.code == OUT_OF_TIME else "ended"
    return str(outcome.launches) + ("" if outcome.whole else f", then {ended}")


def text_of(path: Path) -> str:
    """Return a result file as Markdown; nothing for one that has its tables in a file of their own."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    record = json.loads(text)
    return markdown(record) if "baseline" in record else ""


def results_in(out: Path) -> dict[Path, int]:
    """Return the result files of a folder, and when they were written."""
    found = [path for path in sorted(out.iterdir()) if path.suffix in (".json", ".md") and path.name != "report.md"]
    return {path: path.stat().st_mtime_ns for path in found}


def log_of(out: Path, part: Part) -> Path:
    """Return where a part's output goes."""
    return out / "logs" / f"{part.name.replace(' ', '_')}.log"


def machine_of(scratch: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Return what a process in that environment runs on."""
    command = [sys.executable, "-c", MACHINE]
    said = subprocess.run(command, cwd=scratch, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(said.stdout)


def run_parts(
    listed: Sequence[Part],
    machine: dict[str, Any],
    out: Path,
    scratch: Path,
    variables: dict[str, str],
    seconds: float | None,
) -> int:
    """Run the parts one after the other, bring the report up to date after each, and return the worst exit code.

    If there are so many ``seconds`` for all of them, each may take its share of those that are left.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    before = results_in(out)
    outcomes: list[Outcome] = []
    so_far = 0.0
    for index, part in enumerate(listed):
        print(f"{index + 1:3}/{len(listed)}  {part.name:24}", end="", flush=True)
        limit_s = None
        if seconds is not None:
            limit_s = (seconds - so_far) * part.share / sum(later.share for later in listed[index:])
        earlier = results_in(out)
        outcome = run_part(part, limit_s, log_of(out, part), scratch, variables)
        its_own = [path for path, when in results_in(out).items() if when != earlier.get(path)]
        outcome = examined(outcome, scratch, its_own, machine.get("kind", "cuda"))
        outcomes.append(outcome)
        so_far += outcome.seconds
        state = {0: "ok", OUT_OF_TIME: "out of time"}.get(outcome.code, f"exit code {outcome.code}")
        print(f"  {state:13}{outcome.seconds:5.0f} s  ({so_far:.0f} s so far)", flush=True)
        print(*(f"         refused: {why}\n" for why in outcome.refused), sep="", end="", flush=True)
        written = [path for path, when in results_in(out).items() if when != before.get(path)]
        (out / "report.md").write_text(report(machine, outcomes, out, written), encoding="utf-8")
    launches = sum(outcome.launches or 0 for outcome in outcomes)
    print(f"{launches} launches of our Triton kernels; report: {out / 'report.md'}")
    return max(outcome.code for outcome in outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.report", description="time every operator and network on this machine"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the report, the result files and the logs")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each form of a computation")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=sorted({*part_names(), *OPERATORS}), help="parts to run (all)"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--tiny", action="store_true", help="benchmark tiny cases alone, to see that everything runs")
    parser.add_argument("--tests", action="store_true", help="first run the tests that only a GPU can fail")
    options = parser.parse_args(argv)
    if options.tests and not GPU_TESTS.exists():
        parser.error("--tests needs the repository; an installed copy has no tests")
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="trifuse-bench-") as folder:
        scratch = Path(folder)
        variables = environment(scratch, options.commit)
        machine = machine_of(scratch, variables)
        names = list(dict.fromkeys(OPERATORS.get(name, name) for name in options.only or part_names()))
        listed = parts(names, out, scratch, options.seconds, tests=options.tests, tiny=options.tiny)
        seconds = GPU_SECONDS if machine["kind"] == "cuda" else None
        return run_parts(listed, machine, out, scratch, variables, seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the running part is ended, too
    sys.exit(main())
