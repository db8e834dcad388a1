"""How every form of a computation is timed: the same result first, then the time, side by side, machine and commit.

A `Comparison` holds the forms of one computation (providers) against each other on named cases. For each case and pass
the results and gradients of every provider are compared with the truth, a wrong one is refused, and the sound ones are
timed in turn, round after round, our own kernels in the form that is the fastest on this GPU. There the Triton backend
is forced, and a form of ours that launches no kernel is refused. `compare` does all of it in one call.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trifuse.kernels import warm_up

from .counting import NoKernelRan, kernels_forced, launches_of
from .machine import MIB, default_device, share_of_ceiling, stamp
from .measuring import Timing, measure, saved_for_backward_bytes, tensors_in
from .tables import markdown

if TYPE_CHECKING:
    import pytest

# How far from the truth, relative to its norm, a result may be: a gate against wrong forms, not a test of precision.
RELATIVE_ERROR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
OURS = "trifuse"  # stands in the name of every form of ours
TINY = "tiny"  # the device of cases that show only that everything runs
FEWEST = {"least_rounds": 2, "first_calls": 0}  # of those; two rounds have quintiles
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
        flops: the floating-point operations of the computation, a multiply-add counted as two, given the arguments.
        joined: judge all gradients as one vector, as a network's: where a normalisation takes a bias away again, its
            gradient is nothing but rounding.
    """

    name: str
    leaves: Callable[..., Sequence[Tensor]] = lambda *arguments: ()
    least_bytes: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    joined: bool = False


@dataclass(frozen=True)
class Case:
    """Arguments to time with, named after the network and the stage that they come from.

    Args:
        name: the name.
        arguments: makes the arguments on a device, the same ones every time.
        devices: kinds of devices, ``"cpu"`` and ``"cuda"``, on which the case is worth its time, or `TINY`.
    """

    name: str
    arguments: Callable[[torch.device], tuple[Any, ...]]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass
