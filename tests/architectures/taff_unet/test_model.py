"""TAFF-UNet in all its settings: sizes, where the ECG joins, samples without one, what it refuses, what it saves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from trifuse.architectures.plain_unet import plain_unet
from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig, TaffUNet, taff_unet
from trifuse.architectures.taff_unet.variants import SETTINGS
from trifuse.kernels import CheckpointError, ShapeError

SIZE = 32
SMALL = EcgAutoencoderConfig(time_steps=64, z_dim=8, base_dim=2, downsample=2, dropout=0.0)
WITH_ECG = [setting for setting, takes in SETTINGS.items() if "ecg" in takes]
PAPER = {"baseline": 33_474_840, "ap": 33_479_736, "ecg_ap": 34_781_644, "full": 34_815_052}
GATE_OF_DAYS = 2 * 64 + 65 * 2  # its own two layers
FIRST_FORM = {
    "projection": "broadcast",
    "gate": "after_norm",
    "gate_time": "unseen",
}  # of the fusion, as it was before it could make maps
PER_SEGMENT = 17 * 65 + 256  # what the default projection has beside that of the first form


def small(setting: str = "full", **options: Any) -> TaffUNet:
    """A network that is quick: four stages, the ECG half-way down."""
    options = {"image_size": SIZE, "base_dim": 4, "fusion_stage": 2, "ecg": SMALL, **options}
    return taff_unet(setting, **options)


def unequal(model: TaffUNet) -> TaffUNet:
    """Let no weight of the fusion be zero, so that gate and time say something."""
    generator = torch.Generator().manual_seed(7)
    if model.fusion is not None:
        for parameter in model.fusion.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(setting: str, batch: int = 3, size: int = SIZE) -> dict[str, Tensor]:
    """What a setting takes beside the image, of distinct samples."""
    generator = torch.Generator().manual_seed(1)
    segment = torch.randint(0, 18, (batch, size, size), generator=generator)
    prior = torch.nn.functional.one_hot(segment, 18)[..., 1:].permute(0, 3, 1, 2).to(torch.uint8)
    ecg = torch.randn(batch, 12, SMALL.time_steps, generator=generator)
    given = {"prior": ("prior", prior), "ecg": ("ecg", ecg), "time": ("interval", torch.linspace(2, 80, batch))}
    return dict(given[part] for part in given if part in SETTINGS[setting])


PRIOR = inputs("full")["prior"].float()


def images(batch: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(0))


def count(part: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


@pytest.mark.parametrize(("setting", "parameters"), PAPER.items())
def test_parameter_counts(setting, parameters):
    with torch.device("meta"):
        assert count(taff_unet(setting, **FIRST_FORM)) == parameters
        by_days = GATE_OF_DAYS if setting == "full" else 0
        assert count(taff_unet(setting)) == parameters + (PER_SEGMENT if setting in WITH_ECG else 0) + by_days


@pytest.mark.parametrize("form", [FIRST_FORM, {}], ids=str)
def test_parameter_counts_of_the_parts(form):
    with torch.device("meta"):
        model = taff_unet(**form)
    assert model.ecg is not None
    assert model.fusion is not None
    assert count(model.ecg) == 1_264_594
    fusion = model.fusion
    gate = 20_674 + (0 if form else GATE_OF_DAYS)
    assert [count(part) for part in (fusion.projection, fusion.gate, fusion.film)] == [16_640, gate, 33_408]
    assert count(fusion) == 70_722 + (0 if form else PER_SEGMENT + GATE_OF_DAYS)


def test_the_ecg_joins_256_channels_of_32_x_32_pixels():
    with torch.device("meta"):
        model = taff_unet()
        assert model.fusion is not None
        seen = []
        model.fusion.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
        output = model.run(
            torch.empty(2, 1, 256, 256), torch.empty(2, 17, 256, 256), torch.empty(2, 12, 608), torch.empty(2)
        )
    assert seen == [(2, 256, 32, 32)]
    assert [tuple(x.shape) for x in output.logits] == [(2, 4, side, side) for side in (256, 128, 64, 32, 16, 8)]
    assert tuple(output.reconstruction.shape) == (2, 12, 608)


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_of_every_setting(setting):
    model = small(setting)
    output = model.run(images(), **inputs(setting))
    assert [tuple(x.shape) for x in output.logits] == [(3, 4, side, side) for side in (32, 16, 8)]
    listed = model(images(), **inputs(setting))
    assert [tuple(x.shape) for x in listed] == [tuple(x.shape) for x in output.logits]
    assert (output.gate is None) == (output.reconstruction is None) == (setting not in WITH_ECG)
    if output.gate is not None:
        torch.testing.assert_close(output.gate.sum(1), torch.ones(3))
    assert tuple(model.eval()(images(1), **inputs(setting, 1)).shape) == (1, 4, 32, 32)


def test_a_small_network_for_96_pixels():
    model = small(image_size=96, base_dim=8, fusion_stage=3).eval()
    assert model.config.features == (8, 16, 32, 64, 128)
    assert tuple(model(images(1, 96), **inputs("full", 1, 96)).shape) == (1, 4, 96, 96)


# ------------------------------------------------------------------------------------------- what joins, and where


@pytest.mark.parametrize("training", [True, False])
def test_the_baseline_is_the_plain_u_net(training):
    model, plain = small("baseline").train(training), plain_unet(image_size=SIZE, base_dim=4).train(training)
    plain.load_state_dict(model.state_dict())
    got, want = model(images()), plain(images())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_settings_share_the_backbone_s_first_weights():
    one, other = small("baseline"), small("ecg_time")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def image_only_maps(model: TaffUNet, prior: Tensor) -> list[Tensor]:
    """What the encoder makes of the images without an ECG."""
    return model.encoder(torch.cat([images(), prior.float()], dim=1))


@pytest.mark.parametrize("skip", ["fused", "original"])
def test_where_the_fused_map_goes(skip):
    """Into the next stage always, into the skip only where it is fused."""
    model = unequal(small(skip=skip)).eval()
    given = inputs("full")
    expected = image_only_maps(model, given["prior"])[2]
    seen: dict[str, Tensor] = {}
    model.fusion.register_forward_hook(lambda m, args, out: seen.update(original=args[0].clone(), fused=out[0]))
    model.encoder.stages[3].register_forward_pre_hook(lambda m, args: seen.update(next=args[0]))
    model.decoder.register_forward_pre_hook(lambda m, args: seen.update(skip=args[0][2]))
    model(images(), **given)
    assert torch.equal(seen["original"], expected)
    assert not torch.equal(seen["fused"], seen["original"])
    assert torch.equal(seen["next"], seen["fused"])
    assert torch.equal(seen["skip"], seen[skip])


def test_every_input_counts():
    model = unequal(small()).eval()
    given = inputs("full")
    before = model(images(), **given)
    for name, value in given.items():
        assert not torch.allclose(model(images(), **{**given, name: value.flip(0)}), before), name


def test_time_counts_only_where_it_is_taken():
    model, given = unequal(small("ecg")).eval(), inputs("ecg")
    assert torch.equal(model(images(), **given), model(images(), **given, interval=torch.tensor([1.0, 2, 3])))


def test_the_image_comes_before_the_prior():
    model, given = small("ap").eval(), inputs("ap")
    seen: list[Tensor] = []
    model.encoder.stages[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images(), **given)
    assert torch.equal(seen[0][:, :1], images())
    assert torch.equal(seen[0][:, 1:], given["prior"].float())


def test_an_uint8_prior_is_a_float_prior():
    model, given = small("ap").eval(), inputs("ap")
    assert torch.equal(model(images(), **given), model(images(), given["prior"].float()))


def test_samples_do_not_mix():
    model, given, order = unequal(small()).eval(), inputs("full"), torch.tensor([2, 0, 1])
    turned = model(images()[order], **{name: value[order] for name, value in given.items()})
    torch.testing.assert_close(turned, model(images(), **given)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_detach_z_keeps_the_segmentation_out_of_the_ecg_s_encoder(detach):
    model = unequal(small(detach_z=detach))
    model(images(), **inputs("full"))[0].square().sum().backward()
    assert all((p.grad is None) == detach for p in model.ecg.encoder.parameters())
    assert model.fusion.projection.weight.grad is not None


@pytest.mark.parametrize("gate", ["before_norm", "after_norm"])
def test_the_gate_is_given_means_from_before_the_norm_where_it_is_to_see_them(gate):
    model, seen = small(gate=gate).eval(), []
    model.fusion.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    model(images(), **inputs("full"))
    assert (seen[0]["image_means"] is None) == (gate == "after_norm")


def test_attention_of_the_ecg():
    model, ecg = small("ecg").eval(), inputs("ecg")["ecg"]
    assert torch.equal(model.attention(ecg).lead, model.ecg.attention(ecg).lead)
    with pytest.raises(ValueError, match="'ap' has no ECG to attend to"):
        small("ap").attention(ecg)


# ------------------------------------------------------------------------------------------- samples without an ECG


def image_only(model: TaffUNet) -> TaffUNet:
    """The same network without an ECG, with the same weights."""
    other = small("ap").train(model.training)
    shared = {name: x for name, x in model.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    other.load_state_dict(shared)
    return other


def with_absent(has_ecg: list[bool]) -> dict[str, Tensor]:
    """The inputs of the whole network, with NaN wherever there is no ECG."""
    given, has = inputs("full", len(has_ecg)), torch.tensor(has_ecg)
    given["ecg"][~has] = torch.nan
    given["interval"][~has] = torch.nan
    return {**given, "has_ecg": has}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["has_ecg", "no ecg", "no interval"])
def test_b10_without_any_ecg_it_is_the_image_only_network(training, how):
    model = unequal(small()).train(training)
    given = with_absent([False] * 3)
    dropped = {"has_ecg": (), "no ecg": ("ecg", "interval", "has_ecg"), "no interval": ("interval",)}[how]
    given = {name: value for name, value in given.items() if name not in dropped}
    got = model(images(), **given)
    want = image_only(model)(images(), given["prior"])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    gate = model.run(images(), **given).gate
    assert gate.shape == (3, 2)
    assert not gate.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_ecg", [[True, False, True], [False, True, False]])
def test_b9_rows_without_an_ecg_are_the_image_only_network_s_and_change_no_other(training, has_ecg):
    """Also with a single ECG in the batch; the others come out as if the batch held them alone."""
    model = unequal(small()).train(training)
    given, has = with_absent(has_ecg), torch.tensor(has_ecg)
    output = model.run(images(), **given)
    want = image_only(model)(images(), given["prior"])
    for a, b in zip(output.logits, want if training else [want], strict=True):
        assert torch.equal(a[~has], b[~has])
        assert not torch.allclose(a[has], b[has])
    alone = model.run(images()[has], **{name: value[has] for name, value in given.items()})
    torch.testing.assert_close(output.logits[0][has], alone.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.gate[has], alone.gate)
    torch.testing.assert_close(output.reconstruction[has], alone.reconstruction, rtol=1e-3, atol=1e-4)
    assert not output.gate[~has].any()
    assert not output.reconstruction[~has].any()


@pytest.mark.parametrize("has_ecg", [[True, False, True], [False, True, False], [False] * 3])
def test_absent_ecgs_leave_no_trace_in_gradients_and_statistics(has_ecg):
    model, alone = unequal(small()), unequal(small())
    given, has = with_absent(has_ecg), torch.tensor(has_ecg)

    def learn(model, image, **inputs):
        output = model.run(image, **inputs)
        (output.logits[0].square().sum() + output.reconstruction.square().sum() + output.gate.square().sum()).backward()

    learn(model, images(), **given)
    if has.any():
        learn(alone, images()[has], **{name: value[has] for name, value in given.items()})
    for name, buffer in model.ecg.named_buffers():
        torch.testing.assert_close(buffer, dict(alone.ecg.named_buffers())[name], msg=name)
    for name, parameter in model.ecg.named_parameters():
        other = dict(alone.ecg.named_parameters())[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=2e-3, atol=1e-4, msg=name)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ----------------------------------------------------------------------------------------- building, saving, copying


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_seeds_reproduce_and_differ(setting):
    one, again = ([small(setting, init_seed=seed).state_dict() for seed in range(3)] for _ in range(2))
    for a, b in zip(one, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for name in one[0]:
        drawn = one[0][name].unique().numel() > 1 and not name.startswith("ecg.")  # that has a seed of its own
        assert torch.equal(one[0][name], one[1][name]) != drawn, name


@pytest.mark.parametrize("setting", ["baseline", "full"])
def test_saved_copied_and_pickled_it_stays_the_same_b14(tmp_path, setting):
    model = unequal(small(setting, skip="original", max_days=60.0)).eval()
    model.save_pretrained(tmp_path)
    expected = model(images(), **inputs(setting))
    for other in (TaffUNet.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert torch.equal(other(images(), **inputs(setting)), expected)


def test_it_starts_from_a_trained_autoencoder(tmp_path):
    trained = EcgAutoencoder(EcgAutoencoderConfig(**{**vars(SMALL), "init_seed": 5}))
    trained.save_pretrained(tmp_path / "ecg")
    model = small("ecg", ecg_checkpoint=str(tmp_path / "ecg"))
    assert all(torch.equal(x, model.ecg.state_dict()[name]) for name, x in trained.state_dict().items())
    assert model.ecg.training
    model.save_pretrained(tmp_path / "whole")
    assert "checkpoint" not in (tmp_path / "whole" / "config.json").read_text()
    assert TaffUNet.from_pretrained(tmp_path / "whole").config.ecg_checkpoint is None
    with pytest.raises(CheckpointError, match=r"wrong configuration: got .*z_dim=8.* want .*z_dim=64"):
        small("ecg", ecg=EcgAutoencoderConfig(), ecg_checkpoint=str(tmp_path / "ecg"))
    other = EcgAutoencoderConfig(**{**vars(SMALL), "lead_scaling": "voltage"})
    with pytest.raises(
        CheckpointError,
        match=r"got lead_scaling='zscore', want lead_scaling='voltage'; .*"
        r"--set network\.ecg\.lead_scaling=zscore$",
    ):
        small("ecg", ecg=other, ecg_checkpoint=str(tmp_path / "ecg"))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("setting", "changes", "error", "message"),
    [
        ("full", {"prior": None}, ValueError, r"'full' needs prior, one-hot AHA segments of shape \(B, 17, H, W\)"),
        ("ecg", {"prior": torch.zeros(3, 17, 32, 32)}, ValueError, "'ecg' takes no prior; leave it out, or use 'ap'"),
        ("ap", {"prior": torch.zeros(3, 18, 32, 32)}, ShapeError, r"expected a prior of shape \(3, 17, 32, 32\)"),
        ("ap", {"ecg": torch.zeros(3, 12, 64)}, ValueError, "'ap' takes no ecg"),
        ("full", {"interval": None}, ValueError, "'full' needs interval, the days between ECG and image"),
        ("full", {"ecg": torch.zeros(2, 12, 64)}, ShapeError, "expected ecg of 3 samples"),
        ("full", {"ecg": torch.zeros(3, 12, 60)}, ShapeError, r"expected beats of shape \(B, 12, 64\).*pad them with"),
        ("full", {"has_ecg": torch.tensor([True])}, ShapeError, "expected has_ecg of 3 samples"),
        ("full", {"has_ecg": torch.ones(3, 2) > 0}, ShapeError, r"has_ecg of shape \(3,\), .*, got \(3, 2\)"),
        ("full", {"ecg": None, "has_ecg": torch.tensor([False, True, False])}, ValueError, "there is no ecg; pass it"),
        ("full", {"interval": torch.zeros(2)}, ShapeError, "interval"),
        ("full", {"prior": PRIOR * 255}, ValueError, "a prior of 0 and 1, .*, got 0 to 255; divide it by its largest"),
        ("full", {"prior": (PRIOR * 255).byte()}, ValueError, "got 0 to 255"),
        ("full", {"prior": PRIOR - 0.5}, ValueError, "got -0.5 to 0.5"),
        ("full", {"prior": PRIOR * float("nan")}, ValueError, "got nan to nan"),
        ("full", {"ecg": torch.zeros(3, 12, 64).int()}, TypeError, "got torch.int32; scale them as network_ecg does"),
        ("grid", {}, ValueError, r"projection='grid' needs transform, how each image was mirrored and turned"),
        ("grid", {"transform": torch.zeros(3, 3, 3)}, ShapeError, r"transform has shape \(3, 3, 3\)"),
        ("full", {"image": torch.zeros(3, 3, 32, 32)}, ShapeError, r"expected images of shape \(B, 1, H, W\)"),
        ("full", {"image": torch.zeros(3, 1, 36, 36)}, ShapeError, "multiples of 8"),
    ],
)
def test_rejects(setting, changes, error, message):
    network = small("ecg_time", projection="grid") if setting == "grid" else small(setting)
    given = inputs("ecg_time" if setting == "grid" else setting)
    with pytest.raises(error, match=message):
        network(**{"image": images(), **given, **changes})


def test_inputs_of_other_types_are_taken():
    network, given = small("full").eval(), inputs("full")
    wanted = network(image=images(), **given)
    for changes in ({"ecg": given["ecg"].double()}, {"prior": PRIOR}, {"prior": given["prior"] > 0}):
        assert torch.equal(network(image=images(), **{**given, **changes}), wanted)
    some = {**given, "ecg": given["ecg"].double(), "has_ecg": torch.tensor([True, False, True])}
    assert network.train()(image=images(), **some)[0].dtype == torch.float32
    assert network.eval().attention(given["ecg"].double()).lead.dtype == torch.float32


def test_a_beat_of_600_samples_is_refused_with_advice():
    with pytest.raises(ShapeError, match=r"\(B, 12, 608\), got \(1, 12, 600\); pad them with four zeros"):
        small("ecg", ecg=EcgAutoencoderConfig())(images(1), ecg=torch.zeros(1, 12, 600))
