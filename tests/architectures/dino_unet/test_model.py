"""DINO-UNet as a whole: options, gradients, streaming, sizes, copies, files."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trifuse.architectures import dino_unet
from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig, DinoV2Encoder
from trifuse.architectures.dino_unet.variants import EncoderShape
from trifuse.architectures.storage.pretrained import write_safetensors
from trifuse.kernels import CheckpointError, ShapeError
from trifuse.kernels.testing.measuring import peak_memory_bytes

SHAPE = EncoderShape(embed_dim=16, depth=6, num_heads=2, native_grid=3)
TINY = DinoUNetConfig(variant=SHAPE, channels=(8, 8, 4, 4), bottleneck_dim=8)
DEAD = {"bottleneck": "last", "skip_scale": "none"}


def network(**options) -> DinoUNet:
    return DinoUNet(replace(TINY, **options))


def double(**options) -> DinoUNet:
    return network(encoder_dtype="float64", **options).double()


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread_logits(model: DinoUNet, seed=0) -> None:
    """Make the block weights unequal, so that an index that is wrong is seen."""
    with torch.no_grad():
        model.fusion.logits.copy_(torch.randn(SHAPE.depth, generator=torch.Generator().manual_seed(seed)))


def backward(model: DinoUNet, image: torch.Tensor) -> torch.Tensor:
    logits = model(image)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits


# --- the definition ---------------------------------------------------------------------------------------------------


def test_forward_is_the_figure():
    """Weighing, selection, scaling and order into the stages, written out; the decoder has its own test."""
    model, image = double(), images(2, 3, 42, 28, dtype=torch.float64)
    spread_logits(model)
    features = model.encoder(image)["features"]
    w = torch.softmax(model.fusion.logits, 0)
    selected = sorted(torch.topk(w, 4).indices.tolist(), reverse=True)
    fused = sum(w[i] * features[i] for i in range(SHAPE.depth)) @ model.decoder.proj_fused.weight.T
    scales = [4 * w[i] / sum(w[j] for j in selected) for i in selected]
    expected = model.decoder(features[-1], fused, [features[i] for i in selected], scales, (3, 2), image)
    torch.testing.assert_close(model(image), expected)
    assert expected.shape == (2, 2, 42, 28)


@pytest.mark.parametrize(
    ("selection", "stages"),
    [("last4", [5, 4, 3, 2]), ("fixed:[4,2,1,0]", [4, 2, 1, 0]), ("fixed:[0,1,2,4]", [0, 1, 2, 4])],
)
@pytest.mark.parametrize("stream", [False, True])
def test_fixed_blocks_reach_the_stages_in_the_order_listed(selection, stages, stream):
    model, image = double(block_selection=selection, stream_fusion=stream), images(2, 3, 28, 28, dtype=torch.float64)
    features = model.encoder(image)["features"]
    expected = model.decoder(features[-1], None, [features[i] for i in stages], None, (2, 2), image)
    torch.testing.assert_close(model(image), expected)


def test_7531_is_not_reversed():
    model = network(variant=replace(SHAPE, depth=12), block_selection="fixed:[7,5,3,1]")
    seen = []
    for skip in model.decoder.skips:
        skip.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    image = images(1, 3, 28, 28)
    model.eval()(image)
    features = model.encoder(image)["features"]
    assert all(torch.equal(tokens, features[i]) for tokens, i in zip(seen, [7, 5, 3, 1], strict=True))
    assert network(
        variant=replace(SHAPE, depth=12), block_selection="fixed:[8,6,4,2]", index_base=1
    ).fusion.selected == (
        7,
        5,
        3,
        1,
    )


def test_fixed_modes_have_no_logits_and_no_fused_map():
    model = network(block_selection="last4", bottleneck="fused", skip_scale="raw")
    names = dict(model.named_parameters())
    assert not any("logits" in name or "proj_fused" in name for name in names)
    assert "decoder.proj_last.weight" in names


def test_skip_scale_raw_and_none():
    image = images(2, 3, 28, 28, dtype=torch.float64)
    results = []
    for kind in ("renorm", "raw", "none"):
        model = double(skip_scale=kind)
        spread_logits(model)
        seen = []
        model.decoder.register_forward_pre_hook(lambda module, arguments, seen=seen: seen.append(arguments[3]))
        model(image)
        results.append((seen[0], model.fusion.weights[list(model.fusion.selected)]))
    (renorm, weights), (raw, _), (none, _) = results
    torch.testing.assert_close(renorm, 4 * weights / weights.sum())
    assert renorm.mean().item() == pytest.approx(1)
    torch.testing.assert_close(raw, weights)
    assert none is None


def test_options_reach_the_parts_that_they_are_for():
    encoder = network(pos_mode="size", norm_blocks=False, num_registers=2, encoder_dtype="bfloat16").encoder
    assert (encoder.pos_mode, encoder.norm_blocks, encoder.num_registers) == ("size", False, 2)
    assert encoder.cls_token.dtype == torch.bfloat16
    decoder = network(norm="group", final_resize="features", convs_per_stage=2, conv_then_resize=True).decoder
    assert all(image.conv_then_resize for image in decoder.images)
    assert [len(stage.convs) for stage in decoder.stages] == [2] * 4
    assert decoder.resize_features
    assert not any(isinstance(module, nn.BatchNorm2d) for module in decoder.modules())
    assert network(order="weight").fusion.order == "weight"


def test_the_encoder_starts_from_a_checkpoint(tmp_path):
    source = DinoV2Encoder("tiny", generator=torch.Generator().manual_seed(1))
    write_safetensors(tmp_path / "dinov2.safetensors", source.state_dict())
    model = dino_unet.dino_unet_tiny(encoder_checkpoint=str(tmp_path / "dinov2.safetensors"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name


# --- gradients --------------------------------------------------------------------------------------------------------

LEGAL = [
    {"bottleneck": bottleneck, "skip_scale": scale, "norm": norm}
    for bottleneck, scale, norm in itertools.product(
        ["last+fused", "last", "fused"], ["renorm", "raw", "none"], ["batch", "instance", "group"]
    )
    if (bottleneck, scale) != ("last", "none")
]


@pytest.mark.parametrize("options", LEGAL, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("stream", ["stored", "project", "recompute"])
def test_gradient_reaches_the_block_weights_in_every_legal_combination(options, stream):
    streaming = {} if stream == "stored" else {"stream_fusion": True, "stream_gradient": stream}
    model = double(**options, **streaming)
    spread_logits(model)
    backward(model, images(2, 3, 42, 28, dtype=torch.float64))
    grad = model.fusion.logits.grad
    assert grad.abs().max() > 1e-6
    assert grad.sum().abs() < 1e-12 * max(1, grad.abs().max())


def test_scaled_skips_train_the_block_weights_as_finite_differences_say():
    """The scale comes after the skip's norm: before it, batch normalisation would cancel it."""
    model, image = double(bottleneck="last"), images(2, 3, 28, 28, dtype=torch.float64)
    spread_logits(model)
    target = images(2, 2, 28, 28, seed=1, dtype=torch.float64)
    (model(image) * target).sum().backward()
    grad, step = model.fusion.logits.grad.clone(), 1e-6
    assert grad.abs().max() > 1e-2 * model.decoder.stages[0].convs[0].norm.bias.grad.abs().max()
    with torch.no_grad():
        for i in range(SHAPE.depth):
            values = []
            for sign in (1, -1):
                model.fusion.logits[i] += sign * step
                values.append((model(image) * target).sum())
                model.fusion.logits[i] -= sign * step
            assert (values[0] - values[1]).item() / (2 * step) == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-6)


