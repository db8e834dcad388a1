"""Segmentation sums on a CPU: chunks of pixels that stay in a core's cache, all subsets of a chunk at once.

The softmax of a sum of maps comes from the product of the maps' exponentials, each relative to its map's maximum: n
exponentials instead of 2**n - 1. Where maps disagree so far that a product underflows, its chunk takes exponentials of
the sums themselves. Maps coarser than the target are upsampled chunk by chunk, by two small matrix products with the
interpolation weights; their gradients go back through the transposes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

# Elements of the softmaxes of all subsets of a chunk: small enough to stay in a second-level cache or close to it.
CHUNK_ELEMENTS = 1 << 20
# Of a single map of fewer, all that autograd keeps stays in a cache, and its gradients take fewer steps.
FEWEST_ELEMENTS = 1 << 19
# A product of exponentials below this may have lost classes that matter; above, they are lost below rounding.
SMALLEST_TOTAL = 1e-25


@dataclass(frozen=True)
class Chunk:
    """Some rows of some samples, their pixels flattened."""

    samples: slice
    rows: slice
    values: list[Tensor]  # each map's logits (b, K, P), at the target's size
    label: Tensor  # (b, 1, P): a class for every pixel
    known: Tensor | None  # (b, 1, P): 1 where a pixel counts, else 0; None if all count
    scratch: Tensor  # (2, S, b, K, P): memory that is used again by every chunk

    def truth(self) -> Tensor:
        """Return the one-hot label (b, K, P), 0 where a pixel does not count."""
        zeros = torch.zeros_like(self.values[0])
        return zeros.scatter_(1, self.label, 1.0) if self.known is None else zeros.scatter_(1, self.label, self.known)


class Upsampling:
    """Bilinear upsampling (align_corners=False) of the rows of one map to a larger size, and its transpose."""

    def __init__(self, size: Sequence[int], full: Sequence[int], dtype: torch.dtype) -> None:
        self.down, self.across = (interpolation_weights(*sizes, dtype) for sizes in zip(size, full, strict=True))

    def touched(self, rows: slice) -> slice:
        """Return the coarse rows that some full rows are made of."""
        used = self.down[rows].ne(0).any(0).nonzero()
        return slice(int(used[0]), int(used[-1]) + 1)

    def forward(self, coarse: Tensor, rows: slice) -> Tensor:
        """Return rows of the upsampled map (..., R, W) from all rows of a coarse one."""
        touched = self.touched(rows)
        return self.down[rows, touched] @ (coarse[..., touched, :].to(self.down.dtype) @ self.across.T)

    def add_backward(self, grad: Tensor, rows: slice, total: Tensor) -> None:
        """Add to ``total``, the gradient of the coarse map, what comes from rows of the upsampled one."""
        touched = self.touched(rows)
        total[..., touched, :] += self.down[rows, touched].T @ grad @ self.across


def interpolation_weights(size: int, full: int, dtype: torch.dtype) -> Tensor:
    """Return the (full, size) matrix of linear interpolation between the centres of cells."""
    centres = ((torch.arange(full, dtype=torch.float64) + 0.5) * (size / full) - 0.5).clamp(0, size - 1)
    return (1 - (centres[:, None] - torch.arange(size)).abs()).clamp(min=0).to(dtype)


def is_small(maps: Sequence[Tensor], target: Tensor) -> bool:
    """Return whether `forward_of_few` takes these maps, and less time for them than `forward` and `backward` do."""
    return len(maps) == 1 and maps[0].numel() < FEWEST_ELEMENTS and maps[0].shape[2:] == target.shape[1:]


def forward_of_few(
    logits: Tensor, target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `forward` does of one small map, at the target's size, by differentiable operations alone."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(2).log_softmax(1)
    label, p, truth = target.flatten(1).unsqueeze(1), log_p.exp(), torch.zeros_like(log_p)
    if ignore_index is None:
        truth.scatter_(1, label, 1.0)
        reached = log_p.gather(1, label)
    else:
        known = label != ignore_index
        label, counts = torch.where(known, label, 0), known.to(p.dtype)
        p = p * counts
        truth.scatter_(1, label, counts)
        reached = torch.where(known, log_p.gather(1, label), 0)
    intersection, predicted = (p * truth).sum(2), (p * p if squared else p).sum(2)
    return intersection.unsqueeze(1), predicted.unsqueeze(1), -reached.sum(2), truth.sum(2)


def forward(
    maps: Sequence[Tensor], target: Tensor, squared: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return intersection (B, S, K), predicted (B, S, K), nll (B, S) and true (B, K)."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    samples, classes = maps[0].shape[:2]
    subsets = 2 ** len(maps) - 1
    intersection, predicted = torch.zeros(2, samples, subsets, classes, dtype=dtype)
    nll, true = torch.zeros(samples, subsets, dtype=dtype), torch.zeros(samples, classes, dtype=dtype)
    for chunk in _chunks(maps, target, ignore_index):
        p, missed = _softmaxes(chunk.values, chunk.scratch[0], chunk.label)
        truth = chunk.truth()
        if chunk.known is not None:
            p.mul_(chunk.known)
            missed = torch.where(chunk.known[:, 0] > 0, missed, 0)
        hit = p.gather(2, chunk.label.expand(subsets, -1, -1, -1)).squeeze(2).transpose(0, 1)
        intersection[chunk.samples] += hit @ truth.transpose(1, 2)
        sizes = torch.linalg.vector_norm(p, dim=-1).square_() if squared else p.sum(-1)
        predicted[chunk.samples] += sizes.transpose(0, 1)
        nll[chunk.samples] += missed.sum(-1).T
        true[chunk.samples] += truth.sum(-1)
    return intersection, predicted, nll, true


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    maps: Sequence[Tensor],
    target: Tensor,
    squared: bool,
    ignore_index: int | None,
) -> list[Tensor]:
    """Return the gradient of each map from those of intersection (B, S, K), predicted (B, S, K) and nll (B, S)."""
    with torch.autocast("cpu", enabled=False):  # which would multiply matrices in bfloat16
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        full = target.shape[1:]
        coarse = [None if m.shape[2:] == full else Upsampling(m.shape[2:], full, dtype) for m in maps]
        totals = [
            torch.empty(m.shape, dtype=m.dtype) if up is None else torch.zeros(m.shape, dtype=dtype)
            for m, up in zip(maps, coarse, strict=True)
        ]
        for chunk in _chunks(maps, target, ignore_index):
            found = _chunk_gradients(chunk, *(grad[chunk.samples] for grad in grads), squared=squared)
            for grad, total, up in zip(found, totals, coarse, strict=True):
                grad = grad.unflatten(2, (-1, full[1]))
                if up is None:
                    total[chunk.samples, :, chunk.rows] = grad
                else:
                    up.add_backward(grad, chunk.rows, total[chunk.samples])
        return [total.to(m.dtype) for total, m in zip(totals, maps, strict=True)]


def _chunk_gradients(
    chunk: Chunk, of_intersection: Tensor, of_predicted: Tensor, of_nll: Tensor, *, squared: bool
) -> Tensor:
    """Return the gradients (n, b, K, P) of the maps; those of the sums are (b, S, K), (b, S, K) and (b, S).

    With d_k = dL/dp_k, a subset's logits get p_k (d_k - sum_j p_j d_j) from Dice and p_k - g_k from cross-entropy.
    What belongs to the target's class alone is added to it last.
    """
    p, _ = _softmaxes(chunk.values, chunk.scratch[0])
    subsets, pixels = len(p), p.shape[-1]
    label = chunk.label.expand(subsets, -1, -1, -1)
    hit = p.gather(2, label).squeeze(2)
    hit.mul_(of_intersection.transpose(0, 1).gather(2, label.squeeze(2)))
    slope = (2 * of_predicted if squared else of_predicted).transpose(0, 1).unsqueeze(3)
    of_nll = of_nll.T.unsqueeze(2)
    grad = torch.mul(p, p, out=chunk.scratch[1]) if squared else p
    inner = (of_nll - hit).unsqueeze(2) - slope.transpose(2, 3) @ grad
    if squared:
        torch.addcmul(inner, p, slope, out=chunk.scratch[1]).mul_(p)
    else:
        grad = torch.add(inner, slope, out=chunk.scratch[1]).mul_(p)

    of_maps, of_label = grad, (hit - of_nll).unsqueeze(2)
    if subsets > 1:
        members = _members(len(chunk.values), p.dtype)
        of_maps = (members.T @ grad.view(subsets, -1)).view(-1, *p.shape[1:])
        of_label = (members.T @ of_label.view(subsets, -1)).view(-1, p.shape[1], 1, pixels)
    of_maps.scatter_add_(2, chunk.label.expand(len(of_maps), -1, -1, -1), of_label)
    return of_maps if chunk.known is None else of_maps.mul_(chunk.known)


def _softmaxes(values: Sequence[Tensor], p: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the softmax (S, b, K, P) of every subset's sum, and -log p (S, b, P) of the label if one is given.

    The softmaxes are written to ``p``.
    """
    first = values[0]
    numbers = range(1, 2 ** len(values))
    reached = first.new_zeros(len(numbers), first.shape[0], first.shape[2])  # the label's logit below its map's maximum
    for i, value in enumerate(values):
        single = torch.sub(value, value.amax(1, keepdim=True), out=p[2**i - 1])
        if label is not None:
            reached[2**i - 1] = single.gather(1, label).squeeze(1)
        single.exp_()
    for number in numbers:
        rest = number & (number - 1)
        if rest:
            torch.mul(p[rest - 1], p[(number ^ rest) - 1], out=p[number - 1])
            if label is not None:
                torch.add(reached[rest - 1], reached[(number ^ rest) - 1], out=reached[number - 1])
    total = p.sum(2)
    if (total < SMALLEST_TOTAL).any():  # not min(), which a NaN of another sample would hide in
        return _direct_softmaxes(values, label)
    p.mul_(total.reciprocal().unsqueeze(2))
    return p, reached if label is None else total.log_().sub_(reached)


