"""The frozen encoder: what it returns, that it stays frozen, what it refuses, and how little it holds."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.dino_unet.variants import VARIANTS, EncoderShape
from trifuse.kernels import ShapeError, TrifuseError
from trifuse.kernels.testing import peak_memory_bytes

SMALLEST = EncoderShape(embed_dim=8, depth=3, num_heads=2, native_grid=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(**options):
    return DinoV2Encoder("tiny", generator=seeded(), **options)


def images(*shape, seed=1):
    return torch.randn(*shape, generator=seeded(seed))


# ----------------------------------------------------------------------------------------------- what it returns


def test_features_and_grid():
    encoder = tiny()
    result = encoder(images(2, 3, 42, 56))
    assert result["grid"] == encoder.grid_of(images(2, 3, 42, 56)) == (3, 4)
    assert [tuple(features.shape) for features in result["features"]] == [(2, 12, 64)] * 4
    assert all(features.is_contiguous() for features in result["features"])
    assert (encoder.embed_dim, encoder.depth, encoder.patch_size) == (64, 4, 14)


def test_tokens_are_row_major():
    """A patch changed at row 1, column 2 of the grid is token 1 * 4 + 2 before any block mixes tokens."""
    encoder, image = tiny(), images(1, 3, 42, 56)
    changed = image.clone()
    changed[..., 14:28, 28:42] += 1
    moved = (encoder.embed(changed) != encoder.embed(image)).any(dim=2)[0, 1:]
    assert moved.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("blocks", [[3, 1], [1, 3], (3, 1, 3), [-1, 1], range(1, 4, 2), {3: "", 1: ""}.keys()], ids=str)
def test_ordering_trap_features_come_in_ascending_order(blocks):
    encoder, image = tiny(), images(1, 3, 28, 28)
    everything = encoder(image)["features"]
    some = encoder(image, blocks)["features"]
    assert len(some) == 2
    assert torch.equal(some[0], everything[1])
    assert torch.equal(some[1], everything[3])


def test_iterate_names_each_map():
    encoder, image = tiny(), images(1, 3, 28, 28)
    everything = encoder(image)["features"]
    for blocks, expected in (("all", [0, 1, 2, 3]), ([2, 0], [0, 2]), ([], [])):
        streamed = list(encoder.iterate(image, blocks))
        assert [index for index, _ in streamed] == expected
        assert all(torch.equal(tokens, everything[index]) for index, tokens in streamed)


def test_blocks_after_the_last_one_asked_for_are_not_run():
    encoder, ran = tiny(), []
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(images(1, 3, 14, 14), [1])
    assert ran == [0, 1]


def test_norm_blocks():
    """With it every map has the final norm's scale; without it the raw stream comes out, norm and all left to do."""
    encoder, image = tiny(), images(1, 3, 28, 28)
    normed = encoder(image)["features"]
    encoder.norm_blocks = False
    raw = encoder(image)["features"]
    for with_norm, without in zip(normed, raw, strict=True):
        torch.testing.assert_close(encoder.norm(without), with_norm)
        assert not torch.allclose(without, with_norm)
        assert without.is_contiguous()


@pytest.mark.parametrize("norm_blocks", [True, False])
def test_maps_may_be_changed_in_place(norm_blocks):
    """No map is a view of the stream that the next block reads."""
    encoder, image = tiny(norm_blocks=norm_blocks), images(1, 3, 28, 28)
    expected = encoder(image)["features"][-1]
    for index, tokens in encoder.iterate(image):
        if index < 3:
            tokens.zero_()
    assert torch.equal(tokens, expected)


def test_samples_do_not_mix():
    encoder, batch = tiny(), images(3, 3, 28, 28)
    together = encoder(batch)["features"][-1]
    for i in range(3):
        torch.testing.assert_close(encoder(batch[i : i + 1])["features"][-1], together[i : i + 1])