def test_dead_combination_is_refused():
    with pytest.raises(ValueError, match="would leave the learned block weights without any gradient"):
        network(**DEAD)
    network(**DEAD, block_selection="last4")


def test_a_step_leaves_the_encoder_alone_and_moves_the_rest():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    backward(model, images(2, 3, 28, 28))
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, tensor in model.state_dict().items():
        unchanged = name.startswith("encoder.") or name == "fusion.frozen_selection"
        assert torch.equal(tensor, before[name]) == unchanged, name


def test_b12_train_leaves_the_encoder_in_eval():
    model = network().train()
    assert model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_gradient", ["project", "recompute"])
@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_scale": "raw", "order": "weight"},
        {"skip_scale": "none"},
        {"bottleneck": "fused"},
        {"bottleneck": "last"},
        {"block_selection": "last4"},
        {"norm_blocks": False},
    ],
    ids=str,
)
def test_streaming_equals_stored(options, dtype, relative, stream_gradient):
    """Against float64, so that in float32 what both lose by rounding is not held against streaming."""
    image = images(2, 3, 42, 28, dtype=getattr(torch, dtype))
    stored = network(encoder_dtype=dtype, norm="group", **options).to(image.dtype)
    if stored.fusion.logits is not None:
        spread_logits(stored)
    exact = copy.deepcopy(stored).double()
    streaming = network(
        stream_fusion=True, stream_gradient=stream_gradient, encoder_dtype=dtype, norm="group", **options
    ).to(image.dtype)
    streaming.load_state_dict(stored.state_dict())

    def results(model, image):
        logits = backward(model, image)
        return {"": logits} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    wanted, got, truth = results(stored, image), results(streaming, image), results(exact, image.double())
    for name in truth:
        lost = (wanted[name] - truth[name]).abs().max()
        assert (got[name] - truth[name]).abs().max() <= 2 * lost + relative * truth[name].abs().max(), name


