"""Dice and cross-entropy of every sum of some logit maps, straight from the maps.

The definition is the formula of `dice_ce`, applied to `segmentation_sums`. On a GPU both are one operator, which
returns the losses and, beside them, the gradients of the losses with regard to the sums: the backward pass scales them,
and launches its kernel. Whoever adds up over ranks needs the sums between the two, and gets them by the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.torch_internals import below_autograd

from ._segmentation_sums import BEST_DICE_LOSS, FIRST_CLASS, OP, SMOOTH, dice_ce, segmentation_sums, with_background


@library.falls_back
def segmentation_loss(
    maps: Sequence[Tensor],
    target: Tensor,
    *,
    flavour: str,
    batch_dice: bool,
    w_ce: float,
    w_dice: float,
    ignore_index: int | None = None,
    sample_weight: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the loss of all 2**n - 1 sums of n maps, of shape (S,): see `segmentation_sums` and `dice_ce`."""
    squared = flavour == "transunet"
    if is_one_operator(maps, [target], sample_weight, reduce):
        weight = None if sample_weight is None else sample_weight.to(maps[0].device, torch.float32)
        formula = (FIRST_CLASS[flavour], w_ce, w_dice, BEST_DICE_LOSS[flavour])
        losses, _ = _operator(with_background(maps), target, weight, squared, ignore_index, batch_dice, *formula)
        return losses
    return dice_ce(
        segmentation_sums(maps, target, squared=squared, ignore_index=ignore_index),
        flavour=flavour,
        batch_dice=batch_dice,
        w_ce=w_ce,
        w_dice=w_dice,
        sample_weight=sample_weight,
        reduce=reduce,
    )


def is_one_operator(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    sample_weight: Tensor | None,
    reduce: Callable[[Tensor], Tensor] | None,
) -> bool:
    """Return whether a loss is one operator from the maps on, so that nobody sees its sums."""
    weights = [] if sample_weight is None else [sample_weight]
    if reduce is not None or any(weight.requires_grad for weight in weights):
        return False
    if not all(target.numel() for target in targets) or library.choose_backend(OP, maps[0]) != "triton":
        return False
    return not library.under_functional_transform((*targets, *weights, *maps))


# --------------------------------------------------------------------------------------- the registered operator


def _launch(
    maps: Sequence[Tensor],
    target: Tensor,
    sample_weight: Tensor | None,
    squared: bool,
    ignore_index: int | None,
    batch_dice: bool,
    first: int,
    w_ce: float,
    w_dice: float,
    best: float,
) -> tuple[Tensor, Tensor]:
    from trifuse.kernels.gpu import segmentation_loss, segmentation_sums

    sums, true = segmentation_sums.forward(maps, target, squared, ignore_index)
    return segmentation_loss.forward(
        sums,
        true,
        sample_weight,
        first=first,
        batch_dice=batch_dice,
        squared=squared,
        w_ce=w_ce,
        w_dice=w_dice,
        best=best,
        smooth=SMOOTH,
    )


def _shape(maps: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    (samples, classes), subsets = maps[0].shape[:2], 2 ** len(maps) - 1
    losses = maps[0].new_empty((subsets,), dtype=torch.float32)
    return losses, maps[0].new_empty((samples, subsets, 2 * classes + 1), dtype=torch.float32)


class _TritonLoss(Function):
    """The gradient of the registered operator: the arguments are saved, and the slopes."""

    @staticmethod
    def forward(
        ctx: ForwardContext, target: Tensor, sample_weight: Tensor | None, options: Sequence[Any], *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            losses, slopes = torch.ops.trifuse.segmentation_sums_loss(maps, target, sample_weight, *options)
        ctx.mark_non_differentiable(slopes)
        ctx.set_materialize_grads(False)
        ctx.squared, ctx.ignore_index = options[:2]
        ctx.save_for_backward(slopes, target, *maps)
        return losses, slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        slopes, target, *maps = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        backward = torch.ops.trifuse.segmentation_sums_backward
        found = iter(backward(slopes * grad[:, None], maps, target, ctx.squared, ctx.ignore_index, needed, True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _differentiate(
    maps: Sequence[Tensor], target: Tensor, sample_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _TritonLoss.apply(target, sample_weight, options, *maps)


_operator = library.register(
    "segmentation_sums_loss(Tensor[] maps, Tensor target, Tensor? sample_weight, bool squared, int? ignore_index,"
    " bool batch_dice, int first, float w_ce, float w_dice, float best) -> (Tensor, Tensor)",
    _launch,
    _shape,
    _differentiate,
)
