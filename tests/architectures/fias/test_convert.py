"""Conversion of DilateFormer weights: there and back, the three published key lists, and what is refused."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from golden_numbers import load_fixture
from safetensors.torch import load_file, save_file
from torch import Tensor

from trifuse.architectures.cli.main import main
from trifuse.architectures.fias import DilateFormer, Fias, FiasConfig
from trifuse.architectures.fias.convert import (
    convert_dilateformer,
    read_dilateformer,
    rename_dilateformer,
)
from trifuse.architectures.fias.published_names import DilateFormerConfig
from trifuse.kernels import CheckpointError


def random_state(variant: str = "nano") -> dict[str, Tensor]:
    """Numbers for every tensor, so that no two parts of the network could be exchanged unseen."""
    generator = torch.Generator().manual_seed(0)
    state = DilateFormer(variant, out_norm=False).state_dict()
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        for name, tensor in state.items()
    }


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


WRAPPERS = {
    "bare": lambda state: state,
    "nested": lambda state: {"model": state},
    "prefixed": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"state_dict": {f"module.model.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_round_trip(tmp_path, wrapper):
    state = random_state()
    torch.save(WRAPPERS[wrapper](with_head(state)), tmp_path / "published.pth")
    report = convert_dilateformer(tmp_path / "published.pth", tmp_path / "out")
    assert report.config == DilateFormerConfig("nano")
    assert set(report.mapped.values()) == set(state)
    assert len(report.ignored) == 2
    assert all(name.endswith(("head.weight", "head.bias")) for name in report.ignored)
    assert_same(dict(sorted(load_file(tmp_path / "out" / "model.safetensors").items())), dict(sorted(state.items())))
    assert_same(read_dilateformer(tmp_path / "out")[0], state)
    for source in ("out", "published.pth"):
        encoder = DilateFormer("nano", out_norm=False, checkpoint=tmp_path / source)
        assert_same(encoder.state_dict(), state)


def test_safetensors_and_what_the_folder_says(tmp_path):
    save_file(random_state(), tmp_path / "published.safetensors")
    report = convert_dilateformer(tmp_path / "published.safetensors", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architecture"] == "dilateformer"
    assert described["config"] == {"variant": "nano"}
    assert described["converted_from"]["file"] == "published.safetensors"
    assert "DilateFormer('nano')" in str(report)


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_names_of_every_published_size_are_known(variant):
    facts = load_fixture(f"dilateformer_full/keys_{variant}").facts
    published = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in facts["state_dict_keys"].items()
    }
    state, report = rename_dilateformer(published, variant)
    assert report.config.variant == variant
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert [name for name in published if name not in report.ignored] == list(state)


def test_the_last_norm_starts_as_the_checkpoint_s_and_the_others_anew(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "published.pth")
    convert_dilateformer(tmp_path / "published.pth", tmp_path / "out")
    for encoder in (
        DilateFormer("nano", checkpoint=tmp_path / "out"),
        Fias(FiasConfig(variant="nano", encoder_checkpoint=str(tmp_path / "out"))).global_encoder,
    ):
        loaded = encoder.state_dict()
        new = {name for name in loaded if name.startswith("out_norms.")}
        assert len(new) == 6
        assert {name: loaded[name] for name in loaded if name not in new}.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert torch.equal(encoder.norm.weight.detach(), state["norm.weight"])
        assert all(torch.equal(loaded[name], torch.full_like(loaded[name], name.endswith("weight"))) for name in new)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stages.1.blocks.0.norm1.bias"), r"1 missing: stages\.1\.blocks\.0\.norm1\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"stages.9.bias": torch.zeros(1)}), r"1 unexpected: stages\.9\.bias"),
        (lambda s: s.update({"norm.bias": torch.zeros(5)}), r"1 misshapen: norm\.bias \(5,\) instead of \(192,\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(192).long()}), "'norm.bias' of a floating-point type, got torch"),
        (lambda s: s.update({"module.norm.bias": torch.zeros(192)}), "gives 'norm.bias' a second time"),
        (lambda s: s.pop("patch_embed.proj.9.weight"), "found no overlapping patch embedding"),
        (lambda s: s.update({"patch_embed.proj.9.weight": torch.zeros(3)}), "found no overlapping patch embedding"),
        (lambda s: s.clear(), "found no overlapping patch embedding"),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("stages.2.blocks.1.")],
            r"24 channels and blocks \(1, 1, 1, 1\) are none of the variants nano, tiny, small, base",
        ),
    ],
)
def test_c8_c9_tensors_of_something_else_are_refused(change, message):
    state = random_state()
    change(state)
    with pytest.raises(CheckpointError, match=message) as raised:
        rename_dilateformer(state, "some file")
    assert "some file" in str(raised.value)


def test_c15_another_size_is_detected_and_named(tmp_path):
    torch.save(random_state("nano"), tmp_path / "weights.pth")
    message = re.escape("holds the weights of DilateFormer('nano'), but ")
    with torch.device("meta"), pytest.raises(CheckpointError, match=message):
        DilateFormer("tiny", checkpoint=tmp_path / "weights.pth")


def test_c7_a_folder_of_another_architecture_is_refused(tmp_path):
    torch.save(random_state(), tmp_path / "weights.pth")
    convert_dilateformer(tmp_path / "weights.pth", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(described | {"architecture": "dinov2"}))
    with pytest.raises(CheckpointError, match="wrong architecture: got 'dinov2', want 'dilateformer'"):
        read_dilateformer(tmp_path / "out")


def test_c3_a_changed_byte_is_found(tmp_path):
    torch.save(random_state(), tmp_path / "weights.pth")
    convert_dilateformer(tmp_path / "weights.pth", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="the content has changed since it was written"):
        DilateFormer("nano", checkpoint=tmp_path / "out")


def test_c11_nan_is_refused_when_loaded(tmp_path):
    state = random_state()
    state["norm.weight"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"not finite[^\n]*\n *norm\.weight"):
        DilateFormer("nano", checkpoint=tmp_path / "nan.pth")


class Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


def test_c13_code_in_a_pickle_is_never_executed(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    torch.save(random_state() | {"payload": Payload(str(canary))}, path)
    with pytest.raises(CheckpointError, match="nothing in it was executed") as raised:
        convert_dilateformer(path, tmp_path / "out")
    assert str(path) in str(raised.value)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_l5_a_source_is_never_written_over(tmp_path):
    save_file(random_state(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="lies in the output folder"):
        convert_dilateformer(tmp_path / "model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_command_converts_once(tmp_path, capsys):
    save_file(with_head(random_state()), tmp_path / "published.safetensors")
    words = ["convert", "dilateformer", str(tmp_path / "published.safetensors")]
    assert main(words) == 0
    assert "DilateFormer('nano')" in capsys.readouterr().out
    assert (tmp_path / "published" / "model.safetensors").exists()
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "half.pth").write_bytes(b"PK")
    assert main(["convert", "dilateformer", str(tmp_path / "half.pth")]) == 4


def test_another_variant_than_asked_for_is_named(tmp_path):
    torch.save(random_state(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"holds the weights of DilateFormer\('nano'\), but 'tiny' was asked for"):
        DilateFormer("tiny", checkpoint=tmp_path / "weights.pth")
