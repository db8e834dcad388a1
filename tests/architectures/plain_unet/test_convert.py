"""Conversion of nnU-Net v2's checkpoints: the published names, what lies beside the weights, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_numbers import load_fixture
from safetensors.torch import save_file
from torch import Tensor

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.samples.preprocessing import Patches
from trifuse.architectures.data.volumes.nifti import new_volume, write_image
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig, plain_unet
from trifuse.architectures.plain_unet.convert import convert_nnunet, read_nnunet, rename_nnunet
from trifuse.architectures.runs.predict import load_network, predict_images
from trifuse.kernels import CheckpointError

State = dict[str, Tensor]
CONFIG = PlainUNetConfig(in_channels=2, num_classes=3, image_size=16, base_dim=3, max_dim=6)


def random_state() -> State:
    """Numbers for every tensor, so that no two parts of the network could be exchanged unseen."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) for name, tensor in PlainUNet(CONFIG).state_dict().items()
    }


def as_published(state: State) -> State:
    """Add the second names under which nnU-Net writes the same tensors again."""
    inside = {
        name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1."): tensor
        for name, tensor in state.items()
    }
    both = state | inside
    return both | {f"decoder.{name}": tensor for name, tensor in both.items() if name.startswith("encoder.")}


def as_checkpoint(state: State) -> dict:
    """What nnU-Net's trainer saves: scores are NumPy's numbers."""
    return {
        "network_weights": as_published(state),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "momentum": 0.99}]},
        "grad_scaler_state": {"scale": 65536.0},
        "logging": {"ema_fg_dice": [np.float64(0.25), np.float32(0.5)], "epoch_end_timestamps": [1.5]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": "2d", "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }


def assert_same(state: State, expected: State) -> None:
    assert list(state) == list(expected)
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


WRAPPERS: dict[str, Callable[[State], dict]] = {
    "checkpoint": as_checkpoint,
    "state": as_published,
    "bare": lambda state: state,
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in as_published(state).items()},
    "compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in as_published(state).items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_converted_and_loaded(tmp_path, wrapper):
    state = random_state()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "checkpoint_final.pth")
    report = convert_nnunet(tmp_path / "checkpoint_final.pth", tmp_path / "out")
    assert report.config == CONFIG
    assert set(report.mapped.values()) == set(state)
    assert len(report.mapped) == (len(state) if wrapper == "bare" else len(as_published(state)))
    assert report.ignored == ()
    loaded = PlainUNet.from_pretrained(tmp_path / "out")
    assert loaded.config == CONFIG
    assert_same(loaded.state_dict(), state)
    assert_same(read_nnunet(tmp_path / "out")[0], state)