def test_streaming_runs_no_block_that_nobody_needs():
    model = network(stream_fusion=True, bottleneck="last")
    asked = []
    iterate = model.encoder.iterate
    model.encoder.iterate = lambda x, blocks: asked.append(blocks) or iterate(x, blocks)
    model(images(2, 3, 28, 28))
    assert asked == [sorted({*model.fusion.selected, SHAPE.depth - 1})]


GIANT_PROPORTIONS = EncoderShape(embed_dim=96, depth=4, num_heads=2, ffn="swiglu", native_grid=16)


def peak(depth: int, pass_: str, **options) -> int:
    """Peak extra memory with the bottleneck six times narrower than the tokens, as in the giant variant."""
    model = DinoUNet(
        DinoUNetConfig(
            variant=replace(GIANT_PROPORTIONS, depth=depth), channels=(16, 8, 4, 2), bottleneck_dim=16, **options
        )
    )
    image = images(1, 3, 224, 224)
    keep = {*model.fusion.selected, depth - 1}

    def encode_and_fuse():
        if not model.config.stream_fusion:
            features = model.encoder(image)["features"]
            return features, model.decoder.proj_fused(model.fusion(features))
        recompute = (lambda: model.encoder.iterate(image)) if model.config.stream_gradient == "recompute" else None
        return model.fusion.stream(model.encoder.iterate(image), keep, model.decoder.proj_fused.weight, recompute)

    def encode_fuse_and_differentiate():
        kept, fused = encode_and_fuse()
        fused.sum().backward()
        return kept

    @torch.no_grad()
    def infer():
        return encode_and_fuse()

    passes = {"infer": infer, "fuse": encode_fuse_and_differentiate, "step": lambda: backward(model, image)}
    passes[pass_]()
    return peak_memory_bytes(passes[pass_])


@pytest.mark.parametrize(
    ("pass_", "stream_gradient", "bound"),
    [
        ("infer", "project", 1.3),
        ("fuse", "recompute", 1.3),
        ("step", "project", 1.3),
        ("step", "recompute", 1.3),
        ("fuse", "project", 1.5),
    ],
)
def test_streaming_memory_hardly_grows_with_depth(pass_, stream_gradient, bound):
    """40 blocks against 4. Only the pass that keeps projections grows with them: by a sixth of a map for each block."""
    options = {"stream_fusion": True, "stream_gradient": stream_gradient}
    assert peak(40, pass_, **options) <= bound * peak(4, pass_, **options)


