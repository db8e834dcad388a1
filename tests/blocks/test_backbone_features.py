"""Maps of other people's vision transformers: values against what the models themselves return, order, refusals."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from hugging_face import small_model
from timm_style import TimmStyleVit
from torch import nn

from trifuse.blocks import WeightedBlockFusion, backbone_features
from trifuse.kernels import ShapeError, TrifuseError


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


HUGGING_FACE = ["vit", "deit", "dinov2", "registers", "dinov3", "siglip", "clip"]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_maps_are_its_hidden_states_without_what_stands_before_the_patches(name):
    model, prefix = small_model(name)
    image = images(2, 3, 32, 32)
    with torch.no_grad():
        states = model(pixel_values=image, output_hidden_states=True).hidden_states[1:]
        maps = backbone_features(model, image)
    assert len(maps) == 4
    for one, tokens in zip(maps, states, strict=True):
        assert one.shape == (2, 16, 4, 4)
        # row by row: the token of patch (1, 2) is the seventh of 4 x 4
        torch.testing.assert_close(one[:, :, 1, 2], tokens[:, prefix + 6], rtol=0, atol=0)
        torch.testing.assert_close(one.flatten(2).mT, tokens[:, prefix:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip", "backbone"])
def test_the_final_norm_is_the_model_s_own(name):
    model, prefix = small_model(name)
    image = images(1, 3, 32, 32)
    with torch.no_grad():
        (last,) = backbone_features(model, image, [-1], norm=True)
        if name == "backbone":
            (expected,) = model(image).feature_maps
        else:
            expected = model(pixel_values=image).last_hidden_state[:, prefix:].mT.unflatten(-1, (4, 4))
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3"])
def test_an_image_of_another_size_and_not_square(name):
    """Tables of positions are resampled, which Hugging Face does for some models only where it is asked to."""
    model, prefix = small_model(name)
    image = images(1, 3, 24, 40)
    with torch.no_grad():
        maps = backbone_features(model, image, [2])
        resample = {"interpolate_pos_encoding": True} if name == "vit" else {}
        state = model(pixel_values=image, output_hidden_states=True, **resample).hidden_states[3]
    assert maps[0].shape == (1, 16, 3, 5)
    torch.testing.assert_close(maps[0], state[:, prefix:].mT.unflatten(-1, (3, 5)))


def backbone_of(kind):
    if kind == "timm":
        return TimmStyleVit().eval()
    if kind == "timm out of reach":
        return TimmStyleVit(reach=False).eval()
    return small_model(kind)[0]


@pytest.mark.parametrize("kind", ["timm", "timm out of reach"])
@pytest.mark.parametrize("norm", [False, True])
def test_timm_maps_are_those_of_its_own_method(kind, norm):
    model, image = backbone_of(kind), images(2, 3, 24, 40)
    expected = model.forward_intermediates(image, indices=[1, 3], norm=norm, intermediates_only=True)
    maps = backbone_features(model, image, [1, 3], norm=norm)
    for one, wanted in zip(maps, expected, strict=True):
        assert one.shape == (2, 16, 3, 5)
        torch.testing.assert_close(one, wanted)


def test_timm_runs_no_block_behind_the_last_one_asked_for():
    model = TimmStyleVit()
    backbone_features(model, images(1, 3, 16, 16), [2, 0])
    assert model.ran == [0, 1, 2]


@pytest.mark.parametrize("kind", ["vit", "timm", "timm out of reach", "list"])
def test_blocks_come_in_the_order_asked_for(kind):
    image = images(1, 3, 16, 16)
    model = [images(1, 8, 2, 2, seed=seed) for seed in range(4)] if kind == "list" else backbone_of(kind)
    every = backbone_features(model, image)
    asked = backbone_features(model, image, (-1, 0, 2, 0))
    for one, index in zip(asked, (3, 0, 2, 0), strict=True):
        assert torch.equal(one, every[index])
    assert backbone_features(model, image, ()) == []


@pytest.mark.parametrize("kind", ["dinov2", "timm"])
def test_gradients_flow_as_the_model_lets_them_and_its_hooks_are_gone(kind):
    model = backbone_of(kind)
    backbone_features(model, images(1, 3, 16, 16), [1])[0].square().sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    backbone_features(model, images(1, 3, 16, 16))
    with pytest.raises((RuntimeError, ValueError), match=r"channel"):
        backbone_features(model, images(1, 4, 16, 16))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_images_take_the_type_of_the_weights():
    model = TimmStyleVit().double()
    assert backbone_features(model, images(1, 3, 16, 16))[0].dtype == torch.float64


# --- fusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "timm", "timm out of reach", "list"])
def test_blocks_fused_as_they_finish_equal_stored_ones(kind):
    image, fusion = images(2, 3, 24, 40, dtype=torch.float64), WeightedBlockFusion(4, 2).double()
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0]))
    model = [images(2, 16, 3, 5, seed=seed, dtype=torch.float64) for seed in range(4)]
    model = model if kind == "list" else backbone_of(kind).double().requires_grad_(False)
    projection = nn.Linear(16, 3, bias=False).double()

    def gradients(y):
        return torch.autograd.grad(y, [fusion.logits, projection.weight], torch.ones_like(y))

    stored = fusion(backbone_features(model, image))
    assert stored.shape == (2, 16, 3, 5)
    expected = projection(stored.flatten(2).mT)
    produce = lambda receive: backbone_features(model, image, receive=receive)  # noqa: E731
    for recompute in (None, produce):
        streamed = fusion.streamed({3}, projection.weight, recompute)
        assert backbone_features(model, image, receive=streamed.add) == []
        kept, y = streamed.result()
        torch.testing.assert_close(y, expected)
        for got, wanted in zip(gradients(y), gradients(expected), strict=True):
            torch.testing.assert_close(got, wanted)
        assert list(kept) == [3]
        torch.testing.assert_close(kept[3].mT.unflatten(-1, (3, 5)), backbone_features(model, image, [3])[0])
        expected = projection(fusion(backbone_features(model, image)).flatten(2).mT)


@pytest.mark.parametrize("kind", ["dinov2", "timm"])
def test_streaming_keeps_no_map_but_the_one_at_hand(kind):
    model, alive, most = backbone_of(kind).requires_grad_(False), weakref.WeakSet(), []

    def receive(index, one):
        alive.add(one.untyped_storage())
        gc.collect()
        most.append(len(alive))

    backbone_features(model, images(1, 3, 16, 16), norm=True, receive=receive)
    assert len(most) == 4
    assert max(most) <= 2, "that of this block, and of the one before, which is just released"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_b17_maps_that_shrink_are_refused_before_the_model_runs():
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1]))
    swin.forward = None  # whoever calls it fails
    with pytest.raises(ShapeError, match=r"got SwinModel, whose maps shrink from stage to stage \(depths \[1, 1\]\)"):
        backbone_features(swin, images(1, 3, 32, 32))


def test_b17_declared_widths_and_grids_that_differ_are_refused_before_the_model_runs():
    model = TimmStyleVit()
    model.forward_intermediates = lambda *arguments, **options: pytest.fail("the model ran")
    model.feature_info[2] = {"module": "blocks.2", "num_chs": 32, "reduction": 16}
    message = r"got 16 channels at 1/8 of the image of block 0 and 32 at 1/16 of block 2; choose blocks that agree"
    with pytest.raises(ShapeError, match=message):
        backbone_features(model, images(1, 3, 16, 16))
    del model.forward_intermediates
    assert len(backbone_features(model, images(1, 3, 16, 16), [0, 1])) == 2


class Widening(nn.Module):
    """A block that doubles the width."""

    def forward(self, x, *arguments, **options):
        return torch.cat([x, x], dim=-1)


def test_b17_widths_that_are_not_declared_are_refused_with_the_first_block_that_differs():
    model = TimmStyleVit()
    model.blocks[2] = Widening()
    with pytest.raises(ShapeError, match="expected maps of one width, got 32 channels of block 2 after 16"):
        backbone_features(model, images(1, 3, 16, 16), (0, 2))


def test_b17_another_grid_is_refused():
    model = TimmStyleVit(patch=4)
    for info in model.feature_info:
        info["reduction"] = 8
    with pytest.raises(ShapeError, match=r"of block 0 the tokens of the image's 8 x 8 patches, 64 and a few before"):
        backbone_features(model, images(1, 3, 64, 64))


@pytest.mark.parametrize("second", [(1, 8, 2, 3), (1, 9, 2, 2)])
def test_b17_a_list_of_different_maps_is_refused(second):
    message = r"got \(1, 8, 2, 2\) at 0 and \(1, \d, 2, \d\) at 1; choose blocks that agree"
    with pytest.raises(ShapeError, match=message):
        backbone_features([torch.zeros(1, 8, 2, 2), torch.zeros(second)])


def test_b17_tokens_are_refused_with_the_line_that_makes_maps_of_them():
    with pytest.raises(ShapeError, match=r"got \(1, 4, 8\) at 0; .*tokens\.mT\.unflatten\(-1, \(h, w\)\)"):
        backbone_features([torch.zeros(1, 4, 8)])
    with pytest.raises(ShapeError, match="got str at 0"):
        backbone_features(["map"])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16)])
def test_b17_what_is_no_batch_of_images_is_refused(shape):
    hint = r"; add the batch dimension with image\[None\]"
    with pytest.raises(ShapeError, match=r"expected images \(B, 3, H, W\), got \(\d+, \d+, 16\)" + hint):
        backbone_features(TimmStyleVit(), torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"got \(1, 1, 3, 16, 16\)$"):
        backbone_features(TimmStyleVit(), torch.zeros(1, 1, 3, 16, 16))


def test_b17_an_image_that_patches_do_not_divide_is_refused():
    for shape, message in (
        ((1, 3, 20, 16), "height divisible by the patch size 8, got 20; use 16"),
        ((1, 3, 16, 3), "width divisible by the patch size 8, got 3; use 8"),
    ):
        with pytest.raises(ShapeError, match=message):
            backbone_features(TimmStyleVit(), torch.zeros(shape))


def test_other_arguments_that_make_no_sense_are_refused():
    model, image = TimmStyleVit(), torch.zeros(1, 3, 16, 16)
    with pytest.raises(TypeError, match="expected images"):
        backbone_features(model)
    with pytest.raises(TypeError, match=r"floating-point images, got torch\.uint8"):
        backbone_features(model, image.byte())
    with pytest.raises(ValueError, match="block 4 does not exist; there are blocks 0 to 3"):
        backbone_features(model, image, [4])
    with pytest.raises(ValueError, match="expected blocks 'all' or a sequence of indices, got 'last'"):
        backbone_features(model, image, "last")
    with pytest.raises(TypeError, match=r"forward_intermediates and feature_info, or a list of maps .* got Conv2d"):
        backbone_features(nn.Conv2d(3, 8, 3), image)
    del model.norm
    model.patch_embed.norm = None
    with pytest.raises(TrifuseError, match=r"a final norm in TimmStyleVit, .*; found none: .*norm=False"):
        backbone_features(model, image, norm=True)


def test_blocks_that_are_not_in_one_list_are_refused():
    model = small_model("vit")[0]
    model.layers = nn.ModuleList(list(model.layers)[:3])
    with pytest.raises(TypeError, match="expected the 4 blocks of ViTModel in one list"):
        backbone_features(model, images(1, 3, 32, 32))


def test_transformers_is_never_imported():
    program = "import sys, trifuse.blocks; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
