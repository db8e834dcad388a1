"""Conversion of DINOv2 weights: every published layout, there and back."""

from __future__ import annotations

import json

import pytest
import torch
from dinov2_layouts import LAYOUTS, in_chunks, in_memory, random_state
from golden_numbers import load_fixture
from safetensors.torch import load_file, save_file

from trifuse.architectures.dino_unet.convert import (
    convert_dinov2,
    load_dinov2_state_dict,
    read_dinov2,
    rename_dinov2,
)
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.dino_unet.published_names import EncoderConfig
from trifuse.architectures.dino_unet.variants import VARIANTS
from trifuse.architectures.storage.pretrained import load_strict

pytestmark = pytest.mark.usefixtures("tiny_swiglu")


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


def test_c10_half_precision_is_kept_on_disk_and_widened_in_the_network(tmp_path, capsys):
    state = {name: tensor.half() for name, tensor in random_state().items()}
    torch.save(state, tmp_path / "half.pth")
    convert_dinov2(tmp_path / "half.pth", tmp_path / "out")
    assert {t.dtype for t in load_dinov2_state_dict(tmp_path / "out").values()} == {torch.float16}
    encoder = DinoV2Encoder("tiny", checkpoint=tmp_path / "out")
    assert f"note: {tmp_path / 'out'}: {len(state)} tensors stored as torch.float16" in capsys.readouterr().err
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.pos_embed, state["pos_embed"].float())
