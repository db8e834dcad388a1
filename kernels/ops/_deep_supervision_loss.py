"""Dice and cross-entropy of maps at several resolutions, each with a target of its own.

    loss = sum over the levels i of shares[i] * segmentation_loss(maps[i], targets[i])

The definition is that sum. On a GPU all levels are one operator, like the one of `segmentation_loss`: it returns the
levels' losses and, beside them, the gradients of the losses with regard to the sums. Whoever adds up over ranks needs
the sums, and gets them by the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.torch_internals import below_autograd

from ._segmentation_loss import is_one_operator, segmentation_loss
from ._segmentation_sums import BEST_DICE_LOSS, FIRST_CLASS, SMOOTH, check_signature, with_background

FLAVOUR = "nnunet"


@library.falls_back
def deep_supervision_loss(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    shares: Sequence[float],
    *,
    batch_dice: bool,
    w_ce: float,
    w_dice: float,
    ignore_index: int | None = None,
    sample_weight: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the sum of all levels' losses, a scalar in float32 or wider.

    Args:
        maps: logits (B, K, h, w) of each level.
        targets: of each level, int64 of shape (B, h, w).
        shares: what each level counts for.
        batch_dice: as of `dice_ce`, and so are the following, but for

        ignore_index: a class of the targets whose pixels count for nothing.
    """
    for logits, target in zip(maps, targets, strict=True):
        check_signature("deep_supervision_loss", [logits], target)
    several = len(maps) > 1 and all(_are_alike(maps[0], logits) for logits in maps[1:])
    if several and is_one_operator(maps, targets, sample_weight, reduce):
        weight = None if sample_weight is None else sample_weight.to(maps[0].device, torch.float32)
        full = [with_background([logits])[0] for logits in maps]
        losses, _ = _operator(full, targets, weight, shares, ignore_index, batch_dice, w_ce, w_dice)
        return losses.sum()
    terms = [
        segmentation_loss(
            [logits],
            target,
            flavour=FLAVOUR,
            batch_dice=batch_dice,
            w_ce=share * w_ce,
            w_dice=share * w_dice,
            ignore_index=ignore_index,
            sample_weight=sample_weight,
            reduce=reduce,
        ).squeeze(0)
        for share, logits, target in zip(shares, maps, targets, strict=True)
    ]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _are_alike(first: Tensor, other: Tensor) -> bool:
    return first.dtype == other.dtype and first.shape[:2] == other.shape[:2]


# --------------------------------------------------------------------------------------- the registered operators


def _launch_forward(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    sample_weight: Tensor | None,
    shares: Sequence[float],
    ignore_index: int | None,
    batch_dice: bool,
    w_ce: float,
    w_dice: float,
) -> tuple[Tensor, Tensor]:
    from trifuse.kernels.gpu import deep_supervision_loss, segmentation_loss

    sums, true = deep_supervision_loss.forward(maps, targets, ignore_index)
    return segmentation_loss.forward(
        sums,
        true,
        sample_weight,
        first=FIRST_CLASS[FLAVOUR],
        batch_dice=batch_dice,
        squared=False,
        w_ce=w_ce,
        w_dice=w_dice,
        best=BEST_DICE_LOSS[FLAVOUR],
        smooth=SMOOTH,
        shares=shares,
    )


def _launch_backward(
    slopes: Tensor, maps: Sequence[Tensor], targets: Sequence[Tensor], ignore_index: int | None
) -> list[Tensor]:
    from trifuse.kernels.gpu import deep_supervision_loss

    return deep_supervision_loss.backward(slopes, maps, targets, ignore_index)


def _shape_forward(maps: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    samples, classes = maps[0].shape[:2]
    losses = maps[0].new_empty((len(maps),), dtype=torch.float32)
    return losses, maps[0].new_empty((samples, len(maps), 2 * classes + 1), dtype=torch.float32)


def _shape_backward(slopes: Tensor, maps: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape) for logits in maps]


class _TritonLevels(Function):
    """The gradient of the registered operator: the arguments are saved, and the slopes."""

    @staticmethod
    def forward(
        ctx: ForwardContext,
        targets: Sequence[Tensor],
        sample_weight: Tensor | None,
        options: Sequence[Any],
        *maps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            losses, slopes = torch.ops.trifuse.segmentation_sums_deep_supervision(
                maps, targets, sample_weight, *options
            )
        ctx.mark_non_differentiable(slopes)
        ctx.set_materialize_grads(False)
        ctx.ignore_index = options[1]
        ctx.save_for_backward(slopes, *targets, *maps)
        return losses, slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        slopes, *saved = ctx.saved_tensors
        targets, maps = saved[: len(grad)], saved[len(grad) :]
        backward = torch.ops.trifuse.segmentation_sums_deep_supervision_backward
        found = backward(slopes * grad[:, None], maps, targets, ctx.ignore_index)
        return None, None, None, *found


def _differentiate(
    maps: Sequence[Tensor], targets: Sequence[Tensor], sample_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _TritonLevels.apply(targets, sample_weight, options, *maps)


_operator = library.register(
    "segmentation_sums_deep_supervision(Tensor[] maps, Tensor[] targets, Tensor? sample_weight, float[] shares,"
    " int? ignore_index, bool batch_dice, float w_ce, float w_dice) -> (Tensor, Tensor)",
    _launch_forward,
    _shape_forward,
    _differentiate,
)
library.register(
    "segmentation_sums_deep_supervision_backward(Tensor slopes, Tensor[] maps, Tensor[] targets, int? ignore_index)"
    " -> Tensor[]",
    _launch_backward,
    _shape_backward,
)
