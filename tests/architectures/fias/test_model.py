"""The network: what it returns when, sizes, every option, what it costs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.architectures.fias import Fias, FiasConfig, fias
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.blocks import ContextAwareFusion
from trifuse.blocks.image_input import channels_last
from trifuse.kernels import ShapeError

THIN = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
HEADS = (4, 4, 4, 2)


def thin(**overrides) -> Fias:
    """The whole network at a width that makes it quick."""
    return fias(**{"variant": THIN, "decoder_heads": HEADS, "num_classes": 4, **overrides})


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(part: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


# --------------------------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [
        ({}, 45_071_917),
        ({"num_classes": 4}, 45_069_382),
        ({"no_dmk": "dup"}, 42_563_113),
        ({"channel_weights": "literal"}, 45_071_917),
        ({"fusion": "sum"}, 38_019_317),
        ({"mixatt": False}, 43_078_021),
    ],
)
def test_parameter_counts(overrides, parameters):
    with torch.device("meta"):
        assert count(fias(**overrides)) == parameters


def test_parameter_counts_of_the_parts():
    with torch.device("meta"):
        model = fias()
    encoder, decoder = model.global_encoder, model.decoder
    norms = [encoder.norm, *encoder.out_norms]
    assert sum(map(count, norms)) == 2_160
    assert count(encoder) - sum(map(count, norms)) == 16_660_592
    assert count(model.adapter) == 6
    assert count(model.local_encoder) == 2_508_804
    assert count(model.fusions) == 7_052_600
    assert count(decoder.bottleneck) == 2_987_136
    assert [count(block) for block in decoder.blocks] == [10_457_424, 4_109_544, 1_029_496, 259_592]
    assert count(decoder.heads) == 4_563


def test_maps_of_the_paper_s_network_at_its_size():
    with torch.device("meta"):
        model = fias()
        maps = model(torch.empty(2, 1, 256, 256))
        assert [tuple(x.shape) for x in maps] == [(2, 9, 16, 16), (2, 9, 32, 32), (2, 9, 64, 64)]
        assert [tuple(x.shape) for x in model.head_maps(torch.empty(2, 1, 256, 256))] == [x.shape for x in maps]
        assert tuple(model.eval()(torch.empty(1, 1, 256, 256)).shape) == (1, 9, 256, 256)


def test_encoders_meet_level_by_level():
    model = thin().eval()
    seen = []
    for fusion in model.fusions:
        fusion.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    x = image(1, 1, 64, 64)
    fused = model.encode(x)
    adapted = model.adapter(x)
    for (context, detail, out), level, a, b in zip(
        seen, fused, model.global_encoder(adapted), model.local_encoder(adapted), strict=True
    ):
        assert out is level
        torch.testing.assert_close(context, a)
        torch.testing.assert_close(detail, b)


# ------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32)])
def test_training_returns_maps_and_evaluation_their_sum(height, width):
    model = thin()
    x = image(2, 1, height, width)
    sizes = [(2, 4, height // step, width // step) for step in (16, 8, 4)]
    assert [tuple(logits.shape) for logits in model(x)] == sizes
    model.eval()
    maps = model.head_maps(x)
    assert [tuple(logits.shape) for logits in maps] == sizes
    upsampled = [F.interpolate(logits, (height, width), mode="bilinear", align_corners=False) for logits in maps]
    torch.testing.assert_close(model(x), sum(upsampled))
    logits, shown = model(x, return_all=True)
    assert torch.equal(logits, model(x))
    assert all(torch.equal(a, b) for a, b in zip(shown, upsampled, strict=True))


def test_evaluation_is_deterministic_and_keeps_samples_apart():
    model = thin().eval()
    x = image(3, 1, 64, 64)
    logits = model(x)
    assert torch.equal(model(x), logits)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), logits, atol=1e-5, rtol=1e-4)


def test_training_draws_from_the_generator():
    model = thin(dropout=0.0, drop_path=0.0)
    x = image(2, 1, 64, 64)
    first, again, *others = ([*model(x, torch.Generator().manual_seed(s))] for s in (1, 1, 2, 3, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(first[-1], other[-1]) for other in others)


def test_training_asks_no_value_of_the_device():
    """A tensor on meta has none: whatever would wait for a GPU fails here."""
    with torch.device("meta"):
        model = thin(draw="sample")
        sum(logits.sum() for logits in model(torch.empty(2, 1, 64, 64))).backward()


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch(batch):
    model = thin()
    assert [len(logits) for logits in model(image(batch, 1, 64, 64))] == [batch] * 3
    assert len(model.eval()(image(batch, 1, 32, 32))) == batch


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("height", "width"), [(40, 70), (64, 33), (17, 64)])
def test_padded_images_are_cropped(height, width):
    """The result is that of the image continued by hand, cut to the image."""
    model = thin(pad=True).eval()
    x = image(1, 1, height, width)
    continued = F.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
    expected = model(continued)[..., :height, :width]
    torch.testing.assert_close(model(x), expected)
    maps = model.head_maps(x)
    assert [tuple(logits.shape) for logits in maps] == [(1, 4, height, width)] * 3
    torch.testing.assert_close(sum(maps), expected)
    model.train()(image(2, 1, height, width))


def test_images_that_fit_are_not_padded():
    plain, padding = thin(), thin(pad=True)
    padding.load_state_dict(plain.state_dict())
    x = image(1, 1, 64, 96)
    assert torch.equal(plain.eval()(x), padding.eval()(x))
    assert [tuple(logits.shape[2:]) for logits in padding.head_maps(x)] == [(4, 6), (8, 12), (16, 24)]


def test_sizes_that_are_refused():
    with pytest.raises(ShapeError, match="height 40 is no multiple of 32"):
        thin()(image(2, 1, 40, 64))
    with pytest.raises(ShapeError, match="an image of 64 x 16 pixels is too small to be continued by reflection"):
        thin(pad=True)(image(2, 1, 64, 16))
    with pytest.raises(ShapeError, match="bottleneck 'down' needs a coarsest map of even sides, got 2 x 3"):
        thin(bottleneck="down")(image(2, 1, 64, 96))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 64, 64), r"expected images of shape \(B, 1, H, W\), got \(1, 64, 64\); add the batch dimension"),
        ((1, 64, 64, 1), r"got \(1, 64, 64, 1\); channels come second: use image\.permute\(0, 3, 1, 2\)"),
        ((1, 3, 64, 64), r"got \(1, 3, 64, 64\)"),
    ],
)
def test_b2_b3_b4_images_of_other_layouts(shape, message):
    with pytest.raises(ShapeError, match=f"Fias: .*{message}"):
        thin()(torch.zeros(shape))


def test_whole_numbers_are_no_images():
    with pytest.raises(TypeError, match=r"Fias: expected normalised floating-point images, got torch\.uint8"):
        thin()(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))


def test_b7_one_small_image_cannot_be_normalised_in_training():
    message = "batch normalisation in training needs more than one value per channel"
    with pytest.raises(ShapeError, match=message):
        thin()(image(1, 1, 32, 32))
    with pytest.raises(ShapeError, match=message):
        thin(norm="group")(image(1, 1, 32, 32))  # the DilateFormer keeps its own
    thin().eval()(image(1, 1, 32, 32))


def test_b6_a_decoder_wants_all_maps():
    model = thin()
    with pytest.raises(ShapeError, match="expected maps of 12, 24, 48, 96 channels, finest first, got"):
        model.decoder(model.encode(image(2, 1, 64, 64))[:3])
    with pytest.raises(ShapeError, match=r"expected maps of 12, 24, 48, 96 channels, finest first, got"):
        model.decoder(model.encode(image(2, 1, 64, 64))[::-1])


# --------------------------------------------------------------------------------------------------------- options

OPTIONS = [
    {},
    {"num_classes": 1},
    {"in_channels": 3},
    {"in_channels": 3, "input_adapter": "none"},
    {"input_adapter": "repeat"},
    {"input_adapter": "merit"},
    {"out_norm": False},
    {"no_dmk": "dup"},
    {"no_dmk": "bypass"},
    {"dmk_kernels": (3, 5, 9)},
    {"dmk_depth": 2},
    {"ks_groups": "depthwise"},
    {"fusion": "sum"},
    {"fusion": "concat"},
    {"spatial_pool": "local3"},
    {"spatial_pool": "none"},
    {"spatial_kernel": 3},
    {"max_pool": False},
    {"pre_conv": False},
    {"channel_weights": "literal"},
    {"dilations": (1, 4, 2)},
    {"dilations": (2,)},
    {"bottleneck": "none"},
    {"bottleneck": "down"},
    {"mixatt": False},
    {"pos": "dwconv"},
    {"gate": "none"},
    {"draw": "sample"},
    {"order_shuffle": False},
    {"scales": (1, 2), "scale_probs": (0.25, 0.75)},
    {"norm": "group"},
]


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_options_train_every_parameter(overrides, tmp_path):
    """Each option changes shapes or values, gradients reach all that it builds, and it comes back from disk."""
    model = thin(**overrides)
    config = model.config
    side = 64 if config.bottleneck == "down" else 32
    x = image(2, config.in_channels, side, side)
    torch.manual_seed(3)
    with torch.no_grad():
        for fusion in model.fusions:  # whose channel weights start at zero, and pass no gradient on at the first step
            if isinstance(fusion, ContextAwareFusion):
                fusion.channel.weight.normal_(std=0.1)
    maps = model(x)
    assert [tuple(logits.shape) for logits in maps] == [
        (2, config.num_classes, side // step, side // step) for step in (16, 8, 4)
    ]
    sum(logits.square().sum() for logits in maps).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []
    model.eval().save_pretrained(tmp_path)
    loaded = Fias.from_pretrained(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(x), model(x))
    assert bool(overrides) == (config != FiasConfig(variant=THIN, decoder_heads=HEADS, num_classes=4))


@pytest.mark.parametrize(
    "overrides",
    [
        {"order_shuffle": False},
        {"draw": "sample"},
        {"scales": (3,)},
        {"scale_probs": (0.0, 0.0, 1.0)},
        {"dropout": 0.5},
        {"drop_path": 0.9},
    ],
    ids=str,
)
def test_options_of_training_reach_their_part(overrides):
    model = thin(**overrides)
    mca, dropout = model.decoder.blocks[1].mca, model.decoder.blocks[1].dropout
    last = model.global_encoder.stages[3].blocks[0]
    ((name, value),) = overrides.items()
    held = {"dropout": dropout.p, "drop_path": last.drop_path}
    assert held.get(name, getattr(mca, name, None)) == pytest.approx(value)


def test_options_of_the_encoders_and_the_fusion_reach_their_part():
    model = thin(dilations=(2, 5, 1), dmk_kernels=(3, 9), channel_weights="literal")
    local, glob = model.local_encoder.stages, model.global_encoder.stages
    assert [stage.blocks[0].attn.dilations for stage in glob[:2]] == [(2, 5, 1)] * 2
    assert [[conv.kernel_size for conv in stage.units[0].depthwise.convs] for stage in local] == [[(3, 3), (9, 9)]] * 4
    assert [fusion.channel_weights for fusion in model.fusions] == ["literal"] * 4
    assert [fusion.channel_weights for fusion in thin().fusions] == ["normalised"] * 4


def test_other_dilations_take_the_same_weights_and_look_further():
    near, far = thin(dilations=(1, 1, 1)).eval(), thin(dilations=(1, 1, 5)).eval()
    far.load_state_dict(near.state_dict())
    x = image(1, 1, 64, 64)
    assert not torch.allclose(near(x), far(x), atol=1e-4)
    with torch.no_grad():
        for network in (near, far):  # the third dilation's heads silenced, it is not heard
            for stage in network.global_encoder.stages[:2]:
                weight = stage.blocks[0].attn.proj.weight
                weight[:, 2 * weight.shape[1] // 3 :] = 0
    torch.testing.assert_close(near(x), far(x))


def test_bypass_and_duplicate():
    x = image(1, 1, 64, 64)
    bypass = thin(no_dmk="bypass").eval()
    assert (bypass.local_encoder, len(bypass.fusions)) == (None, 0)
    context = bypass.global_encoder(channels_last(bypass.adapter(x)))
    assert all(torch.equal(a, b) for a, b in zip(bypass.encode(x), context, strict=True))
    double = thin(no_dmk="dup", fusion="sum").eval()
    context = double.global_encoder(channels_last(double.adapter(x)))
    assert all(torch.equal(a, 2 * b) for a, b in zip(double.encode(x), context, strict=True))


def test_repeated_grey_images_are_colour_images():
    grey, colour = thin(input_adapter="repeat").eval(), thin(in_channels=3, input_adapter="none").eval()
    colour.load_state_dict(grey.state_dict())
    x = image(1, 1, 64, 64)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)))


def test_seed_of_the_weights():
    states = [thin(init_seed=seed).state_dict() for seed in (0, 0, 1)]
    same, other = ([n for n in states[0] if not torch.equal(states[0][n], state[n])] for state in states[1:])
    assert same == []
    assert {name.partition(".")[0] for name in other} == {
        "adapter", "global_encoder", "local_encoder", "fusions", "decoder"
    }  # fmt: skip
