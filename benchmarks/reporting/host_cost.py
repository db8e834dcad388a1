"""What a call costs the host apart from the launch itself, and how many kernels it launches.

Time: on a CPU the Triton backend is forced, and launches are replaced by nothing; what is left of a call on tiny
tensors is checks, dispatch, autograd's bookkeeping and the allocation of results. It is taken as the processor time of
the one thread, in bursts; the median and the quintiles of the bursts are kept. The yardsticks are a multiplication, an
autograd function that does nothing, and the same as a custom operator of PyTorch's.

Launches: of ours, each call of `trifuse.kernels.gpu.launching.launch`, and each of PyTorch's operators around them that
computes something; of what people write without us, each of PyTorch's operators that computes something. A GPU would be
asked to launch at least one kernel for each.

Both need Triton's interpreter, which has to be chosen before triton is loaded: the command starts a second process
in which it is::

    python -m trifuse.benchmarks.reporting.host_cost --out FOLDER [--seconds 0.5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trifuse import kernels
from trifuse.benchmarks.baselines.batch_norm_activation import norm_then_rectifier as batch_norm_then_rectifier
from trifuse.benchmarks.baselines.depthwise_multi_kernel import separate_convolutions
from trifuse.benchmarks.baselines.dice_ce_loss import foreground_dice_and_cross_entropy
from trifuse.benchmarks.baselines.dilated_attention import unfold_attention
from trifuse.benchmarks.baselines.gates import broadcast_channel_gate, broadcast_spatial_gate
from trifuse.benchmarks.baselines.instance_norm_leaky_relu import norm_then_rectifier
from trifuse.benchmarks.baselines.monte_carlo_pool import shuffled_adaptive_pool
from trifuse.benchmarks.baselines.mutation_loss import separate_losses
from trifuse.benchmarks.baselines.residual_layer_norm import add_then_norm
from trifuse.benchmarks.baselines.segment_film_gate import segment_film_by_the_equations
from trifuse.benchmarks.baselines.temporal_film_gate import film_by_the_equations
from trifuse.benchmarks.baselines.weighted_block_fusion import stack_einsum
from trifuse.kernels import library
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention
from trifuse.kernels.testing.machine import stamp
from trifuse.kernels.testing.measuring import tensors_in
from trifuse.kernels.testing.tables import table
from trifuse.kernels.torch_internals import TorchDispatchMode, call_cpu_kernel

MOST_ROUNDS, CALLS_PER_BURST = 40, 50
FORWARD, WITH_GRADIENTS, BACKWARD = "forward, no gradients", "forward, with gradients", "forward + backward"
# What a GPU does without a kernel: views, allocations, and questions about a tensor.
WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"}

Call = Callable[[], Tensor]
Form = Callable[..., Tensor]


def arguments_of(name: str, *, grad: bool) -> tuple[Any, ...]:
    """Return tiny arguments for an operator, floating-point tensors requiring gradients or not."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    x = random(1, 8, 4, 4)
    return {
        "weighted_block_fusion": lambda: ([random(1, 2, 8).requires_grad_(False) for _ in range(12)], random(12)),
        "dilated_attention": lambda: (random(1, 4, 4, 3 * 24),),
        "channel_gate": lambda: (x, random(1, 8)),
        "spatial_gate": lambda: (x, random(1, 1, 4, 4)),
        "temporal_film_gate": lambda: (x, random(1, 8), random(1, 2), random(1, 8), random(1, 8)),
        "segment_film_gate": lambda: (
            x,
            torch.ones(1, 4, 4, dtype=torch.uint8),
            *(random(*shape) for shape in ((1, 8), (1, 17), (8,), (1, 2), (1, 8), (1, 8))),
        ),
        "batch_norm_activation": lambda: (x, None, None, random(8), random(8)),
        "instance_norm_leaky_relu": lambda: (x, random(8), random(8)),
        "residual_layer_norm": lambda: (random(1, 4, 8), random(1, 4, 8), *(random(8) for _ in range(3))),
        "mutation_loss": lambda: ([random(1, 4, 4, 4) for _ in range(3)], torch.zeros(1, 4, 4, dtype=torch.int64)),
        "dice_ce_loss": lambda: (random(1, 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)),
        "depthwise_multi_kernel": lambda: (x, [random(8, 1, 5, 5), random(8, 1, 7, 7)]),
        "monte_carlo_pool": lambda: (x, 2, 1, torch.randperm(16, generator=generator)),
        "upsample_argmax": lambda: ([random(1, 4, side, side) for side in (2, 3)], (4, 4)),
    }[name]()


