"""Calls of every operator that has Triton kernels: tiny, at shapes that a test chooses, and what they call in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trifuse import kernels
from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention
from trifuse.kernels.ops.mutation_loss import mutation_loss_of_ranks

NAMESPACE = "trifuse::"
ALONE = {"gamma": 0.4, "subsets": "last", "reduction": "sum", "ignore_index": None, "reduce": Tensor.clone}
TOGETHER = {"batch_dice": True, "w_ce": 1.0, "w_dice": 1.0}


def residual_and_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """Return both results of a residual sum and its layer norm as one tensor."""
    kept = torch.arange(1.0, len(x) + 1)
    given = {"layer_scale": scale, "sample_scale": kept, "eps": 1.0}
    return torch.stack(kernels.residual_layer_norm(x, branch, weight, bias, **given))


def norm_of_tokens(x: Tensor) -> Tensor:
    """Return tokens normalised, nothing being added."""
    return kernels.residual_layer_norm(x, eps=1.0)[1]


def fused_and_selected(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Return the fused map and two selected ones as one tensor."""
    return torch.stack(kernels.weighted_block_fusion(features, logits, torch.tensor([2, 0])))


class Call(NamedTuple):
    """One call of a public function; its floating-point tensors require gradients."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Tensor:
        return self.function(*self.arguments, **self.options)

    def leaves(self) -> list[Tensor]:
        """Return the tensors that get a gradient."""
        tensors = tree_leaves((self.arguments, self.options))
        return [leaf for leaf in tensors if isinstance(leaf, Tensor) and leaf.requires_grad]


def calls_of(op: str, shape: Sequence[int], *, channels_last: bool = False) -> list[Call]:
    """Return calls that reach a registered operator, on maps of a shape (B, C, H, W), stored one way or the other."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        if channels_last and len(size) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.requires_grad_()

    def labels(classes: int) -> Tensor:
        return torch.randint(0, classes, (batch, height, width), generator=generator)

    def gate(name: str, size: Sequence[int]) -> list[Call]:
        return [Call(getattr(kernels, name), (normal(*shape), normal(*size)), {})]

    def attention() -> list[Call]:
        options = {"num_heads": 2, "dilations": (1, 2)}
        maps = [torch.randn(batch, height, width, 4 * channels, generator=generator) for _ in range(6)]
        packed = torch.cat(maps[3:], dim=-1).requires_grad_()
        separate = tuple(m.requires_grad_() for m in maps[:3])
        return [Call(kernels.dilated_attention, separate, options), Call(packed_dilated_attention, (packed,), options)]

    def pool() -> list[Call]:
        scales = 1 + torch.arange(batch) % 3
        orders = torch.stack([torch.randperm(height * width, generator=generator) for _ in range(batch)])
        draws = (
            {"scale": scales, "cell": scales - 1, "permutation": orders},
            {"scale": torch.tensor(2), "cell": torch.tensor(3), "permutation": orders[0].clone()},
            {"scale": 2, "cell": 1},
        )
        return [Call(kernels.monte_carlo_pool, (normal(*shape),), draw) for draw in draws]

    def losses() -> list[Call]:
        coarse = normal(batch, channels, math.ceil(height / 2), math.ceil(width / 2))
        levels, targets = [normal(*shape), normal(*coarse.shape)], [labels(channels), labels(channels)[:, ::2, ::2]]
        return [
            Call(kernels.dice_ce_loss, (normal(*shape), labels(channels)), {}),
            Call(kernels.mutation_loss, ([normal(*shape), coarse], labels(channels)), {}),
            Call(mutation_loss_of_ranks, ([normal(*shape)], labels(channels)), ALONE),  # needs the sums themselves
            Call(deep_supervision_loss, (levels, targets, [0.75, 0.25]), TOGETHER),
        ]

    def film() -> list[Call]:
        small = (normal(batch, size) for size in (channels, 2, channels, channels))
        return [Call(kernels.temporal_film_gate, (normal(*shape), *small), {})]

    def segment_film() -> list[Call]:
        segments = torch.randint(0, 4, (batch, height, width), generator=generator, dtype=torch.uint8)
        sizes = ((batch, channels), (batch, 3), (channels,), (batch, 2), (batch, channels), (batch, channels))
        return [Call(kernels.segment_film_gate, (normal(*shape), segments, *(normal(*size) for size in sizes)), {})]

    return {
        "batch_norm_activation": lambda: _norms(op, normal, shape),
        "channel_gate": lambda: gate("channel_gate", (batch, channels)),
        "depthwise_multi_kernel": lambda: [
            Call(kernels.depthwise_multi_kernel, (normal(*shape), [normal(channels, 1, k, k) for k in (1, 3)]), {})
        ],
        "dilated_attention": attention,
        "instance_norm_leaky_relu": lambda: _norms(op, normal, shape),
        "monte_carlo_pool": pool,
        "residual_layer_norm": lambda: [
            Call(residual_and_norm, (normal(*shape), normal(*shape), *(normal(width) for _ in range(3))), {}),
            Call(norm_of_tokens, (normal(*shape),), {}),
        ],
        "segment_film_gate": segment_film,
        "segmentation_sums": losses,
        "spatial_gate": lambda: gate("spatial_gate", (batch, 1, height, width)),
        "temporal_film_gate": film,
        "upsample_argmax": lambda: [
            Call(kernels.upsample_argmax, ([normal(*shape).detach() for _ in range(2)], (2 * height, width + 1)), {})
        ],
        "weighted_block_fusion": lambda: [
            Call(fuse, ([normal(*shape[:3]) for _ in range(3)], normal(3)), {})
            for fuse in (kernels.weighted_block_fusion, fused_and_selected)
        ],
    }[op]()


