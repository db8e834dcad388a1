"""Conversion of DINOv2 weights: three layouts there and back, and every file that is not what it should be."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from golden_numbers import load_fixture
from safetensors.torch import load_file, save_file

from trifuse.architectures.dino_unet.convert import (
    EncoderConfig,
    convert_dinov2,
    load_dinov2_state_dict,
    read_dinov2,
    rename_dinov2,
)
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.dino_unet.variants import VARIANTS
from trifuse.architectures.storage.pretrained import load_strict
from trifuse.kernels import CheckpointError

# The renaming that transformers applies to hub files when it loads them, backwards.
HUB_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


@pytest.fixture(autouse=True)
def tiny_swiglu(monkeypatch):
    """A variant with giant's feed-forward that is small enough to be written and read in a moment."""
    monkeypatch.setitem(
        VARIANTS, "tiny_swiglu", type(VARIANTS["tiny"])(embed_dim=16, depth=2, num_heads=2, ffn="swiglu", native_grid=3)
    )


def random_state(variant="tiny", num_registers=0):
    """Numbers for every tensor, the mask token too, so that no two parts of the network could be exchanged unseen."""
    state = DinoV2Encoder(variant, num_registers=num_registers).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def in_chunks(state):
    """The original layout as FSDP training leaves it: blocks.<chunk>.<i>, two blocks to a chunk."""
    return {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): t for key, t in state.items()}


def in_memory(state):
    """The names of transformers' Dinov2Model, by the mapping that stands in the golden data."""
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("blocks.", "encoder.layer.")
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("attn.proj", "attention.o_proj"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("mlp.w3", "mlp.down_proj"),
            ("pos_embed", "embeddings.position_embeddings"),
        ):
            new = new.replace(ours, theirs)
        new = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", new)
        new = re.sub(r"^norm\.", "layernorm.", new)
        split = {"attn.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.w12": ("gate_proj", "up_proj")}
        for fused, names in split.items():
            if fused in new:
                folder = "attention" if fused == "attn.qkv" else "mlp"
                for part, theirs in zip(tensor.chunk(len(names)), names, strict=True):
                    renamed[new.replace(fused, f"{folder}.{theirs}")] = part.clone()
                break
        else:
            renamed[new] = tensor
    return renamed


def in_hub_file(state):
    renamed = {}
    for name, tensor in in_memory(state).items():
        for ours, theirs in HUB_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    for name in [name for name in renamed if "mlp.gate_proj" in name]:
        parts = [renamed.pop(name), renamed.pop(name.replace("gate_proj", "up_proj"))]
        renamed[name.replace("gate_proj", "weights_in")] = torch.cat(parts)
    return renamed


LAYOUTS = {"original": dict, "chunked": in_chunks, "hub file": in_hub_file, "in memory": in_memory}


def assert_same(state, expected):
    assert list(state) == list(expected)
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "num_registers"), [("tiny", 0), ("tiny", 4), ("tiny_swiglu", 0)])
def test_round_trip(tmp_path, variant, num_registers, layout, suffix):
    state = random_state(variant, num_registers)
    published = LAYOUTS[layout](state)
    path = tmp_path / f"weights{suffix}"
    torch.save(published, path) if suffix == ".pth" else save_file(published, path)
    assert_same(load_dinov2_state_dict(path), state)

    report = convert_dinov2(path, tmp_path / "out")
    pos_mode = "antialias" if num_registers else "offset"
    assert report.config == EncoderConfig(variant, num_registers, pos_mode)
    assert set(report.mapped) == set(published)
    assert set(report.mapped.values()) == set(state)
    assert (report.ignored, report.missing, report.misshapen, report.unexpected) == ((), (), (), ())
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), dict(sorted(state.items())))
    encoder = DinoV2Encoder(variant, pos_mode, checkpoint=tmp_path / "out", num_registers=num_registers)
    assert_same(encoder.state_dict(), state)
    direct = DinoV2Encoder(variant, pos_mode, checkpoint=path, num_registers=num_registers)
    assert_same(direct.state_dict(), state)


