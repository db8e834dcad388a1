"""Published ECG autoencoders become our folders: wrapped or not, every tensor in its place, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from golden_numbers import load_fixture
from safetensors.torch import load_file, save_file
from torch import Tensor

from trifuse.architectures.taff_unet import EcgAutoencoder, EcgAutoencoderConfig
from trifuse.architectures.taff_unet.convert import (
    convert_ecg_dual_attention,
    read_ecg_dual_attention,
    rename_ecg_dual_attention,
)
from trifuse.kernels import CheckpointError

SMALL = "ecg_dual_attention/small_t128_z16"
LINEAR = "ecg_dual_attention/small_t64_z64_linear"


def published(name: str = SMALL) -> dict[str, Tensor]:
    fixture = load_fixture(name)
    return {part.removeprefix("param."): fixture.tensors[part] for part in fixture.expected("param.")}


WRAPPERS = {
    "bare": lambda state: state,
    "nested": lambda state: {"state_dict": state},
    "prefixed": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"model": {f"module.model.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_converted_folders_load_and_give_the_published_numbers(tmp_path, wrapper):
    torch.save(WRAPPERS[wrapper](published()), tmp_path / "published.pth")
    report = convert_ecg_dual_attention(tmp_path / "published.pth", tmp_path / "out")
    model = EcgAutoencoder.from_pretrained(tmp_path / "out")
    assert model.config == report.config == EcgAutoencoderConfig(128, 16, 2, 5, "upstream")
    fixture = load_fixture(SMALL)
    assert fixture.difference("recon", model(fixture.tensors["input"])) < fixture.bound("recon", torch.float32)
    assert len(report.mapped) == len(published())
    assert report.ignored == ()


def test_what_the_folder_says(tmp_path):
    save_file(published(LINEAR), tmp_path / "published.safetensors")
    convert_ecg_dual_attention(tmp_path / "published.safetensors", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architecture"] == "ecg_autoencoder"
    assert described["config"]["lead_layout"] == "upstream"
    assert (described["config"]["final_linear"], described["config"]["pooled_dim"]) == (True, 32)
    assert described["converted_from"]["file"] == "published.safetensors"


def test_leads_are_stacked_in_order():
    state = published()
    ours, report = rename_ecg_dual_attention(state, "here")
    assert str(report).startswith("here: EcgAutoencoder(time_steps=128")
    for lead in (0, 2, 10, 11):
        pairs = {
            "in_proj.weight": f"time_mha.{lead}.in_proj_weight",
            "out_proj.bias": f"time_mha.{lead}.out_proj.bias",
            "norm1.weight": f"time_norm_1.{lead}.weight",
            "norm2.weight": f"mlp_norm_1.{lead}.weight",
            "fc1.bias": f"time_mlp.{lead}.fc1.bias",
        }
        for mine, theirs in pairs.items():
            assert torch.equal(ours[f"encoder.attention.temporal.{mine}"][lead], state[f"encoder.attention.{theirs}"])
    lead_norms = {"norm1": "norm2", "norm2": "lead_norm_1"}  # upstream names them the other way round
    for mine, theirs in lead_norms.items():
        found = ours[f"encoder.attention.lead.{mine}.bias"]
        assert torch.equal(found[0], state[f"encoder.attention.{theirs}.bias"])


def test_an_encoder_saved_twice_counts_once():
    state = published()
    again = {f"decoder.{name}": tensor.clone() for name, tensor in state.items() if name.startswith("encoder.")}
    ours, report = rename_ecg_dual_attention(state | again, "here")
    assert set(report.ignored) == set(again)
    assert sum(tensor.numel() for name, tensor in ours.items() if "running" not in name and "num_" not in name) == 32192
    again["decoder.encoder.input_conv.0.bias"] += 1
    with pytest.raises(CheckpointError, match=r"1 unexpected: decoder\.encoder\.input_conv\.0\.bias"):
        rename_ecg_dual_attention(state | again, "here")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"encoder.vae.weight": torch.zeros(1)}), r"1 unexpected: encoder\.vae\.weight"),
        (lambda s: s.update({"optimizer": torch.zeros(1)}), "1 unexpected: optimizer"),
        (lambda s: s.pop("decoder.linear.1.bias"), r"1 missing: decoder\.linear\.1\.bias"),
        (
            lambda s: s.pop("encoder.attention.time_mlp.7.fc1.bias"),
            r"1 missing: encoder\.attention\.temporal\.fc1\.bias",
        ),
        (
            lambda s: s.update({"encoder.attention.time_mlp.7.fc1.bias": torch.zeros(3)}),
            r"1 missing: encoder\.attention\.temporal\.fc1\.bias",
        ),
        (
            lambda s: s.update({"encoder.attention.lead_mlp.fc1.bias": torch.zeros(3)}),
            r"1 misshapen: encoder\.attention\.lead\.fc1\.bias \(1, 3\) instead of \(1, 128\)",
        ),
        (
            lambda s: s.update({"decoder.linear.1.bias": torch.zeros(96).long()}),
            "of a floating-point type, got torch.int64",
        ),
        (lambda s: s.update({"module.decoder.linear.1.bias": torch.zeros(96)}), "a second time; it mixes two networks"),
        (
            lambda s: s.pop("decoder.linear.0.weight"),
            "found no input convolution, blocks over time, pooling and linear",
        ),
        (
            lambda s: s.update({"decoder.linear.0.weight": torch.zeros(0, 16)}),
            "are those of no ECG autoencoder of 12 leads",
        ),
        (lambda s: s.update({"encoder.input_conv.0.weight": torch.zeros(3, 1, 5)}), "those of no ECG autoencoder"),
    ],
)
def test_refused_checkpoints(tmp_path, change, message):
    state = published()
    change(state)
    torch.save(state, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_ecg_dual_attention(tmp_path / "published.pth", tmp_path / "out")
    assert re.search(r"published\.pth", str(caught.value))
    assert not (tmp_path / "out").exists()


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    torch.save({"state_dict": published(), "args": Canary(str(tmp_path / "sung"))}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        read_ecg_dual_attention(tmp_path / "published.pth")
    assert not (tmp_path / "sung").exists()


def test_the_output_folder_does_not_hold_the_checkpoint(tmp_path):
    save_file(published(), tmp_path / "model.safetensors")
    before = load_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lies in the output folder"):
        convert_ecg_dual_attention(tmp_path / "model.safetensors", tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == before.keys()
