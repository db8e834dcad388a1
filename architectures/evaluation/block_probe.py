"""Which blocks of a frozen encoder know where a target is: least squares on every subset of them.

    explained(S) = 1 - sum |y - x_S b_S|^2 / sum |y - mean y|^2,   b_S the ridge regression on the channels of blocks S

y are the shares of the classes in a patch, x_S the channels of its tokens in some blocks. b is fitted on the training
cases, and what it explains is counted on the others. All subsets of blocks follow from one matrix of products, so that
each of them is solved anew, and exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

RIDGE = 1e-3  # of each channel's variance
_SMALLEST_VARIANCE = 1e-12  # of channels that are constant
MOST_SUBSETS = 2000  # of one size that are all tried; of more, the best one grows block by block

Patches = tuple[Tensor, Tensor]
"""Tokens (N, M, D) of an image's patches in every block, and the shares of the classes in them, (M, K)."""


@dataclass(frozen=True)
class Moments:
    """Sums over patches of their channels of all blocks beside one another (P = N D), and of their classes' shares.

    Attributes:
        count: number of patches.
        mean: of channels and shares, (P + K,).
        products: of their deviations from the mean, averaged, (P + K, P + K), float64.
        channels: P.
    """

    count: int
    mean: Tensor
    products: Tensor
    channels: int


def moments(images: Iterable[Patches]) -> Moments:
    """Gather the moments of the patches of some images, one image at a time."""
    count, total, products, channels = 0, torch.zeros(()), torch.zeros(()), 0
    for tokens, shares in images:
        rows = torch.cat([tokens.transpose(0, 1).flatten(1), shares], dim=1).double()
        channels = rows.shape[1] - shares.shape[1]
        count += len(rows)
        total = total + rows.sum(0)
        products = products + rows.T @ rows
    mean = total / count
    return Moments(count, mean, products / count - torch.outer(mean, mean), channels)


def explained(train: Moments, val: Moments, blocks: Sequence[int], num_blocks: int) -> float:
    """Return the share of the variance of the classes' shares that some blocks explain in patches not fitted on."""
    width = train.channels // num_blocks
    at = torch.cat([torch.arange(block * width, (block + 1) * width) for block in blocks])
    shares = torch.arange(train.channels, len(train.mean))
    inner = train.products[at][:, at]
    inner = inner + torch.diag(RIDGE * inner.diagonal() + _SMALLEST_VARIANCE)
    b = torch.linalg.solve(inner, train.products[at][:, shares])
    away = val.mean - train.mean  # what was fitted starts from the means of the training cases
    second = val.products + torch.outer(away, away)
    left = second[shares][:, shares].diagonal().sum() - 2 * (b * second[at][:, shares]).sum()
    left = left + (b * (second[at][:, at] @ b)).sum()
    return float(1 - left / second[shares][:, shares].diagonal().sum())


@dataclass(frozen=True)
class BestBlocks:
    """The blocks of one number that explain most, and whether all such subsets were tried."""

    blocks: tuple[int, ...]
    explained: float
    exhaustive: bool


def best_blocks(score: Callable[[tuple[int, ...]], float], num_blocks: int) -> list[BestBlocks]:
    """Return the best subset of each size from 1 to N: of all, or, of too many, of those that hold the one before."""
    found: list[BestBlocks] = []
    for size in range(1, num_blocks + 1):
        exhaustive = comb(num_blocks, size) <= MOST_SUBSETS
        if exhaustive:
            subsets = list(combinations(range(num_blocks), size))
        else:
            held = found[-1].blocks
            subsets = [tuple(sorted((*held, block))) for block in range(num_blocks) if block not in held]
        scored = {subset: score(subset) for subset in subsets}
        best = max(scored, key=lambda subset: scored[subset])
        found.append(BestBlocks(best, scored[best], exhaustive))
    return found