def test_stored_memory_does_grow_with_depth():
    assert peak(40, "fuse") > 3 * peak(4, "fuse")


# --- cached features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"bottleneck": "last"}, {"block_selection": "last4"}, {"block_selection": "fixed:[3,0,2,1]"}]
)
def test_features_from_a_cache_give_the_same(options):
    model, image = double(**options), images(2, 3, 28, 42, dtype=torch.float64)
    blocks = model.required_blocks()
    encoded = model.encoder(image, blocks)
    assert torch.equal(model.forward_features(encoded["features"], encoded["grid"], image), model(image))


def test_required_blocks():
    assert network().required_blocks() == tuple(range(6))
    assert network(block_selection="last4").required_blocks() == (2, 3, 4, 5)
    assert network(block_selection="fixed:[3,0,2,1]").required_blocks() == (0, 1, 2, 3, 5)


def test_wrong_number_of_features():
    model = network(block_selection="last4")
    with pytest.raises(ShapeError, match=r"the features of blocks \(2, 3, 4, 5\), got 6 maps"):
        model.forward_features([images(1, 4, 16)] * 6, (2, 2), images(1, 3, 28, 28))


# --- sizes and channels -----------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["error", "pad", "resize"]))
@settings(max_examples=30)
def test_b1_any_size_is_segmented_whole_or_refused(height, width, policy):
    model, image = MODELS_BY_POLICY[policy], images(1, 3, height, width)
    if policy == "error" and (height % 14 or width % 14):
        with pytest.raises(ShapeError, match=r"(height|width) \d+ is not divisible by the patch size 14; use \d+"):
            model(image)
    else:
        assert model(image).shape == (1, 2, height, width)


MODELS_BY_POLICY = {policy: network(size_policy=policy).eval() for policy in ("error", "pad", "resize")}


def test_b1_padding_repeats_the_border_and_resizing_goes_to_the_nearest_multiple():
    image = images(1, 3, 30, 41)
    plain = MODELS_BY_POLICY["error"]
    padded = F.pad(image, (0, 1, 0, 12), mode="replicate")
    assert torch.equal(MODELS_BY_POLICY["pad"](image), plain(padded)[..., :30, :41])
    assert torch.equal(MODELS_BY_POLICY["pad"].prepare(image), padded)
    assert MODELS_BY_POLICY["resize"].prepare(image).shape == (1, 3, 28, 42)


@pytest.mark.parametrize("policy", ["error", "pad", "resize"])
def test_b1_a_size_that_fits_is_left_alone(policy):
    image = images(1, 3, 42, 14)
    assert torch.equal(MODELS_BY_POLICY[policy](image), MODELS_BY_POLICY["error"](image))


def test_b2_grey_images_are_repeated_where_declared():
    image = images(2, 1, 28, 28)
    declared = network(in_channels=1).eval()
    assert torch.equal(declared(image), network().eval()(image.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 28, 28), {}, r"images of shape \(B, 3, H, W\), got \(2, 1, 28, 28\); .* built with in_channels=1"),
        ((2, 4, 28, 28), {}, r"got \(2, 4, 28, 28\)"),
        ((2, 3, 28, 28), {"in_channels": 1}, r"images of shape \(B, 1, H, W\), got \(2, 3, 28, 28\)"),
        ((3, 28, 28), {}, r"got \(3, 28, 28\); add the batch dimension with image\[None\]"),
        ((28, 28), {}, r"got \(28, 28\)"),
        ((2, 28, 28, 3), {}, r"channels come second: use image.permute\(0, 3, 1, 2\)"),
    ],
)
def test_b2_b3_b4_images_of_another_shape(shape, options, message):
    with pytest.raises(ShapeError, match=message):
        network(**options)(images(*shape))


