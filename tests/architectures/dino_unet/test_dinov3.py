"""DINOv3: parity with transformers for every size, both published layouts, what is refused, and DINO-UNet on it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from command import run_main
from safetensors.torch import load_file, save_file
from small_dino_unet import backward, images

from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig, dino_unet_on
from trifuse.architectures.dino_unet.convert import convert_dinov3, read_dinov3, rename_dinov3
from trifuse.architectures.dino_unet.dinov3_encoder import DinoV3Encoder
from trifuse.architectures.dino_unet.dinov3_names import DinoV3Config
from trifuse.architectures.dino_unet.variants import DINOV3_VARIANTS
from trifuse.architectures.storage.pretrained import load_strict
from trifuse.kernels import CheckpointError, ShapeError, TrifuseError

TINY = "dinov3_tiny"
GATED = replace(DINOV3_VARIANTS[TINY], ffn="swiglu", mlp_ratio=3.0, qkv_bias=False)
DECODER = {"channels": (8, 8, 4, 4), "bottleneck_dim": 8}


@pytest.fixture(autouse=True)
def gated(monkeypatch):
    """A tiny variant that is made as the largest one: a gated MLP, and no bias of queries, keys and values."""
    monkeypatch.setitem(DINOV3_VARIANTS, "gated", replace(GATED, embed_dim=32))


def theirs(shape, num_registers=4, dtype=torch.float32):
    """Return transformers' model of a shape, with random weights."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    gated = shape.ffn == "swiglu"
    config = transformers.DINOv3ViTConfig(
        hidden_size=shape.embed_dim,
        intermediate_size=int(shape.embed_dim * shape.mlp_ratio * (2 / 3 if gated else 1)),
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        num_register_tokens=num_registers,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=shape.qkv_bias,
        value_bias=shape.qkv_bias,
    )
    model = transformers.DINOv3ViTModel(config).to(dtype).eval()
    # as published: cast with the model, the frequencies are float32 no more, and what is computed from them neither
    model.rope_embeddings.inv_freq = model.rope_embeddings.inv_freq.float()
    generator, scale = torch.Generator().manual_seed(0), 2 * shape.embed_dim**-0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "norm" in name else scale))
    return model


