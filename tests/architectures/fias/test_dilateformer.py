"""The DilateFormer: taps, norms, stochastic depth, weights to start from, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trifuse.architectures.fias import DilateFormer, dilateformer_base, dilateformer_small, dilateformer_tiny
from trifuse.architectures.fias.dilateformer import DilateFormerBlock
from trifuse.architectures.fias.variants import VARIANTS, DilateFormerShape
from trifuse.kernels import CheckpointError, ShapeError


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32)])
def test_four_maps_finest_first(height, width):
    encoder = DilateFormer("nano").eval()
    maps = encoder(image(2, 3, height, width))
    assert encoder.dims == (24, 48, 96, 192)
    assert [tuple(x.shape) for x in maps] == [
        (2, dim, height // step, width // step) for dim, step in zip(encoder.dims, (4, 8, 16, 32), strict=True)
    ]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_dim_is_the_same_everywhere(variant):
    shape = VARIANTS[variant]
    assert len({dim // heads for dim, heads in zip(shape.dims, shape.num_heads, strict=True)}) == 1


@pytest.mark.parametrize(
    ("build", "variant"), [(dilateformer_tiny, "tiny"), (dilateformer_small, "small"), (dilateformer_base, "base")]
)
def test_published_variants(build, variant):
    with torch.device("meta"):
        encoder = build(out_norm=False, num_classes=10)
    assert encoder.shape == VARIANTS[variant]
    assert encoder.head.out_features == 10
    assert not hasattr(encoder, "out_norms")


def test_every_map_has_its_norm():
    """Over channels, at each pixel: mean 0 and deviation 1 while scale and shift are what they start as."""
    for features in DilateFormer("nano").eval()(image(1, 3, 64, 64)):
        torch.testing.assert_close(features.mean(1), torch.zeros_like(features[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.std(1, correction=0), torch.ones_like(features[:, 0]), atol=1e-3, rtol=0)
    plain = DilateFormer("nano", out_norm=False).eval()(image(1, 3, 64, 64))
    assert all(float(features.detach().mean(1).abs().max()) > 1e-2 for features in plain[:-1])
    assert float(plain[-1].detach().mean(1).abs().max()) < 1e-5


def test_stages_two_and_two():
    """Local attention in the first two stages: a distant pixel changes nothing there, and all in the last two."""
    block = DilateFormerBlock(24, 3).eval()
    x = image(1, 12, 12, 24)
    moved = x.clone()
    moved[:, 0, 0] += 1.0
    changed = (block(moved) != block(x)).any(-1)[0]
    assert changed[:6, :6].any()
    assert not changed[6:].any()
    assert not changed[:, 6:].any()
    globally = DilateFormerBlock(24, 3, dilations=None).eval()
    assert bool((globally(moved) != globally(x)).any(-1).all())
    encoder = DilateFormer("nano")
    assert [[block.local for block in stage.blocks] for stage in encoder.stages] == [
        [True],
        [True],
        [False] * 2,
        [False],
    ]


# ------------------------------------------------------------------------------------------------ stochastic depth


def test_drop_path_grows_linearly_over_all_blocks():
    with torch.device("meta"):
        encoder = dilateformer_tiny(drop_path=0.11)
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])
    assert max(block.drop_path for stage in DilateFormer("nano").stages for block in stage.blocks) == pytest.approx(0.1)


@pytest.mark.parametrize("silent", ["mlp.fc2", "attn.proj"])
def test_drop_path_skips_whole_branches_of_single_samples(silent):
    """One branch gives nothing, so that only the other is left to be dropped."""
    block = DilateFormerBlock(12, 3, drop_path=0.5).requires_grad_(False)
    torch.nn.init.zeros_(block.get_submodule(silent).weight)
    x = image(1, 3, 3, 12).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    branch = block(x) - x - block.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    whole = block.eval()(x[:1]) - x[:1] - block.pos_embed(x[:1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    dropped = branch.abs().amax((1, 2, 3)) < 1e-6
    assert 150 < int(dropped.sum()) < 250
    kept = branch[~dropped]
    torch.testing.assert_close(kept, (2 * whole).expand_as(kept), atol=1e-5, rtol=1e-4)


def test_drop_path_draws_for_each_branch_anew():
    """Of two branches that add constants, each may be skipped while the other is not."""
    block = DilateFormerBlock(12, 3, drop_path=0.5).requires_grad_(False)
    for layer, constant in ((block.attn.proj, 1.0), (block.mlp.fc2, 4.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, constant)
    x = image(1, 3, 3, 12).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    added = block(x) - x - block.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    sums, times = added.mean((1, 2, 3)).round().unique(return_counts=True)
    assert sums.tolist() == [0.0, 2.0, 8.0, 10.0]
    assert times.min() > 70


def test_drop_path_never_in_evaluation():
    encoder = DilateFormer("nano", drop_path=0.9).eval()
    x = image(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(encoder(x), encoder(x), strict=True))


# ------------------------------------------------------------------------------------------------- random weights


def test_weights_follow_the_generator():
    def drawn(seed: int) -> dict[str, Tensor]:
        return DilateFormer("nano", generator=torch.Generator().manual_seed(seed)).state_dict()

    assert differing(drawn(0), drawn(0)) == []
    assert any(name.endswith("proj.0.weight") for name in differing(drawn(0), drawn(1)))


def test_random_weights_are_the_published_ones_in_kind():
    encoder = DilateFormer("nano", num_classes=5)
    stage = encoder.stages[0]
    qkv = stage.blocks[0].attn.qkv
    assert tuple(qkv.weight.shape) == (72, 24, 1, 1)
    for linear in (stage.blocks[0].mlp.fc1, encoder.stages[3].blocks[0].attn.qkv):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    for conv in (qkv, stage.downsample.proj[0]):  # uniform within 1 / sqrt(fan in), as PyTorch's
        bound = conv.weight[0].numel() ** -0.5
        assert bound * 0.9 < float(conv.weight.detach().abs().max()) <= bound
        assert 0 < float(conv.bias.detach().abs().max()) <= bound
    assert encoder.norm.eps == encoder.out_norms[0].eps == stage.blocks[0].norm1.eps == 1e-6


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"expected images of shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        ((1, 1, 64, 64), r"expected images of shape \(B, 3, H, W\), got \(1, 1, 64, 64\)"),
        ((1, 3, 60, 64), "height 60 is no multiple of 32; resize or pad the image"),
        ((1, 3, 64, 0), "width 0 is no multiple of 32"),
    ],
)
def test_images_of_other_shapes(shape, message):
    with pytest.raises(ShapeError, match=message):
        DilateFormer("nano")(torch.zeros(shape))


def test_b7_one_small_image_cannot_be_normalised_in_training():
    encoder = DilateFormer("nano")
    with pytest.raises(ShapeError, match="batch normalisation in training needs more than one value per channel"):
        encoder(image(1, 3, 32, 32))
    encoder(image(2, 3, 32, 32))
    encoder.eval()(image(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"embed_dim": 24, "depths": (1, 1, 1)}, "four stages of at least one block"),
        ({"embed_dim": 24, "depths": (1, 0, 1, 1)}, "four stages of at least one block"),
        ({"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (3, 3, 3)}, "four stages of at least one block"),
        ({"embed_dim": 20, "depths": (1, 1, 1, 1)}, "stage 1: 20 channels are no multiple of 3 heads"),
    ],
)
def test_shapes_that_cannot_be_built(shape, message):
    with pytest.raises(ValueError, match=message):
        DilateFormerShape(**shape)


def test_dilations_share_the_heads_of_both_stages():
    """Heads that three dilations cannot share, two can."""
    shape = DilateFormerShape(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(6, 4, 4, 4))
    with pytest.raises(ValueError, match="stage 2: 4 heads are no multiple of the 3 dilations"):
        DilateFormer(shape)
    encoder = DilateFormer(shape, dilations=(1, 4)).eval()
    assert encoder(image(1, 3, 32, 32))[0].shape == (1, 24, 8, 8)


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="variant: expected one of 'nano', 'tiny', 'small', 'base', got 'huge'"):
        DilateFormer("huge")
    with pytest.raises(ValueError, match=r"expected drop_path in \[0, 1\), got 1.0"):
        DilateFormer("nano", drop_path=1.0)
    with pytest.raises(CheckpointError, match="found nothing"):
        DilateFormer("nano", checkpoint="nowhere.pth")
