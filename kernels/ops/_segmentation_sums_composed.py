"""Segmentation sums without a loop over pixels: a form for functional transforms, and one for compilers.

The first is made of differentiable operations alone. The second has its own backward, from the arguments alone, and
shares the maps' exponentials between the subsets; where maps disagree so far that a product of exponentials underflows,
the graph takes another branch, which takes exponentials of the sums themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.cpu.segmentation_sums import SMALLEST_TOTAL, interpolation_weights
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable


def subsets_of(maps: int) -> list[tuple[int, ...]]:
    """Return all non-empty subsets of n maps; the place of a subset is the binary number of its members, less one."""
    return [tuple(i for i in range(maps) if number >> i & 1) for number in range(1, 2**maps)]


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits in float32 or wider, at the size given."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def composed_sums(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return intersection (B, S, K), predicted (B, S, K), nll (B, S) and true (B, K) by differentiable operations."""
    full = [upsampled(m, target.shape[1:]).flatten(2) for m in maps]
    counts, label, truth = _truth(target.flatten(1).unsqueeze(1), full[0], ignore_index)
    intersection, predicted, nll = _sums(full, label, counts, truth, squared, direct=True)
    return intersection, predicted, nll, truth.sum(2)


class CompiledSums(Function):
    """The same for a compiler on a CPU, saving nothing but the arguments."""

    @staticmethod
    def forward(
        ctx: ForwardContext, target: Tensor, squared: bool, ignore_index: int | None, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(target, *maps)
        ctx.squared, ctx.ignore_index = squared, ignore_index
        full = _by_products(maps, target)
        counts, label, truth = _truth(target.flatten(1).unsqueeze(1), full[0], ignore_index)
        *found, smallest = _sums(full, label, counts, truth, squared, direct=False)
        sums = torch.cond(
            torch.logical_not(smallest >= SMALLEST_TOTAL),  # a NaN, too: of another sample, perhaps
            lambda label, counts, truth, *full: _sums(full, label, counts, truth, squared, direct=True),
            lambda *_: tuple(part.clone() for part in found),
            (label, counts, truth, *full),
        )
        true = truth.sum(2)
        ctx.mark_non_differentiable(true)
        return *sums, true

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        target, *maps = ctx.saved_tensors
        squared = ctx.squared
        full = _by_products(maps, target)
        counts, label, truth = _truth(target.flatten(1).unsqueeze(1), full[0], ctx.ignore_index)
        # Gradients may be views of one tensor, which a branch may not take.
        sum_grads = tuple(grad.clone() for grad in grads[:3])
        *found, smallest = _gradients(full, label, counts, truth, sum_grads, squared, direct=False)
        of_full = torch.cond(
            torch.logical_not(smallest >= SMALLEST_TOTAL),  # a NaN, too: of another sample, perhaps
            lambda label, counts, truth, a, b, c, *full: _gradients(
                full, label, counts, truth, (a, b, c), squared, direct=True
            ),
            lambda *_: tuple(grad.clone() for grad in found),
            (label, counts, truth, *sum_grads, *full),
        )
        return None, None, None, *(_folded(grad, m, target) for grad, m in zip(of_full, maps, strict=True))


def _sums(
    full: Sequence[Tensor], label: Tensor, counts: Tensor, truth: Tensor, squared: bool, *, direct: bool
) -> tuple[Tensor, ...]:
    """Return intersection, predicted and nll of maps (B, K, P), and if not direct the smallest total."""
    shared = [] if direct else _exponentials(full, label)
    found = []
    smallest: list[Tensor] = []
    for subset in subsets_of(len(full)):
        p, missed, *least = _direct(full, label, subset) if direct else _product(shared, subset)
        p = p * counts
        nll = torch.where(counts != 0, missed * counts, 0).sum((1, 2))
        found.append(((p * truth).sum(2), (p * p if squared else p).sum(2), nll))
        smallest += least
    sums = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return *sums, *([] if direct else [torch.stack(smallest).amin()])


def _gradients(
    full: Sequence[Tensor],
    label: Tensor,
    counts: Tensor,
    truth: Tensor,
    sum_grads: Sequence[Tensor],
    squared: bool,
    *,
    direct: bool,
) -> tuple[Tensor, ...]:
    """Return the gradient (B, K, P) of each map, and if not direct the smallest total."""
    shared = [] if direct else _exponentials(full, label)
    totals = [torch.zeros_like(m) for m in full]
    smallest: list[Tensor] = []
    for s, subset in enumerate(subsets_of(len(full))):
        p, _, *least = _direct(full, label, subset) if direct else _product(shared, subset)
        of_intersection, of_predicted, of_nll = (grad[:, s] for grad in sum_grads)
        of_p = of_intersection[..., None] * truth + of_predicted[..., None] * (2 * p if squared else 1)
        grad = p * (of_p - (p * of_p).sum(1, keepdim=True)) + of_nll[:, None, None] * (p - truth)
        for i in subset:
            totals[i] = totals[i] + grad
        smallest += least
    return *(total * counts for total in totals), *([] if direct else [torch.stack(smallest).amin()])


def _direct(full: Sequence[Tensor], label: Tensor, subset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the softmax (B, K, P) of a subset's sum, and -log p (B, 1, P) of the label."""
    log_p = reduce(torch.add, [full[i] for i in subset]).log_softmax(1)
    return log_p.exp(), -log_p.gather(1, label)


def _product(shared: Sequence[tuple[Tensor, Tensor]], subset: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same from what the subsets share, and the smallest total of the products of exponentials."""
    product, reached = shared[subset[0]]
    for i in subset[1:]:
        product, reached = product * shared[i][0], reached + shared[i][1]
    total = product.sum(1, keepdim=True)
    return product / total, total.log() - reached, total.amin()


def _exponentials(full: Sequence[Tensor], label: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each map's exponentials relative to its maximum, and the label's logit below that maximum (B, 1, P)."""
    distances = [m - m.amax(1, keepdim=True) for m in full]
    return [(d.exp(), d.gather(1, label)) for d in distances]


def _truth(label: Tensor, like: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return how often each pixel counts (B, 1, P), a class for each, and the one-hot truth (B, K, P).

    A pixel counts once; never if ignored; and NaN times if its class does not exist.
    """
    order = torch.arange(like.shape[1], device=label.device)[:, None]
    exists = (label >= 0) & (label < len(order))
    counts = torch.where(exists, 1.0, torch.nan).to(like.dtype)
    if ignore_index is not None:
        exists = exists & (label != ignore_index)
        counts = torch.where(label != ignore_index, counts, 0)
    return counts, torch.where(exists, label, 0), ((label == order) & exists).to(like.dtype)


def _by_products(maps: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    """Return the maps (B, K, P) at the target's size, upsampled by matrix products: compilers do not repeat those."""
    found = []
    for m in maps:
        m = m.to(torch.promote_types(m.dtype, torch.float32))
        if m.shape[2:] != target.shape[1:]:
            down, across = _weights(m, target)
            m = down @ (m @ across.T)
        found.append(m.flatten(2))
    return found


def _folded(grad: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of a map from that of the map at the target's size: the transpose of the upsampling."""
    grad = grad.unflatten(2, target.shape[1:])
    if logits.shape[2:] != target.shape[1:]:
        down, across = _weights(logits, target)
        grad = down.T @ (grad @ across)
    return grad.to(logits.dtype)


def _weights(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    down, across = (interpolation_weights(*s, dtype) for s in zip(logits.shape[2:], target.shape[1:], strict=True))
    return down, across
