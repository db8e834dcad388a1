"""`trifuse probe`: a block that is planted in an encoder with random weights is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hugging_face import save_small_model
from torch.nn import functional as F

from trifuse.architectures.dino_unet import dino_unet_on
from trifuse.architectures.dino_unet.probe import Projected, learned_weights, probe_features, shares_of
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.blocks.backbone_features import describe_backbone

SIDE, PATCH = 32, 8


class Rectangles:
    """Images of a bright rectangle on a dark ground."""

    def __init__(self, length, seed):
        self._length, self._seed = length, seed

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self._seed + index)
        low, size = (torch.randint(start, stop, (2,), generator=generator) for start, stop in ((0, 16), (8, 16)))
        target = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        target[low[0] : low[0] + size[0], low[1] : low[1] + size[1]] = 1
        return {"image": target.float().expand(3, -1, -1).clone(), "target": target}


def plant(network, block):
    """Let the image into an encoder at one block alone: all others see noise of the same size."""
    generator = torch.Generator().manual_seed(0)
    blocks = describe_backbone(network.encoder.model).blocks
    seen = {}

    def noise(module, arguments, output):
        return torch.randn(output.shape, generator=generator)

    def add(module, arguments, output):
        brightness = F.avg_pool2d(seen["image"][:, :1], PATCH).flatten(1)
        seen["added"] = F.pad(4 * output.std() * brightness, (output.shape[1] - brightness.shape[1], 0))[:, :, None]
        return output + seen["added"] * torch.linspace(-1, 1, output.shape[2])

    def remove(module, arguments):
        return (arguments[0] - seen["added"] * torch.linspace(-1, 1, arguments[0].shape[2]), *arguments[1:])

    network.encoder.model.embeddings.register_forward_hook(noise)
    network.encoder.register_forward_pre_hook(lambda module, arguments: seen.update(image=arguments[0]))
    blocks[block].register_forward_hook(add)
    if block + 1 < len(blocks):
        blocks[block + 1].register_forward_pre_hook(remove)


@pytest.mark.parametrize(("name", "block"), [("vit", 1), ("dinov3", 2)])
def test_a_planted_block_is_found(tmp_path, name, block):
    """By all three: its weight is the largest, for every seed; without it most is lost; alone it explains most."""
    save_small_model(tmp_path / name, name)
    network = dino_unet_on(tmp_path / name, channels=(1,), bottleneck_dim=1, top_k=1)
    plant(network, block)
    sets = [
        FeatureCache(network, Rectangles(length, seed), tmp_path, device="cpu") for length, seed in ((30, 0), (15, 1))
    ]
    probe = probe_features(*(Projected(one, PATCH, 2, 64) for one in sets), seeds=3, steps=150)
    assert (probe.weights.argmax(axis=1) == block).all()
    assert int(np.argmax(probe.lost)) == int(np.argmax(probe.alone)) == block
    assert probe.best[0].blocks == (block,)
    assert all(block in best.blocks for best in probe.best)
    assert probe.alone[block] > 0.6  # the final norm bends what is planted
    assert max(alone for other, alone in enumerate(probe.alone) if other != block) < 0.2


def test_learned_weights_find_a_planted_block_and_follow_the_seed():
    generator = torch.Generator().manual_seed(0)
    tokens, share = torch.randn(3, 200, 4, generator=generator), torch.rand(200, generator=generator)
    tokens[2, :, 1] += 3 * share
    tokens = (tokens - tokens.mean(1, keepdim=True)) / tokens.std(1, keepdim=True)
    shares = torch.stack([1 - share, share], dim=1)
    weights = [learned_weights((tokens, shares), seed, steps=60) for seed in (0, 0, 1)]
    assert weights[0].sum().item() == pytest.approx(1)
    assert all(int(one.argmax()) == 2 for one in weights)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shares_are_those_of_the_patches():
    target = torch.zeros(4, 6, dtype=torch.int64)
    target[0, 2:5] = 1
    target[3, 5] = 2
    shares = shares_of(target, 2, 3)
    assert shares.shape == (6, 3)
    assert shares[:, 1].tolist() == [0, 0.5, 0.25, 0, 0, 0]
    assert shares[:, 2].tolist() == [0, 0, 0, 0, 0, 0.25]
    assert torch.equal(shares.sum(1), torch.ones(6))


def test_wide_tokens_are_projected_on_the_same_directions():
    samples = [{"features": [torch.eye(16), 2 * torch.eye(16)], "target": torch.zeros(SIDE, SIDE, dtype=torch.int64)}]
    ((tokens, shares),) = Projected(samples, PATCH, 2, 5)
    assert (tokens.shape, shares.shape) == ((2, 16, 5), (16, 2))
    torch.testing.assert_close(tokens[0].T @ tokens[0], torch.eye(5))
    assert torch.equal(2 * tokens[0], tokens[1])
    ((whole, _),) = Projected(samples, PATCH, 2, 16)
    assert torch.equal(whole[0], torch.eye(16))