def _norms(op: str, normal: Callable[..., Tensor], shape: Sequence[int]) -> list[Call]:
    """Return calls of a norm: one of more than a single position, which has no deviation."""
    batch, channels, height, width = shape
    x, affine = normal(batch, channels, height, width + 1), (normal(channels), normal(channels))
    # a large eps: of two positions alone, gradients otherwise cancel but for what rounding leaves
    if op == "instance_norm_leaky_relu":
        return [Call(kernels.instance_norm_leaky_relu, (x, *affine), {"eps": 1.0})]
    running = normal(channels).detach(), 1 + normal(channels).detach().square()
    return [
        Call(kernels.batch_norm_activation, (x, None, None, *affine), {"eps": 1.0}),
        Call(kernels.batch_norm_activation, (x, *running, *affine), {"activation": "gelu"}),
    ]


OPERATORS = (
    "batch_norm_activation",
    "channel_gate",
    "depthwise_multi_kernel",
    "dilated_attention",
    "instance_norm_leaky_relu",
    "monte_carlo_pool",
    "residual_layer_norm",
    "segment_film_gate",
    "segmentation_sums",
    "spatial_gate",
    "temporal_film_gate",
    "upsample_argmax",
    "weighted_block_fusion",
)
"""The operators with kernels; a test compares them with those that are registered."""

OF_TWO_LAYOUTS = {
    "batch_norm_activation",
    "channel_gate",
    "depthwise_multi_kernel",
    "instance_norm_leaky_relu",
    "monte_carlo_pool",
    "segment_film_gate",
    "spatial_gate",
    "temporal_film_gate",
}
"""Those whose kernels have one form for contiguous maps, and another for channels-last ones."""


class Recorded(NamedTuple):
    """One call of a registered operator, forward or backward, and what it returned."""

    name: str
    overload: Any
    arguments: tuple[Any, ...]
    result: Any


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "trifuse":
            self.calls.append(Recorded(func.__name__.partition(".")[0], func, args, result))
        return result


def recorded(call: Call) -> list[Recorded]:
    """Return the calls of registered operators that a call and its backward pass make."""
    with _Recorder() as recorder, kernels.backend("triton"):
        result = call()
        if call.leaves():
            torch.autograd.grad(result.square().sum(), call.leaves())
    return recorder.calls


def registered_names() -> set[str]:
    """Return the names of everything in the library's namespace."""
    for name in kernels.OPERATORS:
        getattr(kernels, name)  # registers it
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE)}
