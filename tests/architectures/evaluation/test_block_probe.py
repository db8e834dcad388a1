"""Least squares over subsets of blocks against a loop, the best k, and the picture of it all."""

from __future__ import annotations

import csv
from itertools import combinations

import numpy as np
import pytest
import torch

from trifuse.architectures.evaluation import block_probe
from trifuse.architectures.evaluation.block_probe import (
    RIDGE,
    BestBlocks,
    best_blocks,
    explained,
    moments,
)
from trifuse.architectures.evaluation.block_probe_figure import BlockProbe, draw_block_probe, in_words


def images(count, blocks=3, seed=0, planted=None):
    """Tokens (N, 20, 4) and shares (20, 2) of some images; a planted block has the share in one of its channels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = torch.randn(blocks, 20, 4, generator=generator) + torch.arange(4.0)
        share = torch.rand(20, generator=generator)
        if planted is not None:
            tokens[planted, :, 1] += 3 * share
        made.append((tokens, torch.stack([1 - share, share], dim=1)))
    return made


@pytest.mark.parametrize("blocks", [(0,), (2, 1), (0, 1, 2)])
def test_what_blocks_explain_is_that_of_a_ridge_regression(blocks):
    """Solved on the rows themselves, in NumPy."""
    train, val = images(6, planted=1), images(3, seed=1, planted=1)

    def rows(part):
        x = torch.cat([tokens[list(blocks)].transpose(0, 1).flatten(1) for tokens, _ in part])
        return x.double().numpy(), torch.cat([shares for _, shares in part]).double().numpy()

    (x, y), (x_val, y_val) = rows(train), rows(val)
    mean_x, mean_y = x.mean(0), y.mean(0)
    inner = (x - mean_x).T @ (x - mean_x) / len(x)
    b = np.linalg.solve(inner + RIDGE * np.diag(np.diag(inner)), (x - mean_x).T @ (y - mean_y) / len(x))
    left = ((y_val - mean_y - (x_val - mean_x) @ b) ** 2).sum()
    expected = 1 - left / ((y_val - mean_y) ** 2).sum()
    assert explained(moments(train), moments(val), blocks, 3) == pytest.approx(expected, abs=1e-9)


def test_a_constant_channel_changes_nothing():
    train, val = images(6, planted=1), images(3, seed=1, planted=1)
    for part in (train, val):
        for tokens, _ in part:
            tokens[0] = 7
    got = [explained(moments(train), moments(val), blocks, 3) for blocks in ((0, 1), (1,))]
    assert got[0] == pytest.approx(got[1], abs=1e-6)


@pytest.mark.parametrize("most", [2000, 5])
def test_the_best_k_of_all_subsets_or_block_by_block(monkeypatch, most):
    """Blocks 1 and 2 are worth most together, block 0 alone: growing misses the pair, and says that it may."""
    monkeypatch.setattr(block_probe, "MOST_SUBSETS", most)
    value = {(0,): 5, (1,): 1, (2,): 1, (3,): 0, (1, 2): 9, (0, 1): 7}
    found = best_blocks(lambda blocks: value.get(blocks, len(blocks)), 4)
    assert [len(best.blocks) for best in found] == [1, 2, 3, 4]
    assert found[0] == BestBlocks((0,), 5, True)
    assert found[1] == (BestBlocks((1, 2), 9, True) if most == 2000 else BestBlocks((0, 1), 7, False))
    tried = {size: len(list(combinations(range(4), size))) <= most for size in range(1, 5)}
    assert [best.exhaustive for best in found] == list(tried.values())


def test_the_picture_and_its_table(tmp_path):
    best = [BestBlocks((1,), 0.5, True), BestBlocks((0, 1), 0.79, True), BestBlocks((0, 1, 2), 0.8, False)]
    probe = BlockProbe(np.array([[0.2, 0.5, 0.3], [0.3, 0.5, 0.2]]), [0.1, 0.5, 0.2], [0.7, 0.3, 0.79], best)
    picture = draw_block_probe(probe, tmp_path, "vit", "cohort")
    assert picture.png.stat().st_size > 10_000
    rows = list(csv.DictReader(picture.csv.open()))
    assert [row["block"] for row in rows] == ["0", "1", "2"]
    first = rows[0]
    assert [float(first[name]) for name in ("weight", "explained_alone", "explained_by_best_k")] == [0.25, 0.1, 0.5]
    assert float(first["lost_without"]) == pytest.approx(0.1)
    # Student's interval of 0.2 and 0.3: 12.706 times 0.05 about 0.25
    assert [float(first[n]) for n in ("weight_low", "weight_high")] == pytest.approx([-0.3853, 0.8853], abs=1e-4)
    assert [row["best_k_blocks"] for row in rows] == ["1", "0 1", "0 1 2"]
    assert [row["all_subsets_tried"] for row in rows] == ["yes", "yes", "no"]
    assert in_words(probe) == picture.alt
    assert (
        "block 1 weighs most, 0.500 against 0.333 for equal weights; without block 1 most is lost, 0.500" in picture.alt
    )
    assert "all blocks explain 0.800 and blocks 0, 1 0.790; alone block 1 explains most, 0.500" in picture.alt
