"""The decoder's parts: what it starts from, blocks without attention, and heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.architectures.fias.decoder import Bottleneck, FiasDecoder, PlainBlock

DIMS = (12, 24, 48, 96)


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(batch: int = 2, side: int = 16) -> list[Tensor]:
    return [tensors(batch, dim, side >> level, side >> level, seed=level) for level, dim in enumerate(DIMS)]


@pytest.mark.parametrize(("kind", "inner"), [("conv", (4, 6)), ("down", (2, 3))])
def test_bottlenecks(kind, inner):
    x = tensors(2, 8, 4, 6)
    bottleneck = Bottleneck(kind, 8).eval()
    inside = bottleneck.conv(x)
    assert tuple(inside.shape) == (2, 8, *inner)
    expected = F.interpolate(inside, size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(bottleneck(x), expected)


def test_no_bottleneck():
    x = tensors(2, 8, 3, 3)
    assert torch.equal(Bottleneck("none", 8)(x), x)


def test_a_plain_block_is_two_convolutions():
    block = PlainBlock(12, 24, "batch").eval()
    x, skip = tensors(2, 24, 3, 4), tensors(2, 12, 6, 8)
    up = block.join.up(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
    torch.testing.assert_close(block(x, skip), block.out(block.join.conv(torch.cat([up, skip], dim=1))))


@pytest.mark.parametrize("mixing", [True, False])
def test_logits_come_from_the_last_three_blocks(mixing):
    decoder = FiasDecoder(DIMS, (4, 4, 4, 2), num_classes=5, mixing=mixing).eval()
    outputs = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, given, out: outputs.append(out))
    features = maps()
    logits = decoder(features)
    assert [tuple(x.shape) for x in outputs] == [tuple(x.shape) for x in features[::-1]]
    assert len(logits) == 3
    for head, block_output, result in zip(decoder.heads, outputs[1:], logits, strict=True):
        torch.testing.assert_close(result, head(block_output))


def test_heads_start_small():
    decoder = FiasDecoder(DIMS, (4, 4, 4, 2), num_classes=50)
    for head in decoder.heads:
        assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
        assert not head.bias.any()
