"""Conversion of DINOv2 weights: every file that is not what it should be is refused."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from dinov2_layouts import in_memory, random_state
from safetensors.torch import save_file

from trifuse.architectures.dino_unet.convert import (
    convert_dinov2,
    load_dinov2_state_dict,
    rename_dinov2,
)
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels import CheckpointError

pytestmark = pytest.mark.usefixtures("tiny_swiglu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.norm1.bias"), r"1 missing: blocks\.1\.norm1\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"blocks.0.attn.bias": torch.zeros(1)}), r"1 unexpected: blocks\.0\.attn\.bias"),
        (
            lambda s: s.update({"norm.bias": torch.zeros(65)}),
            r"1 misshapen: norm\.bias \(65,\) instead of \(64,\)",
        ),
        (lambda s: s.pop("pos_embed"), "found no class token and position table"),
        (lambda s: s.clear(), "found no class token and position table"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 0, 64)), "found no class token and position table"),
        (lambda s: s.update(cls_token=torch.zeros(())), "found no class token and position table"),
        (lambda s: s.update(register_tokens=torch.zeros(3)), "found no class token and position table"),
        (lambda s: s.update(cls_token=s["cls_token"].long()), "'cls_token' of a floating-point type, got torch.int64"),
        (lambda s: s.update(pos_embed=torch.zeros(64)), "found no class token and position table"),
        (
            lambda s: s.update(pos_embed=torch.zeros(1, 50, 64)),
            "tokens of width 64, 4 blocks with mlp and 7 x 7 positions are none of the variants",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.3.")],
            "tokens of width 64, 3 blocks with mlp and 16 x 16 positions are none of the variants tiny, small, base",
        ),
        (
            lambda s: s.update({"layernorm.bias": torch.zeros(64)}),
            r"'layernorm\.bias' gives 'norm\.bias' a second time",
        ),
    ],
)
def test_c8_c9_tensors_of_something_else_are_refused(change, message):
    state = random_state()
    change(state)
    with pytest.raises(CheckpointError, match=message) as raised:
        rename_dinov2(state, "some file")
    assert "some file" in str(raised.value)


def test_c8_a_part_of_a_fused_tensor_is_not_enough():
    state = in_memory(random_state())
    del state["encoder.layer.2.attention.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.2\.attn\.qkv\.weight"):
        rename_dinov2(state, "x")


@pytest.mark.parametrize("part", [torch.zeros(()), torch.zeros(2, 3, 4), torch.zeros(5, 64)])
def test_c9_parts_that_do_not_join_are_refused(part):
    state = in_memory(random_state())
    state["encoder.layer.0.attention.q_proj.weight"] = part
    with pytest.raises(CheckpointError, match=r"the parts of 'blocks\.0\.attn\.qkv\.weight' do not join"):
        rename_dinov2(state, "weights")


def test_long_lists_are_shortened():
    with pytest.raises(CheckpointError, match=r"12 unexpected: extra0, .*, extra9 and 2 more"):
        rename_dinov2(random_state() | {f"extra{i}": torch.zeros(1) for i in range(12)}, "x")


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        (("small", 0), ("tiny", 0)),
        (("tiny", 0), ("tiny", 4)),
        (("tiny", 2), ("tiny", 0)),
        (("tiny", 0), ("tiny_swiglu", 0)),
    ],
)
def test_c15_another_size_or_registers_are_detected_and_named(tmp_path, asked, held):
    torch.save(random_state(*held), tmp_path / "weights.pth")
    pos_mode = "antialias" if held[1] else "offset"
    found = f"DinoV2Encoder({held[0]!r}, num_registers={held[1]}, pos_mode={pos_mode!r})"
    with pytest.raises(CheckpointError, match=re.escape(f"holds the weights of {found}, but ")) as raised:
        DinoV2Encoder(asked[0], num_registers=asked[1], checkpoint=tmp_path / "weights.pth")
    assert f"with {asked[1]} registers was asked for" in str(raised.value)


def test_c11_nan_is_refused_when_loaded(tmp_path):
    state = random_state()
    state["blocks.2.ls1.gamma"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"not finite[^\n]*\n *blocks\.2\.ls1\.gamma"):
        DinoV2Encoder("tiny", checkpoint=tmp_path / "nan.pth")


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


@pytest.mark.parametrize("zipped", [True, False])
def test_c13_code_in_a_pickle_is_never_executed(tmp_path, zipped):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    content = random_state() | {"payload": Payload(str(canary))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for use in (load_dinov2_state_dict, lambda p: convert_dinov2(p, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="holds code or something else; nothing in it was executed") as raised:
            use(path)
        assert str(path) in str(raised.value)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the payload was live


def test_c13_a_bare_pickle_is_never_executed(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Payload(str(canary)), protocol=2))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_dinov2_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
def test_c14_half_a_file_is_named(tmp_path, share):
    whole, path = tmp_path / "whole.pth", tmp_path / "half.pth"
    torch.save(random_state("tiny_swiglu"), whole)
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_dinov2_state_dict(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>log in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_c4_something_else_under_the_name_of_weights(tmp_path, content, what, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as raised:
        load_dinov2_state_dict(path)
    assert str(path) in str(raised.value)
    if suffix == ".pth":
        assert str(raised.value).endswith("; fetch the file itself again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "expected a dictionary of named tensors, got a Tensor"),
        ({"epoch": 3, "cls_token": torch.zeros(1)}, "got one with a int under 'epoch'"),
        ({3: torch.zeros(1)}, "got one with a Tensor under 3"),
        ([1, 2], "got a list"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_dinov2_state_dict(tmp_path / "weights.pth")


def test_c1_missing_files_and_folders(tmp_path):
    for name in ("nothing.pth", "nothing.safetensors", "nothing"):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
            load_dinov2_state_dict(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        load_dinov2_state_dict(tmp_path)


def test_c3_c7_folders_are_checked(tmp_path):
    torch.save(random_state("tiny_swiglu"), tmp_path / "weights.pth")
    folder = tmp_path / "out"
    convert_dinov2(tmp_path / "weights.pth", folder)
    described = read_record(folder / "config.json")

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="the content has changed since it was written"):
        load_dinov2_state_dict(folder)

    write_record(folder / "config.json", described | {"sha256": {}})
    with pytest.raises(CheckpointError, match=r"expected the SHA-256 of model\.safetensors, got None"):
        load_dinov2_state_dict(folder)
    (folder / "config.json").write_text(json.dumps(described | {"architecture": "dino_unet"}))
    with pytest.raises(CheckpointError, match="wrong architecture: got 'dino_unet', want 'dinov2'"):
        load_dinov2_state_dict(folder)


def test_l5_a_source_is_never_written_over(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(random_state("tiny_swiglu"), path)
    before = path.read_bytes()
    for out in (tmp_path, tmp_path / "sub" / ".."):
        with pytest.raises(CheckpointError, match="lies in the output folder"):
            convert_dinov2(path, out)
    assert path.read_bytes() == before
    assert not (tmp_path / "config.json").exists()