def attend_packed(qkv: Tensor) -> Tensor:
    """Attend with three heads, one for each dilation."""
    return packed_dilated_attention(qkv, num_heads=3)


def unfold_packed(qkv: Tensor) -> Tensor:
    """Attend as the published form does."""
    return unfold_attention(*qkv.chunk(3, dim=-1), num_heads=3)


def pool(x: Tensor, scale: int, cell: int, permutation: Tensor) -> Tensor:
    """Pool one cell."""
    return kernels.monte_carlo_pool(x, scale=scale, cell=cell, permutation=permutation)


def labels(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Upsample, add up, and take the largest: as people write it."""
    return sum(torch.nn.functional.interpolate(m, size, mode="bilinear") for m in logits).argmax(dim=1)


def normalised(form: Callable[..., tuple[Tensor, Tensor]]) -> Form:
    """Return a form of the residual sum and its layer norm that returns the second result alone."""
    return lambda *tensors: form(*tensors[:4], layer_scale=tensors[4])[1]


# Every operator with kernels, and what people write without it.
FORMS: dict[str, tuple[Form, Form]] = {
    "weighted_block_fusion": (kernels.weighted_block_fusion, stack_einsum),
    "dilated_attention": (attend_packed, unfold_packed),
    "channel_gate": (kernels.channel_gate, broadcast_channel_gate),
    "spatial_gate": (kernels.spatial_gate, broadcast_spatial_gate),
    "temporal_film_gate": (kernels.temporal_film_gate, film_by_the_equations),
    "segment_film_gate": (kernels.segment_film_gate, segment_film_by_the_equations),
    "batch_norm_activation": (kernels.batch_norm_activation, batch_norm_then_rectifier),
    "instance_norm_leaky_relu": (kernels.instance_norm_leaky_relu, norm_then_rectifier),
    "residual_layer_norm": (normalised(kernels.residual_layer_norm), normalised(add_then_norm)),
    "depthwise_multi_kernel": (kernels.depthwise_multi_kernel, separate_convolutions),
    "monte_carlo_pool": (pool, shuffled_adaptive_pool),
    "mutation_loss": (kernels.mutation_loss, separate_losses),
    "dice_ce_loss": (
        partial(kernels.dice_ce_loss, flavour="nnunet"),
        foreground_dice_and_cross_entropy,
    ),
    "upsample_argmax": (kernels.upsample_argmax, labels),
}


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def yardsticks() -> dict[str, Form]:
    """Return what dispatch costs in PyTorch itself: three ways to an elementwise operator."""
    schema = "(Tensor x) -> Tensor"
    nothing = torch.library.custom_op("trifuse_yardstick::nothing", torch.empty_like, mutates_args=(), schema=schema)
    nothing.register_autograd(lambda ctx, grad: torch.empty_like(grad))
    return {"torch.mul": lambda x: torch.mul(x, x), "autograd.Function": _Nothing.apply, "custom_op": nothing}


def _true(_: Sequence[Tensor]) -> bool:
    return True  # quickly, as what stands in for a device's answer: a mock would take as long as an allocation


@contextmanager
def as_on_a_gpu(launch: Callable[..., None]) -> Iterator[None]:
    """Force the Triton backend, as if made for a CPU, have ``launch`` called at each launch, and no value looked at."""
    with (
        kernels.backend("triton"),
        library.compiled_on_cpu(),
        mock.patch("trifuse.kernels.gpu.launching.launch", launch),
        mock.patch("trifuse.kernels.library.without_values", _true),
    ):
        yield


def calls(form: Form, arguments: Callable[[bool], tuple[Any, ...]]) -> dict[str, Call]:
    """Return a call of a form for each pass that it has."""
    plain, trained = arguments(False), arguments(True)
    leaves = [tensor for tensor in tensors_in(trained) if tensor.requires_grad]
    found: dict[str, Call] = {FORWARD: partial(form, *plain)}
    result = form(*trained)
    if result.requires_grad:
        incoming = torch.ones_like(result)
        found[WITH_GRADIENTS] = partial(form, *trained)
        found[BACKWARD] = lambda: torch.autograd.grad(form(*trained), leaves, incoming)
    return found


# ------------------------------------------------------------------------------------------------------ launches


class _KernelCount(TorchDispatchMode):
    """Counts PyTorch's operators that compute something, those inside of our own operators, too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "trifuse":
            with self:
                return call_cpu_kernel(func, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in WITHOUT_KERNEL and not (func.is_view and _is_of(result, args)):
            self.operators[name] += 1
        return result


def _is_of(result: Any, args: Sequence[Any]) -> bool:
    """Return whether a view was taken: operators such as `contiguous` copy where they have to."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args)}
    return all(tensor.untyped_storage().data_ptr() in storages for tensor in tensors_in(result))


def launches(call: Call) -> tuple[int, int]:
    """Return how many Triton kernels a call launches, and how many of PyTorch's at least."""
    launch = mock.Mock()
    with as_on_a_gpu(launch), _KernelCount() as count:
        call()
    return launch.call_count, count.operators.total()


def composed_launches(call: Call) -> int:
    """Return how many kernels a call of plain PyTorch launches at least."""
    with _KernelCount() as count:
        call()
    return count.operators.total()


def launch_table() -> list[tuple[str, str, int, int, int]]:
    """Return operator, pass, launches of what people write, and ours: of Triton kernels, and of PyTorch's."""
    rows = []
    for name, (ours, composed) in FORMS.items():
        arguments = partial(_arguments, name)
        with as_on_a_gpu(mock.Mock()):
            our_calls = calls(ours, arguments)
        their_calls = calls(composed, arguments)
        for timed in (FORWARD, BACKWARD):
            if timed in our_calls:
                rows.append((name, timed, composed_launches(their_calls[timed]), *launches(our_calls[timed])))
    return rows


def _arguments(name: str, grad: bool) -> tuple[Any, ...]:
    return arguments_of(name, grad=grad)


# ------------------------------------------------------------------------------------------------------ host time


def host_times(rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return seconds per call for each form and pass, one value per round, all forms in turn."""
    with as_on_a_gpu(lambda *arguments, **settings: None):
        forms: dict[str, tuple[Form, Callable[[bool], tuple[Any, ...]]]] = {
            name: (form, lambda grad: (torch.randn(4, 4).requires_grad_(grad),)) for name, form in yardsticks().items()
        }
        forms |= {f"trifuse {name}": (ours, partial(_arguments, name)) for name, (ours, _) in FORMS.items()}
        timed = {(name, kind): call for name, one in forms.items() for kind, call in calls(*one).items()}
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
        for _ in range(rounds):
            for key, call in timed.items():
                call()
                start = time.thread_time()
                for _ in range(CALLS_PER_BURST):
                    call()
                taken[key].append((time.thread_time() - start) / CALLS_PER_BURST)
    return taken


def record(taken: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Return the times as a result file holds them."""
    rows = []
    for kind in (FORWARD, WITH_GRADIENTS, BACKWARD):
        for (name, timed), seconds in taken.items():
            if timed == kind:
                cuts = statistics.quantiles(seconds, n=5, method="inclusive")
                values = {"median_ms": statistics.median(seconds), "fifth_ms": cuts[0], "four_fifths_ms": cuts[3]}
                unknown = dict.fromkeys(("speedup", "peak_mib", "saved_mib", "gb_per_s", "gflop_per_s", "of_ceiling"))
                row = {"case": "processor time of a call", "pass": kind, "provider": name, "rounds": len(seconds)}
                rows.append(row | {key: round(value * 1e3, 5) for key, value in values.items()} | unknown)
    return {
        "benchmark": "host_cost",
        "baseline": "torch.mul",
        "stamp": stamp(torch.device("cpu")),
        "absent": {},
        "refused": [],
        "rows": rows,
    }


def markdown() -> str:
    """Return the table of launches."""
    headings = ["operator, pass", "as people write it", "trifuse", "of these Triton's"]
    cells = [
        [f"{name}, {timed}", str(composed), str(triton + others), str(triton)]
        for name, timed, composed, triton, others in launch_table()
    ]
    return "\n".join(table(cells, headings)) + "\n"


def run(folder: Path, seconds: float) -> None:
    """Measure, and write ``host_cost.cpu.json`` and ``launches.md``; needs the interpreter."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = record(host_times(max(7, min(MOST_ROUNDS, int(20 * seconds)))))
    (folder / "host_cost.cpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "launches.md").write_text(markdown(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in a process in which triton interprets; see the top of this file."""
    parser = argparse.ArgumentParser(description="measure what a call costs the host, and count its launches")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result file and the table of launches")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each form")
    parser.add_argument("--tiny", action="store_true", help="accepted as of every part: all its calls are tiny")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", __spec__.name, f"--out={options.out}", f"--seconds={options.seconds}"]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    run(options.out, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