def test_images_of_integers():
    with pytest.raises(TypeError, match=r"expected normalised floating-point images, got torch.uint8"):
        network()(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_classes": 5}, {"final_resize": "features"}])
def test_shape_of_the_logits(options):
    logits = network(**options)(images(2, 3, 70, 42))
    assert logits.shape == (2, options.get("num_classes", 2), 70, 42)


@pytest.mark.parametrize("channels", [(8,), (8, 4), (8, 8, 4, 4, 2)])
def test_any_number_of_stages(channels):
    assert network(channels=channels, top_k=len(channels))(images(2, 3, 28, 28)).shape == (2, 2, 28, 28)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_low_precision_encoder_feeds_a_float32_decoder(dtype, stream):
    image = images(2, 3, 28, 28)
    model = network(encoder_dtype=dtype, stream_fusion=stream)
    logits = backward(model, image)
    assert logits.dtype == torch.float32
    assert model.fusion.logits.grad.isfinite().all()
    exact = network()(image)
    assert (logits - exact).abs().max() <= 0.1 * exact.abs().max()


@pytest.mark.parametrize("conv_then_resize", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_images_of_another_type_are_converted(dtype, stream, conv_then_resize):
    model = network(stream_fusion=stream, conv_then_resize=conv_then_resize).eval()
    image = images(1, 3, 28, 42)
    expected = model(image)
    torch.testing.assert_close(model(image.to(dtype)), expected, atol=0.1, rtol=0)
    converted = model.to(dtype)(image)
    assert converted.dtype == dtype
    torch.testing.assert_close(converted.float(), expected, atol=0.1, rtol=0)


def test_fixed_blocks_are_known_on_the_meta_device_and_to_an_export():
    model, image = network(block_selection="last4").eval(), images(1, 3, 28, 42)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), model(image))
    assert model.to("meta")(image.to("meta")).shape == (1, 2, 28, 42)


