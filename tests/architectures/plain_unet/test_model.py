"""The network: what it returns when, its size and cost, published numbers, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from golden_numbers import fill, filled_input, load_fixture
from torch import Tensor

from trifuse.architectures.cli.cost import network_costs
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig, plain_unet
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels import CheckpointError, ShapeError


def thin(**options) -> PlainUNet:
    return plain_unet(**{"image_size": 32, "base_dim": 4, "max_dim": 12, **options})


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("channels", "parameters", "gflops"), [(1, 33_474_840, 29.55), (18, 33_479_736, 30.19)])
def test_parameters_and_operations(channels, parameters, gflops):
    with torch.device("meta"):
        model = plain_unet(in_channels=channels)
    assert count(model) == parameters
    *parts, whole = network_costs(model, (1, channels, 256, 256))
    assert [part.part for part in parts] == ["encoder", "decoder"]
    assert whole.parameters == parameters
    assert whole.gflops == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, (32, 64, 128, 256, 512, 512, 512)),
        ({"image_size": 96}, (32, 64, 128, 256, 512)),
        ({"image_size": 512}, (32, 64, 128, 256, 512, 512, 512, 512)),
        ({"image_size": 96, "base_dim": 8}, (8, 16, 32, 64, 128)),
        ({"base_dim": 8, "max_dim": 20, "num_stages": 4}, (8, 16, 20, 20)),
    ],
)
def test_features(options, features):
    assert PlainUNetConfig(**options).features == features


def test_names_and_shapes_are_the_published_ones():
    facts = load_fixture("nnunet/keys_default_256x256").facts
    with torch.device("meta"):
        state = plain_unet().state_dict()
    assert list(state) == sorted(state, key=facts["canonical_parameter_names"].index)
    assert set(state) == set(facts["canonical_parameter_names"])
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: facts["state_dict_keys"][name] for name in state
    }


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@torch.no_grad()
def test_published_values_of_the_default_network(dtype):
    fixture = load_fixture("nnunet/filled_default_256x256")
    model = plain_unet().to(dtype)
    fill(model.state_dict())
    results: dict[str, Tensor] = {}
    for prefix, part in (("enc", model.encoder), ("dec", model.decoder)):
        for index, stage in enumerate(part.stages):
            stage.register_forward_hook(lambda _, __, out, name=f"{prefix}{index}": results.update({name: out}))
    x = filled_input(fixture.facts).to(dtype)
    results |= {f"out{index}": logits for index, logits in enumerate(model(x))}
    assert results.keys() == fixture.facts["shapes"].keys()
    for name, result in results.items():
        assert fixture.difference(name, result) < fixture.bound(name, dtype), name
    torch.testing.assert_close(model.eval()(x), results["out0"], rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 8), (24, 40)])
def test_training_returns_every_resolution_and_evaluation_the_full_one(height, width):
    model = thin(in_channels=2, num_classes=3)
    x = image(2, 2, height, width)
    outputs = model(x)
    assert [tuple(out.shape) for out in outputs] == [(2, 3, height // step, width // step) for step in (1, 2, 4)]
    assert torch.equal(model.eval()(x), outputs[0])


def test_gradients_reach_every_parameter_in_training():
    """A bias before a norm shifts nothing: its gradient is rounding alone."""
    model = thin()
    sum(out.square().sum() for out in model(image(2, 1, 32, 32))).backward()
    dead = [n for n, p in model.named_parameters() if not bool(p.grad.any()) and not n.endswith("conv.bias")]
    assert dead == []


def test_samples_are_kept_apart():
    model = thin().eval()
    x = image(3, 1, 32, 32)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), model(x), atol=1e-5, rtol=1e-4)


def test_seed_of_the_weights():
    first, again, other = (thin(init_seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name.split(".")[1] for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"stages", "transpconvs", "seg_layers"}


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"image_size": 7}, "image_size must be at least 8, got 7"),
        ({"base_dim": 0}, "base_dim must be at least 1, got 0"),
        ({"max_dim": 0}, "max_dim must be at least 1, got 0"),
        ({"num_stages": 1}, "num_stages must be at least 2, and at most 32, got 1"),
        ({"image_size": 250}, "a multiple of 64, at least 128, for 7 stages, got 250; use 256, or fewer stages"),
        ({"image_size": 64, "num_stages": 7}, "a multiple of 64, at least 128, for 7 stages, got 64; use 128"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlainUNetConfig(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 32, 32), r"expected images of shape \(B, 1, H, W\), got \(1, 32, 32\); add the batch dimension"),
        ((1, 32, 32, 1), r"got \(1, 32, 32, 1\); channels come second"),
        ((1, 3, 32, 32), r"got \(1, 3, 32, 32\)"),
        ((1, 1, 30, 32), "4 stages need sides that are multiples of 8, got 30 x 32; pad or resize to 32 x 32"),
        ((1, 1, 8, 8), "4 stages leave a single pixel of 8 x 8"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_b2_b3_b4_b7_images_that_are_refused(shape, message, training):
    with pytest.raises(ShapeError, match=f"PlainUNet: .*{message}"):
        thin().train(training)(torch.zeros(shape))


def test_whole_numbers_are_no_images():
    with pytest.raises(TypeError, match=r"PlainUNet: expected normalised floating-point images, got torch\.uint8"):
        thin()(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


# ----------------------------------------------------------------------------------- saving, copying, compiling


def test_saved_and_loaded(tmp_path):
    model = thin(num_classes=3, num_stages=3).eval()
    model.save_pretrained(tmp_path)
    loaded = PlainUNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    x = image(1, 1, 16, 16)
    assert torch.equal(loaded(x), model(x))
    write_record(tmp_path / "config.json", read_record(tmp_path / "config.json") | {"architecture": "fias"})
    with pytest.raises(CheckpointError, match="wrong architecture: got 'fias', want 'plain_unet'"):
        PlainUNet.from_pretrained(tmp_path)


def test_b14_copies_pickles_and_shared_memory():
    model = thin().eval()
    x = image(1, 1, 32, 32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(model.share_memory()(x), expected)


def test_memory_format_of_the_image_changes_nothing():
    model = thin(in_channels=3).eval()
    x = image(2, 3, 32, 32)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x.transpose(2, 3)), model(x.transpose(2, 3).contiguous()), atol=1e-5, rtol=1e-4)


def test_half_precision_under_autocast():
    model = thin().eval()
    x = image(1, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)
    with torch.no_grad():
        logits = model(x)
    assert float((rounded.float() - logits).norm() / logits.norm()) < 0.1