class Comparison:
    """The providers of one computation, the passes, and the cases; printed, it is its tables in Markdown.

    Args:
        name: name of the result file.
        cases: what to time with.
        passes: what to time.
        providers: forms of the computation by name, called with a case's arguments, each returning a tensor, or a list
            or tuple of tensors; the first one is the baseline.
        truth: an obvious form; it is given the arguments in float64 unless ``exact`` is False.
        missing: reasons why providers cannot run here, by name.
        exact: whether the truth is computed in float64.
        depth: how many layers multiply the rounding of one another: a factor on the allowed error.
        kernels: whether providers whose name says trifuse have Triton kernels of ours. On a GPU all of a case then runs
            with the Triton backend forced, and such a provider is refused unless it launches kernels.
        device: where to compute; on the GPU where there is one if not given.

    Attributes:
        rows: what was measured, one dictionary for each case, pass and provider: times in ms, memory in MiB, GB/s and
            GFLOP/s where the pass tells its bytes and operations, and the larger share of the machine's own ceilings;
            for a provider whose name says trifuse how many Triton kernels a call launches, and its backend.
        refused: providers that failed or were wrong, with their case, pass and reason.
    """

    name: str
    cases: Sequence[Case]
    passes: Sequence[Pass]
    providers: Mapping[str, Callable[..., Any]]
    truth: Callable[..., Any]
    missing: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    depth: float = 1.0
    kernels: bool = True
    device: torch.device = field(default_factory=default_device)

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.refused: list[dict[str, str]] = []
        self._measured: dict[tuple[str, str], dict[str, Timing | Exception]] = {}

    @property
    def baseline(self) -> str:
        """Name of the provider that the others are compared with."""
        return next(iter(self.providers))

    def parametrize(self) -> pytest.MarkDecorator:
        """Parametrize a test over the cases that are worth their time on this device, or tiny, passes and providers."""
        import pytest

        cases = [case for case in self.cases if self.device.type in case.devices or TINY in case.devices]
        grid = [(case, timed, name) for case in cases for timed in self.passes for name in self.providers]
        ids = ["-".join((case.name, timed.name, name)).replace(" ", "_") for case, timed, name in grid]
        return pytest.mark.parametrize(("case", "timed", "provider"), grid, ids=ids)

    def timing(self, case: Case, timed: Pass, provider: str, *, seconds: float) -> Timing:
        """Return a provider's timing; the first call for a case and pass judges and times all providers together.

        Raises:
            WrongResult: the provider's result, or one of its gradients, is not the truth.
            NoKernelRan: a provider of ours ran in plain PyTorch on a GPU.
            LookupError: the provider cannot run here.
            Exception: what the provider itself raised when it was called.
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
        torch.compiler.reset()  # or a compiled form meets the limit of recompilations, and silently runs as it was
        arguments = case.arguments(self.device)
        leaves = list(timed.leaves(*arguments))
        for leaf in leaves:
            leaf.requires_grad_(True)
        expected, outputs = self._expected(timed, arguments, leaves)
        expected = _judged(timed, expected, outputs)
        outcomes: dict[str, Timing | Exception] = {}
        sound: dict[str, Callable[[], object]] = {}
        facts: dict[str, dict[str, Any]] = {}
        with self._forced():
            for name, function in self.providers.items():
                if name in self.missing:
                    continue
                run = _runner(function, arguments, leaves)
                try:  # whatever a form does wrong, the others are timed
                    judge(name, _judged(timed, warm_up(run), outputs), expected, self.depth, outputs=outputs)
                    saved_mib = saved_for_backward_bytes(function, *arguments) / MIB if leaves else None
                    facts[name] = {"saved_mib": _rounded(saved_mib), **self._launches(name, run)}
                    sound[name] = run
                except Exception as error:
                    outcomes[name] = error
                    known = isinstance(error, WrongResult | NoKernelRan)
                    reason = str(error) if known else f"{name}: {type(error).__name__}: {error}"
                    self.refused.append({"case": case.name, "pass": timed.name, "provider": name, "reason": reason})
            few = FEWEST if TINY in case.devices else {}
            timings = measure(sound, device=self.device, seconds=seconds, **few) if sound else {}
        dtype = next((tensor.dtype for tensor in tensors_in(arguments) if tensor.is_floating_point()), torch.float32)
        for name, timing in timings.items():
            row = _row(timing, timings.get(self.baseline)) | facts[name]
            row |= self._rates(timed, arguments, timing, dtype)
            self.rows.append({"case": case.name, "pass": timed.name, "provider": name, **row})
        return {**outcomes, **timings}

    def _forced(self) -> AbstractContextManager[None]:
        ours = self.kernels and any(OURS in name for name in self.providers)
        return kernels_forced(self.device) if ours else nullcontext()

    def _launches(self, name: str, run: Callable[[], object]) -> dict[str, Any]:
        if OURS not in name:
            return {"launches": None, "backend": None}
        count = launches_of(name, run, self.device, expected=self.kernels)
        return {"launches": count, "backend": "triton" if count else "torch"}

    def _expected(self, timed: Pass, arguments: tuple[Any, ...], leaves: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """Return the true result followed by the true gradients, and how many tensors the result has."""
        if self.exact:
            twins = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
            arguments, leaves = _exact(arguments, twins), [twins[id(leaf)] for leaf in leaves]
        expected = _runner(self.truth, arguments, leaves)()
        return expected, len(expected) - len(leaves)

    def _rates(
        self, timed: Pass, arguments: tuple[Any, ...], timing: Timing, dtype: torch.dtype
    ) -> dict[str, float | None]:
        work = (timed.least_bytes, timed.flops)
        gb_per_s, gflop_per_s = (count(*arguments) / timing.median / 1e9 if count else None for count in work)
        share = share_of_ceiling(self.device, dtype, gb_per_s, gflop_per_s)
        rates = {"gb_per_s": gb_per_s, "gflop_per_s": gflop_per_s, "of_ceiling": share}
        return {name: _rounded(rate) for name, rate in rates.items()}

    def record(self) -> dict[str, Any]:
        """Return everything that a result file holds: rows, refusals, absent providers, and the machine's stamp."""
        return {
            "benchmark": self.name,
            "baseline": self.baseline,
            "kernels": self.kernels,
            "stamp": stamp(self.device),
            "absent": dict(self.missing),
            "refused": self.refused,
            "rows": self.rows,
        }

    def write(self, folder: Path | str) -> Path | None:
        """Write the record so far as ``<name>.<kind of device>.json``, whole or not at all.

        Returns:
            The file, or None if nothing was measured.
        """
        if not self._measured:
            return None
        path = Path(folder) / f"{self.name.replace(' ', '_')}.{self.device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps(self.record(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
        return path

    def __str__(self) -> str:
        return markdown(self.record())


