"""The ECG autoencoder: published numbers, sizes, layout of the leads, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_numbers import Fixture, filled, filled_input, fixture_names, load_fixture
from torch import Tensor

from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig
from trifuse.architectures.taff_unet.convert import rename_ecg_dual_attention
from trifuse.kernels import CheckpointError, ShapeError

SMALL = EcgAutoencoderConfig(time_steps=64, z_dim=16, base_dim=2)
RUNS = [(name, dtype) for name in ("small_t128_z16", "small_t64_z64_linear") for dtype in ("float64", "float32")]
RUNS += [("filled_t1024_z64", "float64"), ("filled_t1024_z64", "float32")]


def build(config: EcgAutoencoderConfig = SMALL, **changes) -> EcgAutoencoder:
    """An autoencoder in evaluation mode whose running statistics are not those of its first day."""
    model = EcgAutoencoder(config if not changes else EcgAutoencoderConfig(**{**vars(config), **changes}))
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def beats(batch: int = 3, steps: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 12, steps, generator=torch.Generator().manual_seed(seed))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------- published numbers


def published_state(fixture: Fixture) -> dict[str, Tensor]:
    if "state_dict_keys" in fixture.facts:
        return {name: filled(name, shape) for name, shape in fixture.facts["state_dict_keys"].items()}
    return {name.removeprefix("param."): fixture.tensors[name] for name in fixture.expected("param.")}


def results(model: EcgAutoencoder, ecg: Tensor) -> dict[str, Tensor]:
    encoder, code = model.encoder, model.encode(ecg)
    features = encoder.features(ecg)
    weights = model.attention(ecg)
    return {
        "input_conv": encoder.input_conv(ecg),
        "conv_features": features,
        "attention_pooled": encoder.pool(encoder.attention(features)),
        "z": code,
        "z.full": code,
        "decoder_linear": model.decoder.linear(code),
        "recon": model(ecg),
        "lead_attention": weights.lead,
        "time_attention": weights.temporal.transpose(0, 1),
    }


def test_every_fixture_is_used():
    names = {f"ecg_dual_attention/{name}" for name, _ in RUNS}
    assert names | {"ecg_dual_attention/facts"} == set(fixture_names("ecg_dual_attention"))


@pytest.mark.parametrize(("name", "dtype"), RUNS)
@torch.no_grad()
def test_published_numbers(name, dtype):
    fixture, kind = load_fixture(f"ecg_dual_attention/{name}"), getattr(torch, dtype)
    state, report = rename_ecg_dual_attention(published_state(fixture), name)
    model = EcgAutoencoder(report.config).eval()
    model.load_state_dict(state)
    assert count(model) == fixture.facts["n_parameters"]
    stored = fixture.tensors["input"] if "input" in fixture.tensors else filled_input(fixture.facts)
    found = results(model.to(kind), stored.to(kind))
    awaited = {part for part in fixture.expected() if not part.startswith(("param.", "input."))} - {"input"}
    assert awaited <= found.keys()
    for part in awaited - {"z.full"}:
        difference, bound = fixture.difference(part, found[part]), fixture.bound(part, kind)
        assert difference < bound, f"{name}: {part} differs by {difference:.2e}, bound {bound:.2e}"


def test_published_sizes():
    model = EcgAutoencoder()
    attention = model.encoder.attention
    lead = attention.lead
    assert count(model) == 1_264_594
    assert count(EcgAutoencoder(EcgAutoencoderConfig(final_linear=True))) == 1_264_594 + 4_160
    assert count(EcgAutoencoder(EcgAutoencoderConfig(time_steps=1024))) == 3_435_334
    assert count(EcgAutoencoder(EcgAutoencoderConfig(z_dim=512))) == 1_385_106
    assert count(model.encoder) == 1_188_072
    assert count(model.decoder) == 76_522
    assert count(model.encoder.input_conv) == 12_048
    assert count(model.encoder.encoder) == 11_368
    pools = count(model.encoder.mean_head) + count(model.encoder.max_head)
    assert count(attention) + pools == 1_164_656
    assert pools == 12_352
    assert count(attention.temporal) == 39_360
    assert count(lead.in_proj) + count(lead.out_proj) == 370_880
    assert count(lead.fc1) + count(lead.fc2) == 740_848
    assert count(lead.norm1) + count(lead.norm2) == 1_216


# ------------------------------------------------------------------------------------------------------ behaviour


@torch.no_grad()
def test_shapes():
    model, ecg = build(), beats()
    code, weights = model.encode(ecg), model.attention(ecg)
    assert code.shape == (3, 16)
    assert model.decode(code).shape == ecg.shape
    assert torch.equal(model(ecg), model.decode(code))
    assert weights.lead.shape == (3, 12, 12)
    assert weights.temporal.shape == (3, 12, 2, 2)
    for part in weights:
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))


@torch.no_grad()
def test_features_of_a_lead_stay_in_its_row():
    """After the grouped convolution: the dense one that follows mixes leads on purpose, so it is made the identity."""
    for layout, kept in (("correct", True), ("upstream", False)):
        model = build(lead_layout=layout)
        dense = model.encoder.input_conv[3]
        dense.weight.copy_(torch.eye(24)[:, :, None] * torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
        ecg = beats()
        changed = ecg.clone()
        changed[:, 7] += beats(seed=1)[:, 7]
        rows = (model.encoder.features(changed) - model.encoder.features(ecg)).abs().amax((0, 1, 3))
        assert (torch.nonzero(rows).flatten().tolist() == [7]) is kept


@torch.no_grad()
def test_reconstruction_is_centred_and_of_unit_variance():
    model = build().double()
    model.decoder.final_conv[0].weight *= 1e5  # far above the normalisation's eps
    beat = model(beats().double())
    torch.testing.assert_close(beat.mean(-1), torch.zeros(3, 12).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(beat.var(-1, correction=0), torch.ones(3, 12).double(), atol=1e-2, rtol=0)


@torch.no_grad()
def test_the_voltage_is_heard_and_drawn():
    """A lead of twice the voltage moves the code at least five times as far as where each lead is normalised."""
    ecg = beats()
    louder = ecg * torch.where(torch.arange(12) == 6, 2.0, 1.0)[:, None]
    models = {scaling: build(lead_scaling=scaling) for scaling in ("zscore", "voltage")}
    moved = {
        name: (model.encode(louder) - model.encode(ecg)).norm() / model.encode(ecg).std(0).norm()
        for name, model in models.items()
    }
    assert moved["voltage"] > 5 * moved["zscore"] > 0
    spread = models["voltage"](ecg).std(-1)
    assert (spread < 0.5).all()  # of a decoder that has learned nothing; the normalised one is at 1 whatever it says
    assert count(models["voltage"]) == count(models["zscore"])
    models["voltage"].load_state_dict(models["zscore"].state_dict())


@torch.no_grad()
def test_the_decoder_s_two_linear_maps_are_one_of_low_rank():
    model = build()
    a, b = (torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    linear = model.decoder.linear
    torch.testing.assert_close(linear(a + b), linear(a) + linear(b) - linear(torch.zeros(2, 16)))


@torch.no_grad()
def test_samples_do_not_see_each_other_in_evaluation():
    model, ecg = build().double(), beats().double()
    order = [2, 0, 1]
    torch.testing.assert_close(model(ecg)[order], model(ecg[order]))
    torch.testing.assert_close(model(ecg[:1]), model(ecg)[:1])


def test_dropout_draws_in_training_alone():
    model, ecg = build(), beats()
    assert torch.equal(model(ecg), model(ecg))
    features = model.encoder.features(ecg).detach()
    attention = model.encoder.attention.train()
    assert not torch.equal(attention(features), attention(features))
    plain = build(dropout=0.0).encoder.attention.train()
    assert torch.equal(plain(features), plain(features))


def test_every_parameter_gets_a_gradient():
    model = build().train()
    (model(beats()) * beats(seed=3)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_seed_and_copies():
    same, other = build(), build(init_seed=1)
    state = build().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert not torch.equal(same.encoder.mean_head.weight, other.encoder.mean_head.weight)
    ecg = beats()
    assert torch.equal(copy.deepcopy(same)(ecg), same(ecg))


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, ecg = build(lead_layout="upstream", final_linear=True, pooled_dim=8), beats()
    model.save_pretrained(tmp_path)
    loaded = EcgAutoencoder.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(ecg), model(ecg))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        EcgAutoencoder.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"time_steps": 600},
            r"time_steps 600 is not divisible by 32 .* to 608 samples, with four zeros on either side",
        ),
        ({"time_steps": 607}, "to 608 samples, with 0 zeros before and 1 after"),
        ({"downsample": 2**31}, "downsample 2147483648 leaves nothing of 608 samples; at most 9"),
        ({"time_steps": 0}, "time_steps must be at least 1, got 0"),
        ({"base_dim": 1}, "8 attention heads do not divide the 4 features of base_dim 1 .* use an even base_dim"),
        ({"lead_layout": "mixed"}, "lead_layout: expected one of 'correct', 'upstream', got 'mixed'"),
        ({"lead_scaling": "mV"}, "lead_scaling: expected one of 'zscore', 'voltage', got 'mV'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"z_dim": 7}, "their width 7 must be even"),
        ({"pooled_dim": 8}, "needs final_linear=True"),
    ],
)
def test_refused_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        EcgAutoencoderConfig(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 12, 600), r"\(B, 12, 608\), got \(1, 12, 600\); pad them with four zeros on either side"),
        ((1, 8, 608), r"\(B, 12, 608\), got \(1, 8, 608\)$"),
        ((12, 608), r"got \(12, 608\)$"),
        ((1, 12, 5000), r"got \(1, 12, 5000\)$"),
    ],
)
def test_refused_beats(shape, message):
    model = EcgAutoencoder()
    for method in (model, model.encode, model.attention):
        with pytest.raises(ShapeError, match=message):
            method(torch.zeros(shape))


def test_refused_codes():
    with pytest.raises(ShapeError, match=r"expected codes \(B, 16\), got \(2, 15\)"):
        build().decode(torch.zeros(2, 15))