def _direct_softmaxes(values: Sequence[Tensor], label: Tensor | None) -> tuple[Tensor, Tensor]:
    log_p = torch.stack(
        [
            reduce(torch.add, [v for i, v in enumerate(values) if number >> i & 1])
            for number in range(1, 2 ** len(values))
        ]
    ).log_softmax(2)
    missed = log_p[:, :, 0] if label is None else -log_p.gather(2, label.expand(len(log_p), -1, -1, -1)).squeeze(2)
    return log_p.exp(), missed


def _members(maps: int, dtype: torch.dtype) -> Tensor:
    """Return the (S, n) matrix that says which maps belong to a subset."""
    return (torch.arange(1, 2**maps)[:, None] >> torch.arange(maps) & 1).to(dtype)


def _chunks(maps: Sequence[Tensor], target: Tensor, ignore_index: int | None) -> Iterator[Chunk]:
    """Cut the samples into chunks: several small samples at once, or some rows of a large one."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    (samples, height, width), classes = target.shape, maps[0].shape[1]
    subsets = 2 ** len(maps) - 1
    most_pixels = CHUNK_ELEMENTS // (classes * subsets)
    some_samples = max(1, min(samples, most_pixels // max(1, height * width)))
    some_rows = max(1, min(height, most_pixels // max(1, some_samples * width)))
    coarse = [None if m.shape[2:] == (height, width) else Upsampling(m.shape[2:], (height, width), dtype) for m in maps]
    storage = torch.empty(2 * subsets * some_samples * classes * some_rows * width, dtype=dtype)
    for first in range(0, samples, some_samples):
        for top in range(0, height if width else 0, some_rows):
            taken, rows = slice(first, first + some_samples), slice(top, min(height, top + some_rows))
            values = [
                m[taken, :, rows].to(dtype) if up is None else up.forward(m[taken], rows)
                for m, up in zip(maps, coarse, strict=True)
            ]
            label = target[taken, rows].flatten(1).unsqueeze(1)
            known = None if ignore_index is None else label != ignore_index
            if known is not None:
                label = torch.where(known, label, 0)
            values = [value.flatten(2) for value in values]
            yield Chunk(
                samples=taken,
                rows=rows,
                values=values,
                label=label,
                known=None if known is None else known.to(dtype),
                scratch=storage[: 2 * subsets * values[0].numel()].view(2, subsets, *values[0].shape),
            )