@pytest.mark.parametrize("num_registers", [0, 4])
def test_registers_are_used_and_dropped(num_registers):
    encoder, image = tiny(num_registers=num_registers), images(1, 3, 28, 42)
    before = encoder(image)["features"][-1]
    assert before.shape == (1, 6, 64)
    assert ("register_tokens" in encoder.state_dict()) == bool(num_registers)
    if num_registers:
        stream = encoder.embed(image)
        assert stream.shape == (1, 1 + 4 + 6, 64)
        torch.testing.assert_close(stream[:, 1:5], encoder.register_tokens)  # no position is added to them
        encoder.register_tokens.add_(1)
        assert not torch.allclose(encoder(image)["features"][-1], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type(dtype):
    """The images are converted to the weights' type, and low precision costs what it costs."""
    image = images(1, 3, 42, 28)
    expected = tiny()(image)["features"][-1]
    encoder = DinoV2Encoder("tiny", dtype=dtype)
    encoder.load_state_dict(tiny().state_dict())
    features = encoder(image)["features"][-1]
    assert features.dtype == dtype
    difference = (features.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 8 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps


def test_k25_autocast_runs():
    encoder, image = tiny(), images(1, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(image)["features"][-1]
    torch.testing.assert_close(features.float(), encoder(image)["features"][-1], atol=0.1, rtol=0.1)


# -------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("pos_mode", ["offset", "size", "antialias"])
@given(st.integers(1, 40), st.integers(1, 40))
def test_positions_have_exactly_the_grid(pos_mode, h, w):
    encoder = DinoV2Encoder(EncoderShape(embed_dim=2, depth=1, num_heads=1), pos_mode=pos_mode)
    positions = encoder.positions((h, w))
    assert positions.shape == (1, 1 + h * w, 2)
    assert torch.equal(positions[:, :1], encoder.pos_embed[:, :1])
    assert bool(positions.isfinite().all())


def test_positions_are_left_alone_only_on_the_native_square():
    encoder = DinoV2Encoder(EncoderShape(embed_dim=4, depth=1, num_heads=1, native_grid=4))
    assert encoder.positions((4, 4)) is encoder.pos_embed
    assert not torch.allclose(encoder.positions((2, 8)), encoder.pos_embed)  # as many patches, but not square


def test_positions_follow_rows_and_columns():
    """A table that rises along columns only still does so after resampling, on a grid that is not square."""
    encoder = DinoV2Encoder(EncoderShape(embed_dim=1, depth=1, num_heads=1, native_grid=6), pos_mode="size")
    encoder.pos_embed[:, 1:] = torch.arange(6.0).expand(6, 6).reshape(1, 36, 1)
    resampled = encoder.positions((3, 5))[0, 1:, 0].unflatten(0, (3, 5))
    assert bool((resampled.diff(dim=1) > 0.5).all())
    torch.testing.assert_close(resampled, resampled[:1].expand(3, 5))


def test_position_modes_differ_and_are_checked():
    image = images(1, 3, 42, 42)
    maps = [tiny(pos_mode=mode)(image)["features"][-1] for mode in ("offset", "size", "antialias")]
    assert not any(torch.allclose(maps[i], maps[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(ValueError, match=r"pos_mode: expected one of 'offset', 'size', 'antialias'.*, got 'bicubic'"):
        tiny(pos_mode="bicubic")


# ------------------------------------------------------------------------------------------------ it stays frozen


def test_b12_survives_train_and_records_nothing():
    encoder, image = tiny(), images(1, 3, 28, 28).requires_grad_()
    network = torch.nn.Sequential(encoder).train()
    assert network.training
    assert not any(module.training for module in encoder.modules())
    assert encoder.train() is encoder
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(features.requires_grad for features in encoder(image)["features"])
    assert not any(tokens.requires_grad for _, tokens in encoder.iterate(image))


def test_b12_gradients_are_recorded_around_the_encoder():
    """Its no_grad ends with each step of the iterator: what the consumer does in between is recorded."""
    encoder, weight = tiny(), torch.ones(4, requires_grad=True)
    total = 0
    for index, tokens in encoder.iterate(images(1, 3, 14, 14)):
        assert torch.is_grad_enabled()
        total = total + weight[index] * tokens.square().mean()
    total.backward()
    assert bool((weight.grad > 0).all())


def test_b12_an_optimiser_step_does_not_move_it():
    encoder = tiny()
    before = copy.deepcopy(encoder.state_dict())
    network = torch.nn.ModuleList([encoder, torch.nn.Linear(64, 1)])
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network[1](encoder(images(1, 3, 14, 14))["features"][-1]).sum().backward()
    optimiser.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_b12_refuses_to_be_unfrozen():
    encoder = tiny()
    assert encoder.requires_grad_(False) is encoder
    with pytest.raises(TrifuseError, match="the encoder is frozen"):
        encoder.requires_grad_()
    torch.nn.Sequential(encoder).requires_grad_(True)  # goes past the module, straight to its parameters
    with pytest.raises(TrifuseError, match="cls_token was asked to require gradients, but the encoder is frozen"):
        encoder(images(1, 3, 14, 14))
    with pytest.raises(TrifuseError, match="the encoder is frozen"):
        next(encoder.iterate(images(1, 3, 14, 14)))


# ---------------------------------------------------------------------------------------------- random weights


def test_random_weights_follow_the_generator_alone():
    state = torch.random.get_rng_state()
    encoder, again, other = tiny(), tiny(), DinoV2Encoder("tiny", generator=seeded(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    assert not torch.equal(encoder.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = DinoV2Encoder("tiny").pos_embed
        torch.manual_seed(5)
        assert torch.equal(DinoV2Encoder("tiny").pos_embed, first)


def test_random_weights_are_sensible():
    encoder = tiny()
    for name, parameter in encoder.named_parameters():
        if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias") or name == "mask_token":
            assert not parameter.any(), name
        elif name != "cls_token":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    features = encoder(images(2, 3, 42, 42))["features"]
    assert all(bool(f.isfinite().all()) and 0.5 < f.std() < 2 for f in features)
    assert features[0].flatten(0, 1).std(dim=0).mean() > 0.1  # tokens of different patches differ


def test_built_without_memory_on_the_meta_device():
    with torch.device("meta"):
        encoder = DinoV2Encoder("giant", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_136_480_768
    assert {(parameter.device.type, parameter.dtype) for parameter in encoder.parameters()} == {
        ("meta", torch.bfloat16)
    }
    with torch.device("meta"):
        result = encoder(torch.empty(2, 3, 448, 448), [39])
    assert (result["features"][0].shape, result["grid"]) == ((2, 1024, 1536), (32, 32))


def test_head_width_is_64_in_every_published_variant():
    assert {shape.embed_dim // shape.num_heads for name, shape in VARIANTS.items() if name != "tiny"} == {64}


# -------------------------------------------------------------------------------------- copies, memory, NaN


def test_b14_copies_and_pickles():
    encoder, image = tiny(num_registers=1), images(1, 3, 28, 28)
    stream = io.BytesIO()
    torch.save(encoder, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(encoder), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(image)["features"][-1], encoder(image)["features"][-1])
        assert not twin.train().training
        assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_iterate_keeps_no_map_that_it_handed_out():
    encoder, handed_out = tiny(), []
    for _, tokens in encoder.iterate(images(1, 3, 28, 28)):
        handed_out.append(weakref.ref(tokens))
        del tokens
        gc.collect()
        assert handed_out[-1]() is None


def test_peak_memory_of_streaming_does_not_grow_with_depth():
    def peak(depth, norm_blocks):
        shape = EncoderShape(embed_dim=64, depth=depth, num_heads=2, native_grid=8)
        encoder, image = DinoV2Encoder(shape, norm_blocks=norm_blocks), images(1, 3, 224, 224)

        def accumulate():
            fused = None
            for _, tokens in encoder.iterate(image):
                fused = tokens / depth if fused is None else fused.add_(tokens, alpha=1 / depth)

        return peak_memory_bytes(accumulate)

    for norm_blocks in (True, False):
        assert peak(40, norm_blocks) <= 1.2 * peak(4, norm_blocks)


def test_nan_stays_in_its_sample():
    batch = images(2, 3, 28, 28)
    batch[1, 0, 0, 0] = math.nan
    features = tiny()(batch)["features"][-1]
    assert bool(features[0].isfinite().all())
    assert bool(features[1].isnan().any())


# ----------------------------------------------------------------------------------------------------- refusals


@given(st.integers(1, 60))
def test_b1_sizes_that_are_no_multiples_are_refused_with_the_nearest_one(side):
    encoder, image = DinoV2Encoder(SMALLEST), torch.zeros(1, 3, side, 28)
    if side % 14 == 0:
        assert encoder(image)["grid"] == (side // 14, 2)
        return
    nearest = min(range(14, 90, 14), key=lambda multiple: (abs(multiple - side), multiple % 28))
    with pytest.raises(ShapeError, match=rf"height {side} is not divisible by the patch size 14; use {nearest} "):
        encoder(image)
    with pytest.raises(ShapeError, match=rf"width {side} is not divisible"):
        encoder.grid_of(image.mT)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 28, 28), r"got \(1, 1, 28, 28\); repeat a grey image with images.expand\(-1, 3, -1, -1\)"),
        ((1, 4, 28, 28), r"choose 3 of the 4 channels, e.g. images\[:, :3\] of an RGBA image"),
        ((3, 28, 28), r"expected images \(B, 3, H, W\), got \(3, 28, 28\); add the batch with image\[None\]"),
        ((28, 28), r"expected images \(B, 3, H, W\), got \(28, 28\)"),
        ((2, 28, 28, 3), r"channels come second: use images.permute\(0, 3, 1, 2\)"),
        ((2, 28, 28, 1), r"channels come second: use images.permute\(0, 3, 1, 2\)"),
        ((1, 3, 0, 28), "height 0 is not divisible by the patch size 14; use 14"),
    ],
)
def test_b2_b3_b4_wrong_layouts_are_refused_with_advice(shape, message):
    encoder = DinoV2Encoder(SMALLEST)
    for use in (encoder, encoder.grid_of):
        with pytest.raises(ShapeError, match=message):
            use(torch.zeros(shape))


def test_k1_images_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"expected normalised images of a floating-point type, got torch\.uint8"):
        tiny()(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_empty_batch_gives_empty_maps():
    features = tiny()(torch.zeros(0, 3, 28, 28))["features"]
    assert [tuple(f.shape) for f in features] == [(0, 4, 64)] * 4


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([4], "block 4 does not exist; it has blocks 0 to 3"),
        ([0, -5], "block -5 does not exist"),
        ("last4", "expected blocks 'all' or a sequence of indices, got 'last4'"),
    ],
)
def test_unknown_blocks_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        tiny()(images(1, 3, 14, 14), blocks)


def test_impossible_encoders_are_refused():
    with pytest.raises(ValueError, match=r"variant: expected one of 'tiny', .*'giant', got 'huge'"):
        DinoV2Encoder("huge")
    with pytest.raises(TypeError, match=r"expected a floating-point dtype, got torch\.int8"):
        tiny(dtype=torch.int8)
    with pytest.raises(ShapeError, match="dim 10 is not a multiple of num_heads 3"):
        DinoV2Encoder(EncoderShape(embed_dim=10, depth=1, num_heads=3))
