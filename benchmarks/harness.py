"""How everything here is timed: the same result first, then the time, side by side, with machine and commit.

A `Comparison` holds the forms of one computation (providers) against each other on named cases. For each case and pass
the results and gradients of every provider are compared with the truth, a wrong one is refused, and the sound ones are
timed in turn, round after round. pytest-benchmark shows the samples and `benchmarks/results` keeps the figures::

    pytest benchmarks/bench_weighted_block_fusion.py --benchmark-only

There is one measurement: pytest-benchmark is handed the samples by a clock that replays them, because it would time
one provider after the other, and a ratio between two moments of a shared machine says little.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trifuse.architectures.files import write_json
from trifuse.kernels.measuring import Timing, measure

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
# How far from the truth, relative to its norm, a result may be: a gate against wrong forms, not a test of precision.
RELATIVE_ERROR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DIFFERING_LABELS = 1e-3  # share of integer results, where two logits are as good as equal


class WrongResult(AssertionError):
    """A provider computed something else than the truth, so its time means nothing."""


@dataclass(frozen=True)
class Pass:
    """What of a computation is timed.

    Args:
        name: e.g. ``"forward"`` or ``"forward + backward"``.
        leaves: the tensors whose gradients are taken, given the arguments; none for a pass without gradients.
        least_bytes: the bytes that any form must read and write, given the arguments; None where it has no meaning.
    """

    name: str
    leaves: Callable[..., Sequence[Tensor]] = lambda *arguments: ()
    least_bytes: Callable[..., int] | None = None


@dataclass(frozen=True)
class Case:
    """Arguments to time with, named after the network and the stage that they come from.

    Args:
        name: the name.
        arguments: makes the arguments on a device, the same ones every time.
        devices: kinds of devices, ``"cpu"`` and ``"cuda"``, on which the case is worth its time.
    """

    name: str
    arguments: Callable[[torch.device], tuple[Any, ...]]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass
class Comparison:
    """The providers of one computation, the passes, and the cases.

    Args:
        name: name of the result file.
        cases: what to time with.
        passes: what to time.
        providers: forms of the computation by name, called with a case's arguments; the first one is the baseline.
        truth: an obvious form; it is given the arguments in float64 unless ``exact`` is False.
        missing: reasons why providers cannot run here, by name.
        exact: whether the truth is computed in float64.
        depth: how many layers multiply the rounding of one another: a factor on the allowed error.
    """

    name: str
    cases: Sequence[Case]
    passes: Sequence[Pass]
    providers: Mapping[str, Callable[..., Any]]
    truth: Callable[..., Any]
    missing: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    depth: float = 1.0

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._measured: dict[tuple[str, str], dict[str, Timing | Exception]] = {}

    @property
    def baseline(self) -> str:
        """Name of the provider that the others are compared with."""
        return next(iter(self.providers))

    def parametrize(self) -> pytest.MarkDecorator:
        """Parametrize a test over the cases that are worth their time on this device, the passes and the providers."""
        kind = default_device().type
        cases = [case for case in self.cases if kind in case.devices]
        grid = [(case, timed, name) for case in cases for timed in self.passes for name in self.providers]
        ids = ["-".join((case.name, timed.name, name)).replace(" ", "_") for case, timed, name in grid]
        return pytest.mark.parametrize(("case", "timed", "provider"), grid, ids=ids)

    def timing(self, case: Case, timed: Pass, provider: str, *, seconds: float) -> Timing:
        """Return a provider's timing; the first call for a case and pass judges and times all providers together.

        Raises:
            WrongResult: the provider's result, or one of its gradients, is not the truth.
            LookupError: the provider cannot run here.
        """
        if provider in self.missing:
            raise LookupError(self.missing[provider])
        key = (case.name, timed.name)
        if key not in self._measured:
            self._measured[key] = self._measure(case, timed, seconds)
        outcome = self._measured[key][provider]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _measure(self, case: Case, timed: Pass, seconds: float) -> dict[str, Timing | Exception]:
        device = default_device()
        torch.compiler.reset()  # or a compiled form meets the limit of recompilations, and silently runs as it was
        arguments = case.arguments(device)
        leaves = list(timed.leaves(*arguments))
        for leaf in leaves:
            leaf.requires_grad_(True)
        outcomes: dict[str, Timing | Exception] = {}
        sound: dict[str, Callable[[], object]] = {}
        expected = self._expected(timed, arguments, leaves)
        for name, function in self.providers.items():
            if name not in self.missing:
                run = _runner(function, arguments, leaves)
                try:
                    judge(name, run(), expected, self.depth)
                    sound[name] = run
                except WrongResult as error:
                    outcomes[name] = error
        timings = measure(sound, device=device, seconds=seconds)
        outcomes.update(timings)
        least_bytes = timed.least_bytes(*arguments) if timed.least_bytes else None
        for name, timing in timings.items():
            row = _row(timing, timings.get(self.baseline), least_bytes)
            self.rows.append({"case": case.name, "pass": timed.name, "provider": name, **row})
        return outcomes

    def _expected(self, timed: Pass, arguments: tuple[Any, ...], leaves: Sequence[Tensor]) -> list[Tensor]:
        if not self.exact:
            return _runner(self.truth, arguments, leaves)()
        twins = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
        return _runner(self.truth, _exact(arguments, twins), [twins[id(leaf)] for leaf in leaves])()

    def write(self, folder: Path) -> Path | None:
        """Write the measured rows with the machine's stamp; returns the file, or None if nothing was measured."""
        if not self.rows:
            return None
        device = default_device()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.{device.type}.json"
        record = {"benchmark": self.name, "baseline": self.baseline, "stamp": stamp(device), "rows": self.rows}
        write_json(path, record)
        return path


