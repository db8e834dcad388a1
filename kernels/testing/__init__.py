"""What you need to test and time your own operators, the same tools that test the ones in `trifuse.kernels`.

* `tensors`: a hypothesis strategy for tensors of any shape, type and memory layout.
* `assert_op_matches`: hold an operator and each of its gradients against a reference in plain PyTorch.
* `launches`: which kernels of trifuse a computation launched, and which operators ran in plain PyTorch instead.
* `virtual_gpu`, also a pytest fixture: run compiled Triton kernels on CPU tensors, with every access to memory checked;
  its errors `KernelFaults` (with each `Finding`) and `UnsupportedInstruction`.
* `poisoned_empty`: make memory that an operator forgets to write visible.
* `peak_memory_bytes`: the most memory that a call holds.
* `saved_for_backward_bytes`: what autograd keeps of a call until its backward pass.
* `measure`, also the pytest fixture ``gpu_benchmark``: time several forms of one computation side by side.
* `compare`: hold several forms against each other in one call: equal results and gradients first, then time and memory.
* `Case`, `Pass`, `Comparison`, `clock`, `replay`: the same as a file of cases for pytest-benchmark.

pytest finds the fixtures by itself (an entry point); torch and hypothesis are imported when they are first used.

For example:

    @given(tensors(st.tuples(st.integers(0, 5), st.just(8)), dtypes=(torch.float32, torch.bfloat16)))
    def test_my_norm(x):
        assert_op_matches(my_norm, my_norm_reference, x)

    def test_my_norm_is_faster(gpu_benchmark):
        timings = gpu_benchmark({"eager": lambda: my_norm_reference(x), "fused": lambda: my_norm(x)})
        assert timings["fused"].speedup_over(timings["eager"]) > 2

    print(compare("my norm", {"eager": my_norm_reference, "fused": my_norm}, x, least_bytes=2 * x.nbytes))

    NORM = Comparison("my_norm", cases=[Case("stage 1", lambda device: (torch.ones(64, 96, device=device),))], ...)

    @pytest.mark.benchmark(timer=clock)
    @NORM.parametrize()
    def test_my_norm_side_by_side(benchmark, case, timed, provider):
        replay(benchmark, NORM.timing(case, timed, provider, seconds=1))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .benchmarking import clock, gpu_benchmark, replay
from .fixtures import pytest_runtest_call as pytest_runtest_call
from .fixtures import virtual_gpu_fixture
from .measuring import Timing, measure, peak_memory_bytes, saved_for_backward_bytes

if TYPE_CHECKING:
    from .assertions import assert_op_matches
    from .comparing import Case, Comparison, Pass, WrongResult, compare
    from .counting import Launches, NoKernelRan, launches
    from .emulator import Finding, KernelFaults, UnsupportedInstruction, virtual_gpu
    from .poisoned_memory import poisoned_empty
    from .strategies import tensors

__all__ = [
    "Case",
    "Comparison",
    "Finding",
    "KernelFaults",
    "Launches",
    "NoKernelRan",
    "Pass",
    "Timing",
    "UnsupportedInstruction",
    "WrongResult",
    "assert_op_matches",
    "clock",
    "compare",
    "gpu_benchmark",
    "launches",
    "measure",
    "peak_memory_bytes",
    "poisoned_empty",
    "replay",
    "saved_for_backward_bytes",
    "tensors",
    "virtual_gpu",
    "virtual_gpu_fixture",
]

# These need torch or hypothesis, which no pytest that only finds this plugin shall pay for.
_LAZY = {
    "assert_op_matches": "assertions",
    "poisoned_empty": "poisoned_memory",
    "tensors": "strategies",
    **dict.fromkeys(("Launches", "NoKernelRan", "launches"), "counting"),
    **dict.fromkeys(("Finding", "KernelFaults", "UnsupportedInstruction", "virtual_gpu"), "emulator"),
    **dict.fromkeys(("Case", "Comparison", "Pass", "WrongResult", "compare"), "comparing"),
}


if not TYPE_CHECKING:  # to a type checker, a module with this function has every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __package__), name)
        return value