def test_autocast():
    image = images(2, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        low = network()(image)
    exact = network()(image)
    assert (low - exact).abs().max() <= 0.1 * exact.abs().max()


# --- counts -----------------------------------------------------------------------------------------------------------

COUNTS = {
    "small": (22_056_576, 3_182_606, 2_385_326, 3_084_290, 2_287_010),
    "base": (86_580_480, 3_563_534, 2_766_254, 3_366_914, 2_569_634),
    "large": (304_368_640, 3_817_498, 3_020_218, 3_555_330, 2_758_050),
    "giant": (1_136_480_768, 4_325_418, 3_528_138, 3_932_162, 3_134_882),
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    encoder, *decoders = COUNTS[variant]
    build = getattr(dino_unet, f"dino_unet_{variant}")
    for selection, integration in itertools.product(["learned", "last4"], [True, False]):
        with torch.device("meta"):
            model = build(block_selection=selection, spatial_integration=integration)
        assert sum(p.numel() for p in model.encoder.parameters()) == encoder
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == decoders.pop(0)


def test_tiny_is_small_and_takes_overrides():
    model = dino_unet.dino_unet_tiny(num_classes=3)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model(images(1, 3, 28, 28)).shape == (1, 3, 28, 28)


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_the_selection_freezes_when_its_epoch_begins():
    model = network(freeze_selection_epoch=2)
    for epoch in range(4):
        spread_logits(model, seed=epoch)
        free = model.fusion.selected
        model.start_epoch(epoch)
        assert (model.fusion.frozen_selection[0] >= 0) == (epoch >= 2)
        if epoch == 2:
            frozen = free
        assert epoch < 2 or model.fusion.selected == frozen
    assert model(images(1, 3, 28, 28)).isfinite().all()


def test_a_resumed_epoch_does_not_freeze_anew():
    model = network(freeze_selection_epoch=1)
    model.start_epoch(1)
    resumed = network(freeze_selection_epoch=1)
    resumed.load_state_dict(model.state_dict())
    spread_logits(resumed, seed=7)
    free = network()
    spread_logits(free, seed=7)
    resumed.start_epoch(1)
    assert resumed.fusion.selected == model.fusion.selected != free.fusion.selected


def test_without_the_option_the_selection_never_freezes():
    model = network()
    model.start_epoch(0)
    assert (model.fusion.frozen_selection == -1).all()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_whatever_came_before():
    torch.manual_seed(1)
    first = network(init_seed=3).state_dict()
    torch.manual_seed(2)
    second, other = network(init_seed=3).state_dict(), network(init_seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("encoder.blocks.0.attn.qkv.weight", "fusion.logits", "decoder.head.weight"):
        assert not torch.equal(first[name], other[name])


def test_save_and_load(tmp_path):
    model = network(norm="group", channels=(8, 4, 4, 2), encoder_dtype="bfloat16", init_seed=5)
    spread_logits(model)
    model.save_pretrained(tmp_path)
    loaded = DinoUNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    image = images(1, 3, 28, 28)
    assert torch.equal(loaded.eval()(image), model.eval()(image))
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any(name.startswith("encoder.") for name in trained)


def test_where_the_encoder_came_from_is_not_saved(tmp_path):
    model = network()
    model.config = replace(model.config, encoder_checkpoint="/a/folder/that/is/not/there")
    model.save_pretrained(tmp_path)
    assert "folder" not in (tmp_path / "config.json").read_text()
    DinoUNet.from_pretrained(tmp_path)


def test_c9_other_classes_are_shown_with_both_shapes(tmp_path):
    network(num_classes=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description["config"]["num_classes"] = 2
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"decoder.head.weight: expected \(2, 4, 3, 3\), got \(3, 4, 3, 3\)"):
        DinoUNet.from_pretrained(tmp_path)


def test_b13_state_dict_is_the_same_stored_and_streaming():
    stored, streaming = network(init_seed=1), network(init_seed=2, stream_fusion=True)
    streaming.load_state_dict(stored.state_dict(), strict=True)
    stored.load_state_dict(streaming.state_dict(), strict=True)
    image = images(2, 3, 28, 28)
    torch.testing.assert_close(stored(image), streaming(image))


def test_b14_copies_pickles_shared_memory_and_hooks():
    model, image = network().eval(), images(1, 3, 28, 28)
    expected = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).share_memory()):
        assert torch.equal(twin(image), expected)
        assert not any(parameter.requires_grad for parameter in twin.encoder.parameters())
    seen = []
    model.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    model(image)
    assert seen == [(1, 2, 28, 28)]


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "huge"}, "variant: expected one of 'tiny', 'small', 'base', 'large', 'giant', got 'huge'"),
        ({"pos_mode": "x"}, "pos_mode: expected one of"),
        ({"encoder_dtype": "int8"}, "encoder_dtype: expected one of"),
        ({"in_channels": 4}, "in_channels: expected one of 1, 3, got 4"),
        ({"size_policy": "crop"}, "size_policy: expected one of 'error', 'pad', 'resize', got 'crop'"),
        ({"order": "x"}, "order: expected one of"),
        ({"bottleneck": "first"}, "bottleneck: expected one of"),
        ({"skip_scale": "x"}, "skip_scale: expected one of"),
        ({"norm": "x"}, "norm: expected one of"),
        ({"final_resize": "x"}, "final_resize: expected one of"),
        ({"stream_gradient": "x"}, "stream_gradient: expected one of"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"bottleneck_dim": 0}, "bottleneck_dim must be at least 1"),
        ({"convs_per_stage": 0}, "convs_per_stage must be at least 1"),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"freeze_selection_epoch": -1}, "freeze_selection_epoch must be at least 0"),
        ({"channels": ()}, "one positive number for each stage"),
        ({"channels": (8, 8, 0, 4)}, "one positive number for each stage"),
        ({"top_k": 7}, "top_k is 7, but the encoder has only 6 blocks"),
        ({"top_k": 3}, r"top_k is 3, but channels \(8, 8, 4, 4\) make 4 stages"),
        ({"block_selection": "fixed:[5,3,1]"}, "names 3 blocks for 4 stages"),
        ({"block_selection": "fixed:[7,5,3,1]"}, r"asks for blocks \[7\] \(0-based\), but there are only 0 to 5"),
        ({"block_selection": "random"}, "unknown mode 'random'"),
        ({"block_selection": "last4", "index_base": 3}, "index_base must be 0 or 1"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)