def compare(
    name: str,
    providers: Mapping[str, Callable[..., Any]],
    *arguments: Any,
    truth: Callable[..., Any] | None = None,
    least_bytes: int | None = None,
    flops: int | None = None,
    kernels: bool = True,
    seconds: float = 0.5,
) -> Comparison:
    """Hold several forms of one computation against each other: equal results first, then time and memory.

    The forward pass is timed without gradients; if a tensor among the arguments requires its gradient, forward and
    backward together are timed, too. Every form must agree with the truth within rounding, gradients included.

    Args:
        name: what is computed; the name of the result file and of the tables.
        providers: the forms by name, each called with the arguments; the first is what the others are compared with.
        *arguments: arguments of every form; tensors, on one device, may be nested in lists and tuples.
        truth: an obvious form that runs in float64; the first provider if not given.
        least_bytes: bytes that any form must read and write in the forward pass, for GB/s.
        flops: floating-point operations of the forward pass, a multiply-add counted as two, for GFLOP/s.
        kernels: on a GPU, refuse a form whose name says trifuse unless it launches Triton kernels of ours.
        seconds: time to spend on each form in each pass.

    Returns:
        The comparison: print it for tables in Markdown, read its ``rows``, or call ``write(folder)`` for JSON.

    Raises:
        WrongResult: a form's result, or one of its gradients, is not the truth.
        NoKernelRan: a form of ours ran in plain PyTorch on a GPU.
        Exception: what a form itself raised when it was called.
    """
    tensors = list(tensors_in(arguments))
    moved = None if least_bytes is None else lambda *_: least_bytes
    computed = None if flops is None else lambda *_: flops
    passes = [Pass("forward", least_bytes=moved, flops=computed)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if leaves:
        passes.append(Pass("forward + backward", leaves=lambda *_: leaves))
    comparison = Comparison(
        name=name,
        cases=[Case(f"{name}, {_described(tensors)}", lambda device: arguments)],
        passes=passes,
        providers=providers,
        truth=truth or next(iter(providers.values())),
        kernels=kernels,
        device=tensors[0].device if tensors else default_device(),
    )
    for timed in passes:
        for provider in providers:
            comparison.timing(comparison.cases[0], timed, provider, seconds=seconds)
    return comparison


def judge(
    name: str, got: Sequence[Tensor], expected: Sequence[Tensor], depth: float = 1.0, *, outputs: int = 1
) -> None:
    """Refuse a result that is not the truth; both are the outputs, ``outputs`` in number, followed by the gradients.

    A gradient of float32 that a form of others takes through results of bfloat16 is judged as bfloat16; not so of ours.

    Raises:
        WrongResult: naming the provider, which tensor differs, and by how much.
    """
    if len(got) != len(expected):
        raise WrongResult(f"{name}: expected {len(expected)} tensors, got {len(got)}")
    for index, (mine, truth) in enumerate(zip(got, expected, strict=True)):
        result = "the result" if outputs == 1 else f"result {index}"
        what = f"{name}: {result if index < outputs else f'gradient {index - outputs}'}"
        if mine.shape != truth.shape:
            raise WrongResult(f"{what} has shape {tuple(mine.shape)}, expected {tuple(truth.shape)}")
        if not mine.is_floating_point():
            error, allowed = (mine != truth).double().mean().item(), DIFFERING_LABELS
        else:
            scale = truth.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
            error = ((mine.double() - truth.double()).norm() / scale).item()
            through = got[:outputs] if index >= outputs and OURS not in name else ()
            kinds = [tensor.dtype for tensor in (mine, *through) if tensor.is_floating_point()]
            allowed = depth * max(RELATIVE_ERROR[kind] for kind in kinds)
        if not error <= allowed:
            raise WrongResult(f"{what} differs from the truth by {error:.2g} (relative), allowed {allowed:.2g}")


def _runner(
    function: Callable[..., Any], arguments: tuple[Any, ...], leaves: Sequence[Tensor]
) -> Callable[[], list[Tensor]]:
    """Return a function of the results and, for random incoming gradients that any type holds, those of ``leaves``."""
    if not leaves:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _results(function(*arguments))

        return forward
    incoming: list[Tensor] = []

    def forward_and_backward() -> list[Tensor]:
        results = _results(function(*arguments))
        reached = [result for result in results if result.requires_grad]
        if not incoming:
            generator = torch.Generator().manual_seed(1)
            drawn = [torch.randn(result.shape, generator=generator).bfloat16() for result in reached]
            incoming.extend(gradient.to(result) for gradient, result in zip(drawn, reached, strict=True))
        return [*(result.detach() for result in results), *torch.autograd.grad(reached, leaves, incoming)]

    return forward_and_backward


def _judged(timed: Pass, tensors: list[Tensor], outputs: int) -> list[Tensor]:
    """Return results and gradients as a pass judges them."""
    if not timed.joined:
        return tensors
    return [*tensors[:outputs], torch.cat([gradient.flatten() for gradient in tensors[outputs:]])]


def _results(value: Any) -> list[Tensor]:
    results = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in results:
        if not isinstance(item, Tensor):
            raise TypeError(f"expected a tensor, or a list or tuple of tensors, got a {type(item).__name__}")
    return results


def _exact(value: Any, twins: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return twins.get(id(value), value.detach().double() if value.is_floating_point() else value)
    if isinstance(value, (list, tuple)):
        return type(value)(_exact(item, twins) for item in value)
    return value


def _described(tensors: Iterable[Tensor]) -> str:
    """Return shapes and types in a line, equal ones counted: ``12x(2,1025,768) float32, (12) float32``."""
    kinds = Counter(f"({','.join(map(str, t.shape))}) {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    return ", ".join(f"{count}x{kind}" if count > 1 else kind for kind, count in kinds.items())


def _row(timing: Timing, baseline: Timing | None) -> dict[str, Any]:
    low, high = timing.quintiles
    return {
        "median_ms": _rounded(timing.median * 1e3),
        "fifth_ms": _rounded(low * 1e3),
        "four_fifths_ms": _rounded(high * 1e3),
        "rounds": len(timing.seconds),
        "speedup": _rounded(timing.speedup_over(baseline)) if baseline else None,
        "peak_mib": _rounded(timing.peak_bytes / MIB),
    }


def _rounded(value: float | None) -> float | None:
    """Return a number to four digits that count."""
    return None if value is None else float(f"{value:.4g}")