def test_safetensors_that_kept_any_one_name(tmp_path):
    """Tensors that share memory are written once, under whichever of their names."""
    state = random_state()
    kept = {f"decoder.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in state.items()}
    kept = {name.replace(".norm.", ".all_modules.1."): tensor for name, tensor in kept.items()}
    save_file(kept, tmp_path / "weights.safetensors")
    report = convert_nnunet(tmp_path / "weights.safetensors", tmp_path / "out")
    assert report.config == CONFIG
    assert_same(PlainUNet.from_pretrained(tmp_path / "out").state_dict(), state)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architecture"] == "plain_unet"
    assert described["converted_from"]["file"] == "weights.safetensors"


def test_every_published_name_of_the_default_network():
    facts = load_fixture("nnunet/keys_default_256x256").facts
    published = {name: torch.zeros(()).expand(shape) for name, shape in facts["state_dict_keys"].items()}
    state, report = rename_nnunet(published, "it")
    assert sorted(state) == sorted(facts["canonical_parameter_names"])
    assert report.config == plain_unet_config()
    assert set(report.mapped) == set(published)
    small = load_fixture("nnunet/small_4stage_ds").facts["state_dict_aliases"]
    assert {alias: report.mapped.get(alias, name) for alias, name in small.items()} == small


def plain_unet_config() -> PlainUNetConfig:
    with torch.device("meta"):
        return plain_unet().config


def test_golden_numbers_go_through(tmp_path):
    """A network filled by hand gives the same logits before and after."""
    model = PlainUNet(CONFIG).eval()
    model.load_state_dict(random_state())
    torch.save(as_checkpoint(model.state_dict()), tmp_path / "weights.pth")
    convert_nnunet(tmp_path / "weights.pth", tmp_path / "out")
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(PlainUNet.from_pretrained(tmp_path / "out")(x), model(x))


# ----------------------------------------------------------------------------------------------------- plans


def planned(**changes) -> dict:
    """A checkpoint of a network of one channel whose plans say how images were prepared."""
    plan = {
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "spacing": [0.8, 0.75],
        "patch_size": [24, 16],
        "unet_depth": 3,
    }
    arguments = {"plans": {"configurations": {"2d": {**plan, **changes}}}, "configuration": "2d"}
    state = PlainUNet(replace(CONFIG, in_channels=1)).state_dict()
    return as_checkpoint(state) | {"init_args": arguments}


def converted(folder, **changes):
    torch.save(planned(**changes), folder / "planned.pth")
    report = convert_nnunet(folder / "planned.pth", folder / "out")
    return str(report)


def test_c12_images_are_prepared_as_the_plans_say(tmp_path):
    assert "patches of 24 x 16: predicts by squares of 16" in converted(tmp_path)
    preprocessing = load_network(tmp_path / "out")[1].preprocessing
    assert (preprocessing.intensity, preprocessing.image_size) == ("zscore", 16)
    assert preprocessing.patches == Patches((0.8, 0.75))
    image = new_volume(np.random.default_rng(0).random((3, 20, 20), dtype=np.float32), np.diag([0.8, 0.8, 3, 1]))
    write_image(tmp_path / "case.nii.gz", image.voxels, like=image)
    with pytest.raises(CheckpointError, match=r"was trained at \(0.8, 0.75\) mm; leave the spacing to it"):
        predict_images(tmp_path / "out", tmp_path / "case.nii.gz", tmp_path / "maps", spacing_mm=(1.5, 1.5))
    assert len(predict_images(tmp_path / "out", tmp_path / "case.nii.gz", tmp_path / "maps")) == 1
    converted(tmp_path, normalization_schemes=["RescaleTo01Normalization"])
    assert load_network(tmp_path / "out")[1].preprocessing.intensity == "minmax"


@pytest.mark.parametrize(
    ("changes", "scheme"),
    [
        ({"normalization_schemes": ["CTNormalization"]}, "CTNormalization"),
        ({"use_mask_for_norm": [True]}, "ZScoreNormalization within the object"),
    ],
)
def test_c12_images_that_cannot_be_prepared_as_the_plans_say(tmp_path, changes, scheme):
    assert f"scaled by {scheme}, which trifuse does not do" in converted(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"intensity.* got '{scheme}'; trifuse cannot prepare images"):
        load_network(tmp_path / "out")


def test_c12_plans_that_nnunet_did_not_write(tmp_path):
    for changes in ({"spacing": [0.8]}, {"patch_size": None}, {"spacing": [-1, 1]}, {"inherits_from": "nobody"}):
        with pytest.raises(CheckpointError, match=r"planned.pth: expected nnU-Net's plans in init_args, got"):
            converted(tmp_path, **changes)
    torch.save(planned() | {"init_args": {}}, tmp_path / "bare.pth")
    assert "no plans lie beside its weights" in str(convert_nnunet(tmp_path / "bare.pth", tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------- refusals

FIRST = "encoder.stages.0.0.convs.0.conv.weight"
UP = "decoder.transpconvs.0.weight"
HEAD = "decoder.seg_layers.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.stages.1.0.convs.1.norm.bias"), r"1 missing: encoder\.stages\.1\.0\.convs\.1\.norm"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"encoder.stages.0.0.convs.2.conv.bias": torch.zeros(3)}), r"unexpected: .*convs\.2\.conv"),
        (lambda s: s.update({UP: torch.zeros(6, 5, 2, 2)}), r"1 misshapen: decoder\.transpconvs\.0\.weight"),
        (lambda s: s.update({HEAD: torch.zeros(3, 6, 1, 1).long()}), "of a floating-point type, got torch.int64"),
        (lambda s: s[FIRST].fill_(torch.nan), f"'{re.escape(FIRST)}' holds NaN or infinite numbers"),
        (lambda s: s.update({f"decoder.{FIRST}": s[FIRST] + 1}), "differs from what else is called 'encoder"),
        (lambda s: s.update({f"decoder.{FIRST}": s[FIRST].half()}), "differs from what else is called 'encoder"),
        (
            lambda s: s.update({"decoder.stages.0.convs.0.all_modules.0.bias": torch.zeros(6)}),
            r"differs from what else is called 'decoder\.stages\.0\.convs\.0\.conv\.bias'; nnU-Net writes both alike",
        ),
        (lambda s: s.update({"encoder.stem.convs.0.conv.weight": torch.zeros(1)}), r"residual encoder \(ResEnc\)"),
        (lambda s: s.update({"encoder.stages.0.blocks.0.conv1.conv.bias": torch.zeros(1)}), r"encoder \(ResEnc\)"),
        (lambda s: s.update({"conv_blocks_context.0.blocks.0.conv.bias": torch.zeros(1)}), "a network of nnU-Net v1"),
        (lambda s: s.update({FIRST: torch.zeros(3, 2, 3, 3, 3)}), "holds a 3D network; convert one .* '2d'"),
        (lambda s: s.update({UP: torch.zeros(6, 6, 1, 2)}), r"halve both axes, got strides \[\(1, 2\), \(2, 2\)\]"),
        (lambda s: s.update({FIRST: torch.zeros(2, 2, 3, 3)}), "channels that double .*, got 2, 6, 6"),
        (lambda s: s.update({HEAD: torch.zeros(1, 6, 1, 1)}), "cannot be: num_classes must be at least 2, got 1"),
        (lambda s: s.pop(FIRST), "expected the weights of nnU-Net v2's PlainConvUNet, found no"),
        (lambda s: s.update({FIRST: torch.zeros(())}), "expected the weights of nnU-Net v2's PlainConvUNet"),
        (lambda s: s.update({HEAD: torch.zeros(())}), "expected the weights of nnU-Net v2's PlainConvUNet"),
        (lambda s: s.clear(), "expected the weights of nnU-Net v2's PlainConvUNet"),
    ],
)
def test_c7_c8_c9_c11_tensors_of_something_else_are_refused(change, message):
    state = random_state()
    change(state)
    with pytest.raises(CheckpointError, match=message) as raised:
        rename_nnunet(state, "some file")
    assert "some file" in str(raised.value)


class Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


def test_c13_code_beside_the_weights_is_never_executed(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    torch.save(as_checkpoint(random_state()) | {"_best_ema": Payload(str(canary))}, path)
    with pytest.raises(CheckpointError, match="nothing in it was executed") as raised:
        convert_nnunet(path, tmp_path / "out")
    assert str(path) in str(raised.value)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_no_weights(tmp_path):
    torch.save(random_state() | {"score": np.float64(0.5)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"a dictionary of named tensors, got one with a .* under 'score'"):
        convert_nnunet(tmp_path / "weights.pth", tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_c2_c14_a_file_that_was_cut_short(tmp_path, kept):
    torch.save(as_checkpoint(random_state()), tmp_path / "weights.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "weights.pth").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"weights\.pth: expected tensors saved by PyTorch, found"):
        convert_nnunet(tmp_path / "weights.pth", tmp_path / "out")


def test_the_command_converts_once(tmp_path, capsys):
    torch.save(as_checkpoint(random_state()), tmp_path / "checkpoint_best.pth")
    words = ["convert", "nnunet", str(tmp_path / "checkpoint_best.pth")]
    assert main(words) == 0
    assert "PlainUNetConfig(in_channels=2, num_classes=3" in capsys.readouterr().out
    assert (tmp_path / "checkpoint_best" / "model.safetensors").exists()
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0
