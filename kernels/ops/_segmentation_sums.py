"""The sums over pixels that Dice and cross-entropy are made of, for every sum of some logit maps at once.

For maps P_1 ... P_n and every non-empty subset S of them:

    z = sum_{i in S} P_i,   p = softmax(z),   g = one-hot(target)

    intersection[k] = sum over pixels of p_k g_k
    predicted[k]    = sum over pixels of p_k, or of p_k**2
    nll             = sum over pixels of -log p_target
    true[k]         = sum over pixels of g_k

and one formula, `dice_ce`, makes the losses of them. Between the two, samples can be weighed and ranks added up. A NaN
logit makes NaN of the sums of its sample, for the subsets that its map belongs to, and of no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.cpu import segmentation_sums as cpu
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd, inside_transform

from . import _segmentation_sums_composed as composed

OP = "segmentation_sums"
SMOOTH = 1e-5
FIRST_CLASS = {"nnunet": 1, "transunet": 0}  # of those whose Dice counts
BEST_DICE_LOSS = {"nnunet": 0.0, "transunet": 1.0}  # less the mean of Dice
TINY = torch.finfo(torch.float32).tiny


class SegmentationSums(NamedTuple):
    """Sums over the pixels of each of B samples, for each of S subsets and K classes."""

    intersection: Tensor  # (B, S, K)
    predicted: Tensor  # (B, S, K)
    nll: Tensor  # (B, S)
    true: Tensor  # (B, K)


@library.falls_back
def segmentation_sums(
    maps: Sequence[Tensor], target: Tensor, *, squared: bool, ignore_index: int | None = None
) -> SegmentationSums:
    """Return the sums for all 2**n - 1 sums of n maps.

    Args:
        maps: logits (B, K, h, w) at the target's size, or coarser and then upsampled bilinearly. K = 1 means a sigmoid,
            and gives the sums of two classes.
        target: class of every pixel, int64 of shape (B, H, W).
        squared: whether ``predicted`` sums squares.
        ignore_index: a class of the target whose pixels count for nothing.
    """
    maps = with_background(maps)
    arguments = (maps, target, squared, ignore_index)
    backend = library.choose_backend(OP, maps[0])
    if backend == "reference" or library.under_functional_transform((target, *maps)):
        return SegmentationSums(*composed.composed_sums(*arguments))
    if backend == "triton":
        sums, true = _operator(*arguments)
        intersection, predicted, nll = sums.split((true.shape[1], true.shape[1], 1), dim=2)
        return SegmentationSums(intersection, predicted, nll.squeeze(2), true)
    if maps[0].device.type == "cpu" and target.numel():
        own: type[_ChunkedSums | composed.CompiledSums] | None = None
        if not library.without_values((target, *maps)):
            if cpu.is_small(maps, target):
                return SegmentationSums(*cpu.forward_of_few(maps[0], target, squared, ignore_index))
            own = None if inside_transform() else _ChunkedSums  # which is refused there, whatever is transformed
        elif torch.compiler.is_compiling() and torch.is_grad_enabled() and any(m.requires_grad for m in maps):
            own = composed.CompiledSums  # a compiler traces no Function where nothing is differentiated
        if own is not None:
            with torch.autocast("cpu", enabled=False):  # which would multiply matrices in bfloat16
                return SegmentationSums(*own.apply(target, squared, ignore_index, *maps))
    return SegmentationSums(*composed.composed_sums(*arguments))


def with_background(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return maps of at least two classes: a sigmoid of x is the softmax of (0, x)."""
    if maps[0].shape[1] > 1:
        return maps
    return [torch.cat([torch.zeros_like(m), m], 1) for m in maps]


