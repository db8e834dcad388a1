"""Time and memory of a computation, measured so that two forms of it can be compared.

Torch is imported at the first use: `trifuse.kernels.testing`, which takes these tools, is loaded by every pytest.
"""

from __future__ import annotations

import ctypes
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU_SAMPLE_SECONDS = 0.05  # a sample on a CPU is as many calls as take about this long
MOST_ROUNDS = 200


def peak_memory_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that a call held at any moment beyond what was held before it, its result included.

    On a CPU every allocation and release of PyTorch's allocator is followed exactly; memory that is not PyTorch's
    (scratch space inside oneDNN, NumPy arrays) is not seen. On a GPU it is the caching allocator's peak.
    """
    import torch

    from trifuse.kernels.torch_internals import allocations

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    changes = sorted(allocations(profile), key=lambda change: change[0])
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def saved_for_backward_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Return the bytes that autograd keeps between the forward and the backward pass of a call.

    Each storage counts once, and whole. Tensors among the arguments (also nested in lists and tuples) and parameters
    do not count: they are held anyway. What a function of one's own hides from ``ctx.save_for_backward`` is not seen.

    Args:
        function: returns a tensor, or a list or tuple of tensors.
        *arguments: of the function; those whose gradients are taken require them.
    """
    import torch

    saved: list[weakref.ref[torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()  # a result would hold the graph that holds it, for ever
        saved.append(weakref.ref(kept))
        return kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((arguments, list(_parameters_of(result))))}
    kept = [tensor.untyped_storage() for reference in saved if (tensor := reference()) is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept if storage.data_ptr() not in held}.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _parameters_of(result: Any) -> Iterator[torch.Tensor]:
    """Yield the leaves that the gradients of a result would accumulate in."""
    pending = [tensor.grad_fn for tensor in tensors_in(result)]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            pending.extend(following for following, _ in node.next_functions)


@dataclass(frozen=True)
class Timing:
    """How long one form of a computation takes, in seconds per call, one value per round, and its peak memory."""

    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def quintiles(self) -> tuple[float, float]:
        """The seconds per call below which a fifth and four fifths of the rounds lie."""
        cuts = statistics.quantiles(self.seconds, n=5, method="inclusive")
        return cuts[0], cuts[3]

    def speedup_over(self, other: Timing) -> float:
        """Return how many times faster this is: the median over rounds of the ratio within a round.

        Both were timed in turn in every round, so whatever slowed the machine for a while slowed both.
        """
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    least_rounds: int = 7,
    first_calls: int = 2,
) -> dict[str, Timing]:
    """Time several forms of one computation in turn, round after round, so that they share the machine's moods.

    On a GPU a sample is one call between two events, with a cold cache (a buffer twice the size of the L2 cache is
    written first) and one synchronisation at the very end. On a CPU it is as many calls as take a twentieth of a second
    by the wall clock, and it starts with a heap that was returned to the system: no candidate lives off memory that
    another has freed, as none would in a program of its own.

    Args:
        candidates: functions without arguments, by name; each is called ``first_calls`` times and twice more, for its
            memory and to plan with, before the clock runs.
        device: where the candidates compute.
        seconds: time to spend on each candidate; slow ones still get ``least_rounds`` samples.
        least_rounds: fewest samples for each candidate.
        first_calls: calls with which nothing is done.
    """
    import torch

    device = torch.device(device)
    take_sample = _gpu_sampler(device) if device.type == "cuda" else _cpu_sample
    peaks: dict[str, int] = {}
    once: dict[str, float] = {}
    for name, function in candidates.items():
        for _ in range(first_calls):
            function()
        peaks[name] = peak_memory_bytes(function, device)
        once[name] = _one_call(function, device)
    least_sample_s = 0.0 if device.type == "cuda" else CPU_SAMPLE_SECONDS
    sample_s = sum(max(once_s, least_sample_s) for once_s in once.values()) / len(once)
    rounds = max(least_rounds, min(MOST_ROUNDS, int(seconds / sample_s)))
    calls = {name: max(1, round(CPU_SAMPLE_SECONDS / once[name])) for name in candidates}
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            samples[name].append(take_sample(candidates[name], calls[name]))
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
    return {name: Timing(tuple(read() for read in samples[name]), peaks[name]) for name in candidates}


def _one_call(function: Callable[[], object], device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cpu_sample(function: Callable[[], object], calls: int) -> Callable[[], float]:
    _return_free_memory()
    function()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = (time.perf_counter() - start) / calls
    return lambda: elapsed


def _return_free_memory() -> None:
    """Return free memory of the heap to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _gpu_sampler(device: torch.device) -> Callable[[Callable[[], object], int], Callable[[], float]]:
    import torch

    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    evictor = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)

    def gpu_sample(function: Callable[[], object], calls: int) -> Callable[[], float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evictor.zero_()
        start.record()
        function()
        stop.record()

        def read() -> float:
            stop.synchronize()
            milliseconds: float = start.elapsed_time(stop)
            return milliseconds / 1e3

        return read

    return gpu_sample
