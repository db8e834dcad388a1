"""What a report says of the learned weights: how far from uniform, how far they moved, and who chose the blocks."""

from __future__ import annotations

import pytest
import torch
from small_dino_unet import network

from trifuse.architectures.dino_unet.block_weights import block_weights, describe_block_weights, from_uniform
from trifuse.architectures.dino_unet.demo import demo_recipe

UNIFORM = [0.0] * 6
SPREAD = [0.0, 0.01, 0.02, -0.01, -0.02, 0.01]  # selects blocks 5, 2, 1, 0


def start_of(logits: list[float]) -> dict[str, float]:
    return {"val_dice": 0.1, **block_weights(with_logits(logits))}


def with_logits(logits: list[float], **options):
    model = network(**options)
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor(logits))
    return model


def said(start: list[float] | None, end: list[float], **options) -> str:
    model = with_logits(end, **options)
    return describe_block_weights(model, {} if start is None else start_of(start))["Weights of the blocks"]


def test_weights_by_column_of_the_log():
    weights = block_weights(with_logits(SPREAD))
    assert list(weights) == [f"weight_block_{index}" for index in range(6)]
    assert list(weights.values()) == pytest.approx(torch.softmax(torch.tensor(SPREAD), 0).tolist())
    assert block_weights(network(blocks="last4")) == {}


def test_distance_from_uniform_is_a_part_of_it():
    assert from_uniform(torch.tensor([0.25, 0.25, 0.5, 0.0])) == pytest.approx(1.0)
    assert from_uniform(torch.full((4,), 0.25)) == 0.0


def test_a_selection_that_the_seed_made():
    assert said(SPREAD, [logit + 0.001 * index for index, logit in enumerate(SPREAD)]) == (
        "within 2 % of uniform, moved by at most 0.25 % of it; selection unchanged since the start: the seed chose "
        "the blocks, see theta_lr_mult"
    )


def test_a_selection_that_training_confirmed():
    assert said(SPREAD, [0.5, 0.5, 0.5, 0.0, 0.0, 0.5]) == (
        "within 30 % of uniform, moved by at most 29 % of it; selection unchanged since the start"
    )


def test_a_selection_that_training_made():
    start, end = "selected at the start: 5, 2, 1, 0", "in this network: 5, 4, 3, 2"
    assert said(SPREAD, [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]).endswith(f" of it; {start}; {end}")
    assert said(SPREAD, UNIFORM).endswith("in this network: 3, 2, 1, 0")  # ties to the lower index
    assert said(SPREAD, [0.0, 0.01, 0.03, -0.01, -0.02, 0.04], order="weight").endswith(
        "selected at the start: 2, 1, 5, 0; in this network: 5, 2, 1, 0"
    )


def test_where_the_start_is_not_known_or_nothing_is_selected():
    assert said(None, UNIFORM) == "within 0 % of uniform; those at the start are not known"
    options = {"channels": (4,) * 6, "top_k": 6}
    assert said(SPREAD, SPREAD, **options).endswith("moved by at most 0 % of it; all blocks are selected")
    facts = describe_block_weights(network(blocks=(5, 3, 1, 0)), {})
    assert facts == {"Blocks, coarsest stage first": "5, 3, 1, 0"}
    facts = describe_block_weights(with_logits(SPREAD), {})
    assert facts["Blocks, coarsest stage first"] == "5, 2, 1, 0"


def test_the_demo_has_blocks_to_choose_from(tmp_path):
    recipe = demo_recipe(tmp_path / "cohort", tmp_path / "split.json", seed=3)
    assert recipe.network.learned
    assert recipe.network.depth >= 8
    assert recipe.network.top_k == 4
    assert (recipe.network.init_seed, recipe.training.seed) == (3, 3)