def judge(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], depth: float = 1.0) -> None:
    """Refuse a result that is not the truth; both are the output followed by the gradients.

    Raises:
        WrongResult: naming the provider, which tensor differs, and by how much.
    """
    if len(got) != len(expected):
        raise WrongResult(f"{name}: expected {len(expected)} tensors, got {len(got)}")
    for index, (mine, truth) in enumerate(zip(got, expected, strict=True)):
        what = f"{name}: {'the result' if index == 0 else f'gradient {index - 1}'}"
        if mine.shape != truth.shape:
            raise WrongResult(f"{what} has shape {tuple(mine.shape)}, expected {tuple(truth.shape)}")
        if not mine.is_floating_point():
            error, allowed = (mine != truth).double().mean().item(), DIFFERING_LABELS
        else:
            scale = truth.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
            error, allowed = (
                ((mine.double() - truth.double()).norm() / scale).item(),
                depth * RELATIVE_ERROR[mine.dtype],
            )
        if not error <= allowed:
            raise WrongResult(f"{what} differs from the truth by {error:.2g} (relative), allowed {allowed:.2g}")


def replay(benchmark: Any, timing: Timing) -> None:
    """Hand the samples of a timing to pytest-benchmark's ``benchmark`` fixture, whose timer must be `clock`."""
    remaining = iter(timing.seconds)
    benchmark.extra_info["peak_mib"] = round(timing.peak_bytes / MIB, 2)
    benchmark.pedantic(lambda: clock.advance(next(remaining)), rounds=len(timing.seconds))


class _ReplayClock:
    """A timer that stands still except when it is told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


clock = _ReplayClock()


def default_device() -> torch.device:
    """Return the device that benchmarks run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stamp(device: torch.device) -> dict[str, Any]:
    """Describe what a figure was measured on, so that nobody compares it with one from elsewhere."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": round(copy_bandwidth(device), 1),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def copy_bandwidth(device: torch.device) -> float:
    """Measure how fast memory is copied, in GB/s read plus written: the roof under which fused kernels live."""
    elements = (256 if device.type == "cuda" else 64) * MIB // 4
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    seconds = measure({"copy": lambda: target.copy_(source)}, device=device, seconds=0.5)["copy"].median
    return 2 * source.nbytes / seconds / 1e9


def _runner(function: Callable[..., Any], arguments: tuple[Any, ...], leaves: Sequence[Tensor]) -> Callable[[], list]:
    """Return a function that computes the result and the gradients of ``leaves`` of its sum."""
    if not leaves:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function(*arguments)]

        return forward
    grad: list[Tensor] = []

    def forward_and_backward() -> list[Tensor]:
        result = function(*arguments)
        if not grad:
            generator = torch.Generator().manual_seed(1)
            grad.append(torch.randn(result.shape, generator=generator).to(result))
        return [result.detach(), *torch.autograd.grad(result, leaves, grad[0])]

    return forward_and_backward


def _exact(value: Any, twins: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return twins.get(id(value), value.detach().double() if value.is_floating_point() else value)
    if isinstance(value, (list, tuple)):
        return type(value)(_exact(item, twins) for item in value)
    return value


def _row(timing: Timing, baseline: Timing | None, least_bytes: int | None) -> dict[str, Any]:
    low, high = timing.quintiles
    return {
        "median_ms": round(timing.median * 1e3, 4),
        "fifth_ms": round(low * 1e3, 4),
        "four_fifths_ms": round(high * 1e3, 4),
        "rounds": len(timing.seconds),
        "speedup": round(timing.speedup_over(baseline), 3) if baseline else None,
        "peak_mib": round(timing.peak_bytes / MIB, 2),
        "gb_per_s": round(least_bytes / timing.median / 1e9, 1) if least_bytes else None,
    }


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        yield from path.read_text().splitlines()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit that is measured: what TRIFUSE_COMMIT says, or what git says."""
    if "TRIFUSE_COMMIT" in os.environ:
        return os.environ["TRIFUSE_COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
