"""Time and memory of a computation, measured so that two forms of it can be compared.

Torch is imported at the first use: `trifuse.kernels.testing`, which takes these tools, is loaded by every pytest.
"""

from __future__ import annotations

import ctypes
import statistics
import time
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
    changes = sorted(
        ((event.start_time_ns, event.typed[1].alloc_size) for event in _allocations(profile)),
        key=lambda change: change[0],
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def _allocations(profile: Any) -> Iterator[Any]:
    import torch

    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            yield event
        pending.extend(event.children)


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
) -> dict[str, Timing]:
    """Time several forms of one computation in turn, round after round, so that they share the machine's moods.

    On a GPU a sample is one call between two events, with a cold cache (a buffer twice the size of the L2 cache is
    written first) and one synchronisation at the very end. On a CPU it is as many calls as take a twentieth of a second
    by the wall clock, and it starts with a heap that was returned to the system: no candidate lives off memory that
    another has freed, as none would in a program of its own.

    Args:
        candidates: functions without arguments, by name; each is called a few times before the clock runs.
        device: where the candidates compute.
        seconds: time to spend on each candidate; slow ones still get ``least_rounds`` samples.
        least_rounds: fewest samples for each candidate.
    """
    import torch

    device = torch.device(device)
    take_sample = _gpu_sampler(device) if device.type == "cuda" else _cpu_sample
    peaks: dict[str, int] = {}
    once: dict[str, float] = {}
    for name, function in candidates.items():
        for _ in range(2):
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
    """Give what the heap holds free back to the system, where the C library can (glibc)."""
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
            return start.elapsed_time(stop) / 1e3

        return read

    return gpu_sample