def dice_ce(
    sums: SegmentationSums,
    *,
    flavour: str,
    batch_dice: bool,
    w_ce: float,
    w_dice: float,
    sample_weight: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the loss of every subset, of shape (S,).

    Args:
        sums: of this rank's samples.
        flavour: "nnunet" (minus the Dice of the foreground) or "transunet" (1 - Dice of all classes; give it squares).
        batch_dice: pool the sums of Dice over the batch, instead of averaging the Dice of each sample.
        w_ce: weight of the cross-entropy.
        w_dice: weight of the Dice.
        sample_weight: of shape (B,); 0 makes a sample count for nothing.
        reduce: adds a tensor up over all ranks, differentiably.
    """
    plain = batch_dice and sample_weight is None and reduce is None
    if plain and not torch.compiler.is_compiling() and not _in_any_transform(sums):
        return _BatchLoss.apply(*sums, flavour, w_ce, w_dice)
    weight = sums.nll.new_ones(len(sums.true)) if sample_weight is None else sample_weight.to(sums.nll)
    first = FIRST_CLASS[flavour]
    subsets, classes = sums.intersection.shape[1], sums.intersection.shape[2] - first
    squares = sums.predicted + sums.true.unsqueeze(1)
    per_class = torch.stack([sums.intersection, squares], 1)[..., first:]  # (B, 2, S, C)
    dice_part = per_class if batch_dice else _dice(per_class[:, 0], per_class[:, 1]).mean(-1)
    parts = [dice_part.flatten(1), sums.nll, sums.true.sum(1, keepdim=True), torch.ones_like(weight)[:, None]]
    total = (weight[:, None] * torch.cat(parts, 1)).sum(0)  # a matrix product would be bfloat16 under autocast
    total = total if reduce is None else reduce(total)
    dice_total, nll, pixels, samples = total.tensor_split((-subsets - 2, -2, -1))
    dice = _dice(*dice_total.view(2, subsets, classes)).mean(-1) if batch_dice else dice_total / samples.clamp(min=TINY)
    return w_ce * nll / pixels.clamp(min=1) + w_dice * (BEST_DICE_LOSS[flavour] - dice)


def _in_any_transform(tensors: Sequence[Tensor]) -> bool:
    return inside_transform() or library.under_functional_transform(tensors)


class _BatchLoss(Function):
    """`dice_ce` of a whole batch, in half of the operations: on a GPU each of them is a launch of its own."""

    @staticmethod
    def forward(
        ctx: ForwardContext,
        intersection: Tensor,
        predicted: Tensor,
        nll: Tensor,
        true: Tensor,
        flavour: str,
        w_ce: float,
        w_dice: float,
    ) -> Tensor:
        first = FIRST_CLASS[flavour]
        ctx.first, ctx.w_ce, ctx.w_dice = first, w_ce, w_dice
        ctx.shapes = intersection.shape, nll.shape
        below, half, pixels = _dice_parts(intersection, predicted, true)
        ctx.save_for_backward(intersection, predicted, true, below, half, pixels)
        dice_loss = torch.rsub(half[:, first:].mean(-1), BEST_DICE_LOSS[flavour] * w_dice, alpha=-2 * w_dice)
        return dice_loss.addcdiv_(nll.sum(0), pixels, value=w_ce)

    @staticmethod
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        *sums, below, half, pixels = ctx.saved_tensors
        if torch.is_grad_enabled():  # who differentiates twice meets the sums, which refuse
            below, half, pixels = _dice_parts(*sums)
        shape, nll_shape = ctx.shapes
        intersection_grad = (grad * (2 * ctx.w_dice / max(1, shape[2] - ctx.first)))[:, None] / below
        if ctx.first:
            intersection_grad[:, : ctx.first].zero_()
        predicted_grad, nll_grad = intersection_grad * half, (grad / pixels).mul_(ctx.w_ce)
        expanded = intersection_grad.expand(shape), predicted_grad.expand(shape), nll_grad.expand(nll_shape)
        return *expanded, None, None, None, None


def _dice_parts(intersection: Tensor, predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return minus the denominators of Dice, minus its half, and the number of pixels."""
    seen = true.sum(0)
    below = torch.rsub(predicted.sum(0).add_(seen), -SMOOTH)
    return below, intersection.sum(0).add_(SMOOTH / 2).div_(below), seen.sum().clamp_(min=1)


def _dice(intersection: Tensor, sizes: Tensor) -> Tensor:
    return (2 * intersection + SMOOTH) / (sizes + SMOOTH)


class _ChunkedSums(Function):
    """The CPU path with its own backward, so that nothing but the arguments is saved."""

    @staticmethod
    def forward(
        ctx: ForwardContext, target: Tensor, squared: bool, ignore_index: int | None, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(target, *maps)
        ctx.squared, ctx.ignore_index = squared, ignore_index
        intersection, predicted, nll, true = cpu.forward(maps, target, squared, ignore_index)
        ctx.mark_non_differentiable(true)
        return intersection, predicted, nll, true

    @staticmethod
    @once_differentiable
    def backward(
        ctx: BackwardContext, of_intersection: Tensor, of_predicted: Tensor, of_nll: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        target, *maps = ctx.saved_tensors
        grads = (of_intersection, of_predicted, of_nll)
        found = cpu.backward(grads, maps, target, ctx.squared, ctx.ignore_index)
        return None, None, None, *found


# --------------------------------------------------------------------------------------- the registered operator
#
# It returns intersection, predicted and nll as one tensor (B, S, 2 K + 1), and true (B, K). As parts of one memory the
# three must not be results of their own: a compiler takes each result for aligned. Views, made outside, it knows.


def _launch_forward(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    from trifuse.kernels.gpu import segmentation_sums as gpu

    return gpu.forward(maps, target, squared, ignore_index)


def _launch_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    target: Tensor,
    squared: bool,
    ignore_index: int | None,
    needed: Sequence[bool],
    doubled: bool = False,
) -> list[Tensor]:
    from trifuse.kernels.gpu import segmentation_sums_backward as gpu

    return gpu.backward(grad, maps, target, squared, ignore_index, needed, doubled)


def _shape_forward(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    (samples, classes), subsets = maps[0].shape[:2], 2 ** len(maps) - 1
    sums = maps[0].new_empty((samples, subsets, 2 * classes + 1), dtype=torch.float32)
    return sums, maps[0].new_empty((samples, classes), dtype=torch.float32)


def _shape_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    target: Tensor,
    squared: bool,
    ignore_index: int | None,
    needed: Sequence[bool],
    doubled: bool = False,
) -> list[Tensor]:
    return [m.new_empty(m.shape) for m, need in zip(maps, needed, strict=True) if need]


class _TritonSums(Function):
    """The gradient of the registered operator: only the arguments are saved."""

    @staticmethod
    def forward(
        ctx: ForwardContext, target: Tensor, squared: bool, ignore_index: int | None, *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(target, *maps)
        ctx.squared, ctx.ignore_index = squared, ignore_index
        with below_autograd():
            sums, true = torch.ops.trifuse.segmentation_sums(maps, target, squared, ignore_index)
        ctx.mark_non_differentiable(true)
        return sums, true

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        target, *maps = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        backward = torch.ops.trifuse.segmentation_sums_backward
        found = iter(backward(grad, maps, target, ctx.squared, ctx.ignore_index, needed))
        return None, None, None, *(next(found) if need else None for need in needed)


def _differentiate(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    return _TritonSums.apply(target, squared, ignore_index, *maps)


_operator = library.register(
    "segmentation_sums(Tensor[] maps, Tensor target, bool squared, int? ignore_index) -> (Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    _differentiate,
)
library.register(
    "segmentation_sums_backward(Tensor grad, Tensor[] maps, Tensor target, bool squared, int? ignore_index,"
    " bool[] needed, bool doubled=False) -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


def check_maps(op: str, maps: Sequence[Tensor], target: Tensor, ignore_index: int | None) -> None:
    """Refuse logit maps (B, K, h, w) that do not belong together, or not to the target (B, H, W), and its classes."""
    check_signature(op, maps, target)
    _check_classes(op, target, maps[0].shape[1], ignore_index)


def check_signature(op: str, maps: Sequence[Tensor], target: Tensor) -> None:
    """Refuse logit maps and a target by their shapes, types and devices alone."""
    check = _check_signature if torch.compiler.is_compiling() else _check_once
    for i, tensor in enumerate((*maps, target)):
        if type(tensor) is not Tensor:
            library.check_tensor(op, "target" if i == len(maps) else _name(i, len(maps)), tensor)
            check = _check_signature  # the sizes of other types may be symbols, which cannot be looked up
    check(op, tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in (target, *maps)]))


def _check_signature(op: str, signature: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]) -> None:
    """Refuse shapes, types and devices, the target's and then the maps', that do not belong together."""
    (full, _, device), *given = signature
    first, first_dtype, _ = given[0]
    for i, (shape, dtype, _) in enumerate(given):
        name = _name(i, len(given))
        library.check_float(op, name, dtype)
        if len(shape) != 4 or not shape[1]:
            raise ShapeError(f"{op}: {name} has shape {tuple(shape)}; expected (B, K, h, w) with at least one class")
        if shape[:2] != first[:2]:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(shape)}; expected {tuple(first[:2])} samples and classes, those "
                "of logits[0]"
            )
        if dtype != first_dtype:
            raise TypeError(
                f"{op}: {name} is {dtype}; expected {first_dtype}, the type of logits[0]; convert with .to(...)"
            )
        sizes = zip(shape[2:], full[1:], strict=True) if len(full) == 3 else ()
        if any(small != large and not 0 < small < large for small, large in sizes):
            raise ShapeError(
                f"{op}: {name} is {tuple(shape[2:])}; expected at most the target's size {tuple(full[1:])}; crop or "
                "pool it, or give the target at full size"
            )
    places = {"target": device, **{f"logits[{i}]": place for i, (_, _, place) in enumerate(given)}}
    library.check_one_device(op, places)
    if len(full) != 3 or full[0] != first[0]:
        raise ShapeError(f"{op}: expected a target (B, H, W) for logits {tuple(first)}, got {tuple(full)}")


_check_once = lru_cache(maxsize=256)(_check_signature)  # what was not refused never will be


def _name(i: int, maps: int) -> str:
    return f"logits[{i}]" if maps > 1 else "logits"


def check_target(op: str, logits: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Refuse logits (B, K, ...) and a target (B, ...) that are not of one size."""
    if logits.ndim < 3 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ShapeError(
            f"expected logits (B, K, H, W) and target (B, H, W), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    _check_classes(op, target, logits.shape[1], ignore_index)


def _check_classes(op: str, target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Refuse classes that do not exist, on a CPU: a GPU, which would have to wait for the answer, gives NaN."""
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: expected a target of type torch.int64, got {target.dtype}; convert it with .long()")
    if target.device.type != "cpu" or not target.numel():
        return
    if library.without_values((target,)) or library.under_functional_transform((target,)):
        return
    classes = max(classes, 2)
    lowest, highest = target.aminmax()
    if lowest.item() >= 0 and highest.item() < classes:
        return
    wrong = (target < 0) | (target >= classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        raise ValueError(
            f"{op}: expected classes 0 to {classes - 1} in the target, got {sorted(set(target[wrong].tolist()))[:5]}; "
            "map the labels, or give the one that does not count as ignore_index"
        )