def test_folder_says_what_is_in_it(tmp_path):
    path = tmp_path / "dinov2_vitx14_reg4_pretrain.pth"
    torch.save(random_state(num_registers=4), path)
    convert_dinov2(path, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architecture"] == "dinov2"
    assert described["config"] == {"variant": "tiny", "num_registers": 4, "pos_mode": "antialias"}
    assert described["converted_from"]["file"] == path.name
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("variant", ["vits14", "vitb14", "vitl14", "vitg14"])
def test_names_of_every_published_size_are_known(variant):
    """The key lists of both implementations map onto each other and onto ours, without a tensor to spare."""
    facts = load_fixture(f"dinov2/keys_{variant}").facts
    states = []
    for keys in ("state_dict_keys", "transformers_state_dict_keys"):
        published = {name: torch.empty(shape, device="meta") for name, shape in facts[keys].items()}
        state, report = rename_dinov2(published, keys)
        assert set(report.mapped) == set(published)
        states.append({name: list(tensor.shape) for name, tensor in state.items()})
    assert states[0] == states[1] == facts["state_dict_keys"]


@pytest.mark.parametrize("use_swiglu", [False, True])
def test_transformers_model_computes_the_same(use_swiglu):
    """An oracle that nobody here wrote: the same weights, read from its own state dict, give the same tokens."""
    transformers = pytest.importorskip("transformers")
    variant = "tiny_swiglu" if use_swiglu else "tiny"
    shape = VARIANTS[variant]
    config = transformers.Dinov2Config(
        hidden_size=shape.embed_dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        image_size=14 * shape.native_grid,
        patch_size=14,
        use_swiglu_ffn=use_swiglu,
    )
    model = transformers.Dinov2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    encoder = DinoV2Encoder(variant, pos_mode="size")
    load_strict(encoder, rename_dinov2(model.state_dict(), "Dinov2Model")[0], "Dinov2Model")
    image = torch.randn(2, 3, 56, 70, generator=generator)
    with torch.no_grad():
        expected = model(image).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(image)["features"][-1], expected, atol=1e-4, rtol=1e-4)


def test_training_checkpoints_are_unwrapped_and_their_heads_ignored(tmp_path):
    state = random_state()
    nested = {"teacher": {f"module.backbone.{name}": tensor for name, tensor in in_chunks(state).items()}}
    nested["teacher"]["dino_head.last_layer.weight"] = torch.zeros(2, 2)
    torch.save(nested, tmp_path / "teacher.pth")
    loaded, report = read_dinov2(tmp_path / "teacher.pth")
    assert_same(loaded, state)
    assert report.ignored == ("dino_head.last_layer.weight",)
    assert "1 ignored: dino_head.last_layer.weight" in str(report)
    classifier = {f"dinov2.{name}": tensor for name, tensor in in_memory(state).items()}
    classifier |= {"classifier.weight": torch.zeros(5, 128), "classifier.bias": torch.zeros(5)}
    loaded, report = rename_dinov2(classifier, "Dinov2ForImageClassification")
    assert_same(loaded, state)
    assert report.ignored == ("classifier.weight", "classifier.bias")


def test_mask_token_may_be_absent():
    state = random_state()
    del state["mask_token"]
    loaded, report = rename_dinov2(state, "x")
    assert torch.equal(loaded["mask_token"], torch.zeros(1, 64))
    assert "mask_token" not in report.mapped.values()


def test_c10_half_precision_is_kept_on_disk_and_widened_in_the_network(tmp_path):
    state = {name: tensor.half() for name, tensor in random_state().items()}
    torch.save(state, tmp_path / "half.pth")
    convert_dinov2(tmp_path / "half.pth", tmp_path / "out")
    assert {t.dtype for t in load_dinov2_state_dict(tmp_path / "out").values()} == {torch.float16}
    encoder = DinoV2Encoder("tiny", checkpoint=tmp_path / "out")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.pos_embed, state["pos_embed"].float())


# ----------------------------------------------------------------------------------------------------- refusals


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
    described = json.loads((folder / "config.json").read_text())

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="the content has changed since it was written"):
        load_dinov2_state_dict(folder)

    (folder / "config.json").write_text(json.dumps(described | {"sha256": {}}))
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