def in_original_layout(state, shape):
    """The names of the original file, with the mask of the keys' bias, under which anything may stand."""
    renamed = {"mask_token": torch.zeros(1, shape.embed_dim)}
    width = shape.embed_dim // shape.num_heads
    renamed["rope_embed.periods"] = (100.0 ** (2 * torch.arange(width // 4) / (width // 2))).bfloat16()
    for name, tensor in state.items():
        new = "storage_tokens" if name == "register_tokens" else name
        if ".mlp.w12." in new:
            for part, theirs in zip(tensor.chunk(2), ("w1", "w2"), strict=True):
                renamed[new.replace("w12", theirs)] = part.clone()
            continue
        if new.endswith("qkv.bias"):
            mask = torch.ones(3, shape.embed_dim)
            mask[1] = 0
            tensor = tensor + 7 * (1 - mask.flatten())
            renamed[f"{new}_mask"] = mask.flatten()
        renamed[new] = tensor
    return renamed


def random_state(variant, num_registers=4):
    state = DinoV3Encoder(variant, num_registers=num_registers).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    for name in state:
        if name.endswith("qkv.bias"):
            state[name].chunk(3)[1].zero_()
    return state


def in_hub_layout(state, shape, in_memory=False):
    renamed = {"embeddings.mask_token": torch.zeros(1, 1, shape.embed_dim)}
    for name, tensor in state.items():
        new = name.replace("blocks.", "model.layer." if in_memory else "layer.")
        new = new.replace("patch_embed.proj", "embeddings.patch_embeddings").replace("attn.proj", "attention.o_proj")
        new = new.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        new = new.replace("mlp.fc1", "mlp.up_proj").replace("mlp.fc2", "mlp.down_proj").replace("w3", "down_proj")
        new = f"embeddings.{new}" if new in ("cls_token", "register_tokens") else new
        if "attn.qkv" in new:
            for part, theirs in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                if (theirs, new[-4:]) != ("k_proj", "bias"):
                    renamed[new.replace("attn.qkv", f"attention.{theirs}")] = part.clone()
        elif "w12" in new:
            for part, theirs in zip(tensor.chunk(2), ("gate_proj", "up_proj"), strict=True):
                renamed[new.replace("w12", theirs)] = part.clone()
        else:
            renamed[new] = tensor
    return renamed


LAYOUTS = {
    "original": in_original_layout,
    "hub file": in_hub_layout,
    "in memory": lambda state, shape: in_hub_layout(state, shape, in_memory=True),
    "ours": lambda state, shape: dict(state),
}


@pytest.mark.parametrize(
    ("variant", "depth"),
    [
        (TINY, 4),
        ("gated", 4),
        ("dinov3_small", 3),
        ("dinov3_small_plus", 3),
        ("dinov3_base", 2),
        pytest.param("dinov3_large", 2, marks=pytest.mark.slow),
        pytest.param("dinov3_huge_plus", 2, marks=pytest.mark.slow),
        pytest.param("dinov3_7b", 1, marks=pytest.mark.slow),
    ],
)
def test_every_size_computes_what_transformers_does(monkeypatch, variant, depth):
    """In float64 and with random weights, on an image that is not square, every block; read from its own state dict."""
    shape = replace(DINOV3_VARIANTS[variant], depth=depth)
    monkeypatch.setitem(DINOV3_VARIANTS, variant, shape)
    model = theirs(shape, dtype=torch.float64)
    encoder = DinoV3Encoder(variant, norm_blocks=False, dtype=torch.float64)
    load_strict(encoder, rename_dinov3(model.state_dict(), "DINOv3ViTModel")[0], "DINOv3ViTModel")
    image = images(2, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        found = model(image, output_hidden_states=True)
        expected = [tokens[:, 5:] for tokens in found.hidden_states[1:]]
    features = encoder(image)["features"]
    for tokens, wanted in zip(features, expected, strict=True):
        assert (tokens - wanted).abs().max() <= 1e-11 * wanted.abs().max()
    encoder.norm_blocks = True
    last = encoder(image, [-1])["features"][0]
    wanted = found.last_hidden_state[:, 5:]
    assert (last - wanted).abs().max() <= 1e-11 * wanted.abs().max()


@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("dinov3_small", 21.6),
        ("dinov3_small_plus", 28.7),
        ("dinov3_base", 85.7),
        ("dinov3_large", 303.1),
        ("dinov3_huge_plus", 840.5),
        ("dinov3_7b", 6716.0),
    ],
)
def test_published_sizes(variant, millions):
    """The parameters that the authors count: 21, 29, 86, 300, 840 and 6716 million."""
    with torch.device("meta"):
        encoder = DinoV3Encoder(variant)
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "num_registers"), [(TINY, 4), (TINY, 0), ("gated", 4)])
def test_every_layout_there_and_back(tmp_path, variant, num_registers, layout, suffix):
    state = random_state(variant, num_registers)
    published = LAYOUTS[layout](state, DINOV3_VARIANTS[variant])
    path = tmp_path / f"weights{suffix}"
    torch.save(published, path) if suffix == ".pth" else save_file(published, path)
    report = convert_dinov3(path, tmp_path / "out")
    assert report.config == DinoV3Config(variant, num_registers)
    assert (report.missing, report.misshapen, report.unexpected) == ((), (), ())
    assert set(report.mapped) | set(report.ignored) == set(published)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for loaded in (written, DinoV3Encoder(variant, checkpoint=path, num_registers=num_registers).state_dict()):
        assert set(loaded) == set(state)
        assert [name for name in state if not torch.equal(loaded[name], state[name])] == []


def test_the_licence_lies_with_the_weights_and_is_told(tmp_path, capsys):
    torch.save(LAYOUTS["original"](random_state(TINY), DINOV3_VARIANTS[TINY]), tmp_path / "dinov3.pth")
    code, output, _ = run_main(["convert", "dinov3", tmp_path / "dinov3.pth", "--out", tmp_path / "out"], capsys)
    assert code == 0
    assert "note: the weights are under the DINOv3 License, https://ai.meta.com/" in output
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (described["architecture"], described["config"]) == ("dinov3", {"variant": TINY, "num_registers": 4})
    assert described["licence"].startswith("the weights are under the DINOv3 License, https://")


