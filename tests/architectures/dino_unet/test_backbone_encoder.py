"""DINO-UNet on a vision transformer of Hugging Face: from a folder, frozen, streamed, saved, trained by the command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hugging_face import SMALL, save_small_model, small_model
from small_dino_unet import backward, images

from trifuse.architectures.dino_unet import DinoUNet, dino_unet_on
from trifuse.architectures.dino_unet.backbone_encoder import BackboneEncoder, is_hugging_face, read_backbone
from trifuse.architectures.dino_unet.encoder_folder import describe_encoder
from trifuse.architectures.dino_unet.model import DinoUNetConfig
from trifuse.architectures.storage.config_json import config_from_json, config_to_json
from trifuse.blocks import backbone_features
from trifuse.kernels import CheckpointError, ShapeError, TrifuseError

DECODER = {"channels": (8, 8, 4, 4), "bottleneck_dim": 8}


@pytest.fixture
def folder(tmp_path):
    save_small_model(tmp_path / "vit", "dinov2")
    return tmp_path / "vit"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["vit", "registers", "dinov3", "siglip"])
def test_features_are_those_of_the_model(tmp_path, name, norm):
    model = save_small_model(tmp_path, name)
    encoder = BackboneEncoder(read_backbone(tmp_path), norm, tmp_path)
    assert (encoder.depth, encoder.embed_dim, encoder.patch_size) == (4, 16, 8)
    image = images(2, 3, 16, 24)
    encoded = encoder(image, [3, 1])
    assert encoded["grid"] == (2, 3)
    with torch.no_grad():
        expected = backbone_features(model, image, [1, 3], norm=norm)
    for tokens, one in zip(encoded["features"], expected, strict=True):
        assert tokens.is_contiguous()
        torch.testing.assert_close(tokens, one.flatten(2).mT)


def test_a_model_with_a_head_is_loaded_without_it(tmp_path):
    """What no patch token passes through may be missing: a classifier has no pooler."""
    model = save_small_model(tmp_path, "classifier")
    encoder = BackboneEncoder(read_backbone(tmp_path), checkpoint=tmp_path)
    with torch.no_grad():
        expected = backbone_features(model.vit, images(1, 3, 16, 16), norm=True)[-1]
    torch.testing.assert_close(encoder(images(1, 3, 16, 16))["features"][-1], expected.flatten(2).mT)


def test_b12_it_is_frozen_for_good(folder):
    network = dino_unet_on(folder, **DECODER).train()
    encoder = network.encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    backward(network, images(2, 3, 16, 16))
    assert network.fusion.logits.grad.abs().sum() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    with pytest.raises(TrifuseError, match="BackboneEncoder: it was asked to require gradients"):
        encoder.requires_grad_(True)


@pytest.mark.parametrize("stream_gradient", ["project", "recompute"])
def test_streaming_equals_stored(folder, stream_gradient):
    """The blocks are fused by the model's hooks, while it runs."""
    options = {**DECODER, "norm": "group", "encoder_dtype": "float64"}
    stored = dino_unet_on(folder, **options).double()
    streaming = dino_unet_on(folder, stream_fusion=True, stream_gradient=stream_gradient, **options).double()
    streaming.load_state_dict(stored.state_dict())
    image = images(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(backward(streaming, image), backward(stored, image))
    wanted = {name: parameter.grad for name, parameter in stored.named_parameters() if parameter.requires_grad}
    for name, parameter in streaming.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_a_saved_network_needs_the_folder_no_more(tmp_path, name):
    """Its configuration holds the encoder's; what the model computes once and does not save is there again."""
    save_small_model(tmp_path / "vit", name)
    network = dino_unet_on(tmp_path / "vit", **DECODER).eval()
    network.save_pretrained(tmp_path / "saved")
    written = (tmp_path / "saved" / "config.json").read_text()
    assert str(tmp_path) not in written
    for file in (tmp_path / "vit").iterdir():
        file.unlink()
    loaded = DinoUNet.from_pretrained(tmp_path / "saved")
    image = images(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(image), network(image))


def test_sides_are_padded_to_the_model_s_own_patch(folder):
    network = dino_unet_on(folder, size_policy="pad", **DECODER).eval()
    assert network.prepare(images(1, 3, 17, 9)).shape == (1, 3, 24, 16)
    assert network(images(1, 3, 17, 9)).shape == (1, 2, 17, 9)
    network = dino_unet_on(folder, size_policy="resize", **DECODER).eval()
    assert network.prepare(images(1, 3, 21, 3)).shape == (1, 3, 24, 8)


def test_random_weights_follow_the_seed():
    config = small_model("dinov2")[0].config.to_dict()
    one, same, other = (DinoUNet(DinoUNetConfig(backbone=config, init_seed=s, **DECODER)) for s in (0, 0, 1))
    weight = "encoder.model.encoder.layer.0.mlp.fc1.weight"
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    before = torch.random.get_rng_state()
    BackboneEncoder(config, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before), "the generator of the caller stays where it was"


def test_a_configuration_comes_back_from_json(folder):
    config = DinoUNetConfig(**describe_encoder(folder), **DECODER)
    assert config.depth == 4
    assert config_from_json(DinoUNetConfig, json.loads(json.dumps(config_to_json(config))), "file") == config


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_b17_maps_that_differ_are_refused_when_the_network_is_built(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
    transformers.SwinModel(config).save_pretrained(tmp_path)
    with pytest.raises(ShapeError, match="got SwinModel, whose maps shrink"):
        BackboneEncoder(read_backbone(tmp_path), checkpoint=tmp_path)


def test_b17_models_of_other_images_are_refused(tmp_path):
    with pytest.raises(ShapeError, match="ViTModel: expected a model of RGB images, got one of 1 channels"):
        BackboneEncoder(small_model("vit", num_channels=1)[0].config.to_dict())
    with pytest.raises(ShapeError, match="expected square patches, got 8 x 16"):
        BackboneEncoder(small_model("dinov2")[0].config.to_dict() | {"patch_size": [8, 16]})


def test_c23_missing_weights_are_refused_by_name(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if name.endswith("layer.2.norm2.weight"))
    del state[lost]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected all weights of one Dinov2Model, but 1 are missing .*norm2"):
        BackboneEncoder(read_backbone(folder), checkpoint=folder)


@pytest.mark.parametrize("damage", ["no weights", "pickled", "half a file"])
def test_c23_weights_that_are_not_there_as_safetensors_are_refused(folder, damage):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    if damage == "half a file":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"vit: expected a Hugging Face model with weights as safetensors: \w"):
        BackboneEncoder(read_backbone(folder), checkpoint=folder)


def test_c23_code_in_the_folder_is_never_run(folder):
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read it: "):
        read_backbone(folder)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}'])
def test_c23_a_folder_of_something_else_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert not is_hugging_face(tmp_path)
    for read in (read_backbone, describe_encoder, dino_unet_on):
        with pytest.raises(CheckpointError, match=r"expected .*|config\.json"):
            read(tmp_path)


@pytest.mark.parametrize("depth", [None, "12", 0])
def test_a_configuration_that_counts_no_blocks_is_refused(depth):
    with pytest.raises(ValueError, match="expected its number of blocks, num_hidden_layers, got"):
        DinoUNetConfig(backbone={"model_type": "vit", "num_hidden_layers": depth})


def test_a_configuration_that_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="transformers cannot build 'nonesuch': "):
        BackboneEncoder({"model_type": "nonesuch", **SMALL})


def test_l6_without_transformers_the_command_that_installs_it_is_named(folder):
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from trifuse.architectures.dino_unet import dino_unet_on\n"
        f"dino_unet_on({str(folder)!r})"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 1
    message = "MissingExtra: an encoder of Hugging Face needs transformers, which is not installed; "
    assert message + "run: pip install 'trifuse[hf]'" in child.stderr