@pytest.mark.parametrize("norm", ["cls_norm", "local_cls_norm"])
def test_norms_of_the_class_token_alone_are_left_out(norm):
    """Patch tokens pass through the other norm, in the published code too."""
    state, shape = random_state(TINY), DINOV3_VARIANTS[TINY]
    published = LAYOUTS["original"](state, shape)
    published |= {f"{norm}.weight": torch.zeros(48), f"{norm}.bias": torch.ones(48)}
    loaded, report = rename_dinov3(published, "x")
    assert torch.equal(loaded["norm.weight"], state["norm.weight"])
    assert {f"{norm}.weight", f"{norm}.bias"} <= set(report.ignored)
    assert "the class token has a norm of its own, which no patch token passes through: left out" in str(report)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_c24_positions_of_other_periods_are_refused():
    published = LAYOUTS["original"](random_state(TINY), DINOV3_VARIANTS[TINY])
    published["rope_embed.periods"] = published["rope_embed.periods"] * 1.1
    with pytest.raises(CheckpointError, match=r"expected rotary positions with periods from 1 to \S+, got other ones"):
        rename_dinov3(published, "x")


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layer.2.attention.v_proj.weight"), r"1 missing: blocks\.2\.attn\.qkv\.weight"),
        (drop("layer.1.attention.v_proj.bias"), r"1 missing: blocks\.1\.attn\.qkv\.bias"),
        (drop("layer.0.mlp.down_proj.bias"), r"1 missing: blocks\.0\.mlp\.fc2\.bias"),
        (put("layer.0.extra", torch.zeros(1)), r"1 unexpected: layer\.0\.extra"),
        (put("norm.weight", torch.zeros(7)), r"norm\.weight \(7,\) instead of \(48,\)"),
        (
            put("norm.weight", torch.zeros(48).int()),
            r"expected 'norm\.weight' of a floating-point type, got torch\.int32",
        ),
        (put("blocks.0.norm1.weight", torch.zeros(48)), "gives 'blocks.0.norm1.weight' a second time"),
        (drop("embeddings.cls_token"), "expected the weights of a DINOv3 encoder, found no class token"),
        (
            put("layer.4.norm1.weight", torch.zeros(48)),
            "width 48 and 5 blocks with mlp are none of the variants dinov3_t",
        ),
    ],
)
def test_c24_tensors_of_something_else_are_refused(change, message):
    state = in_hub_layout(random_state(TINY), DINOV3_VARIANTS[TINY])
    change(state)
    with pytest.raises(CheckpointError, match=message):
        rename_dinov3(state, "some file")


def test_c24_dinov2_weights_are_refused(tmp_path):
    from dinov2_layouts import random_state as dinov2_state

    torch.save(dinov2_state("tiny"), tmp_path / "dinov2.pth")
    with pytest.raises(CheckpointError, match="none of the variants dinov3_tiny"):
        read_dinov3(tmp_path / "dinov2.pth")


@pytest.mark.parametrize(("variant", "registers"), [("gated", 4), (TINY, 0)])
def test_c24_another_size_or_registers_are_named(tmp_path, variant, registers):
    torch.save(random_state(variant, registers), tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=rf"holds the weights of DinoV3Encoder\('{variant}', num_registers={registers}\)"
    ):
        DinoV3Encoder(TINY, checkpoint=tmp_path / "weights.pth")


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="DinoV3Encoder: variant"):
        DinoV3Encoder("base")
    with pytest.raises(TypeError, match="DinoV3Encoder: expected a floating-point dtype"):
        DinoV3Encoder(TINY, dtype=torch.int32)
    with pytest.raises(ShapeError, match="DinoV3Encoder: height 28 is not divisible by the patch size 16; use 32"):
        DinoV3Encoder(TINY)(images(1, 3, 28, 32))
    with pytest.raises(TrifuseError, match="DinoV3Encoder: it was asked to require gradients"):
        DinoV3Encoder(TINY).requires_grad_(True)


# --- DINO-UNet on it --------------------------------------------------------------------------------------------------


def test_dino_unet_on_a_converted_folder(tmp_path):
    torch.save(LAYOUTS["original"](random_state(TINY), DINOV3_VARIANTS[TINY]), tmp_path / "dinov3.pth")
    convert_dinov3(tmp_path / "dinov3.pth", tmp_path / "encoder")
    network = dino_unet_on(tmp_path / "encoder", **DECODER).eval()
    assert isinstance(network.encoder, DinoV3Encoder)
    image = images(1, 3, 32, 48)
    network.save_pretrained(tmp_path / "saved")
    loaded = DinoUNet.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert network(image).shape == (1, 2, 32, 48)
        assert torch.equal(loaded(image), network(image))


def test_streaming_equals_stored():
    config = DinoUNetConfig(variant=TINY, num_registers=4, encoder_dtype="float64", norm="group", **DECODER)
    stored = DinoUNet(config).double()
    streaming = DinoUNet(replace(config, stream_fusion=True)).double()
    image = images(2, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(backward(streaming, image), backward(stored, image))
    torch.testing.assert_close(streaming.fusion.logits.grad, stored.fusion.logits.grad)


def test_one_graph():
    model = DinoUNet(DinoUNetConfig(variant=TINY, num_registers=4, **DECODER)).eval()
    image = images(1, 3, 32, 48)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))
