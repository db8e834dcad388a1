"""The encoder against numbers from both published implementations, facebookresearch's and transformers'."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from golden_numbers import Fixture, fill, filled_input, fixture_names, load_fixture, relative_l2
from torch import Tensor

from trifuse.architectures.dino_unet.encoder import DinoV2Encoder
from trifuse.architectures.dino_unet.variants import VARIANTS, EncoderShape

PUBLISHED_MODES = {"fb": "offset", "fb_offset0": "size", "hf": "size"}
GIANT_DEPTH_4 = replace(VARIANTS["giant"], depth=4)
FILLED_RUNS = [
    ("vits14_224", VARIANTS["small"], torch.float64),
    pytest.param("vits14_448", VARIANTS["small"], torch.float64, marks=pytest.mark.slow),
    ("vits14_280x196", VARIANTS["small"], torch.float64),
    ("vits14_280x196", VARIANTS["small"], torch.float32),
    pytest.param("vits14_518", VARIANTS["small"], torch.float64, marks=pytest.mark.slow),
    pytest.param("vitg14_depth4_224", GIANT_DEPTH_4, torch.float64, marks=pytest.mark.slow),
    pytest.param("vitg14_depth4_224", GIANT_DEPTH_4, torch.float32, marks=pytest.mark.slow),
    pytest.param("vitb14_448", VARIANTS["base"], torch.float64, marks=pytest.mark.slow),
    pytest.param("vitl14_448", VARIANTS["large"], torch.float32, marks=pytest.mark.slow),
]
SMALL_RUNS = [
    ("small_mlp_d36", EncoderShape(embed_dim=36, depth=4, num_heads=3, native_grid=5)),
    ("small_swiglu_d40", EncoderShape(embed_dim=40, depth=3, num_heads=2, ffn="swiglu", native_grid=4)),
]
KEYS = {"keys_vits14": "small", "keys_vitb14": "base", "keys_vitl14": "large", "keys_vitg14": "giant"}
INTERPOLATION = "pos_embed_interpolation"


def test_every_fixture_is_used():
    runs = {getattr(run, "values", run)[0] for run in FILLED_RUNS} | {name for name, _ in SMALL_RUNS}
    assert {f"dinov2/{name}" for name in runs | KEYS.keys() | {INTERPOLATION}} == set(fixture_names("dinov2"))


def published_results(encoder: DinoV2Encoder, image: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name everything the encoder computes as both implementations name it, and say how to get it."""
    grid, norm, patches = encoder.grid_of(image), encoder.norm, encoder._patch_tokens
    yield "pos_embed_used", lambda: encoder.positions(grid)[:, 1:]
    for index, x in encoder._streams(image, stop=encoder.depth):
        yield f"block{index}.patch", lambda x=x: x[:, 1:]
        yield f"block{index}.cls", lambda x=x: x[:, 0]
        yield f"block{index}.norm_map", lambda x=x: patches(x).transpose(1, 2).unflatten(2, grid)
        yield f"block{index}.norm_cls", lambda x=x: norm(x[:, 0])
        yield f"hidden_states{index + 1}", lambda x=x: x
    yield "x_prenorm", lambda: x
    yield "x_norm_patchtokens", lambda: patches(x)
    yield "x_norm_clstoken", lambda: norm(x[:, 0])
    yield "last_hidden_state", lambda: norm(x)
    yield "pooler_output", lambda: norm(x[:, 0])


def check(fixture: Fixture, encoder: DinoV2Encoder, image: Tensor, case: str = "") -> None:
    """Compare every stored result of one input, from every implementation, with the encoder's."""
    stored = [name for name in fixture.expected(case) if re.match(r"(fb|fb_offset0|hf)\.", name.removeprefix(case))]
    awaited = set(stored)
    native = encoder.grid_of(image) == (encoder.shape.native_grid, encoder.shape.native_grid)
    for pos_mode in ("offset",) if native else ("offset", "size"):
        encoder.pos_mode = pos_mode
        prefixes = [f"{case}{name}." for name, mode in PUBLISHED_MODES.items() if native or mode == pos_mode]
        for result_name, compute in published_results(encoder, image):
            for name in awaited & {prefix + result_name for prefix in prefixes}:
                difference, bound = fixture.difference(name, compute()), fixture.bound(name, image.dtype)
                assert difference < bound, f"{fixture.name}: {name} differs by {difference:.2e}, bound {bound:.2e}"
                awaited.remove(name)
    assert stored
    assert not awaited


@pytest.mark.parametrize(("name", "shape", "dtype"), FILLED_RUNS)
@torch.no_grad()
def test_filled_networks(name, shape, dtype):
    fixture = load_fixture(f"dinov2/{name}")
    encoder = DinoV2Encoder(shape, dtype=dtype)
    fill(encoder.state_dict())
    check(fixture, encoder, filled_input(fixture.facts).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "shape"), SMALL_RUNS)
def test_small_networks(name, shape, dtype):
    fixture = load_fixture(f"dinov2/{name}")
    encoder = stored_encoder(fixture, shape, dtype)
    for size in sizes_of(fixture):
        check(fixture, encoder, fixture.tensors[f"{size}.input"].to(dtype), f"{size}.")


@pytest.mark.parametrize(("name", "shape"), SMALL_RUNS)
def test_input_gradients_of_small_networks(name, shape):
    """What the frozen encoder computes is differentiable, too: the published input gradients come out."""
    fixture = load_fixture(f"dinov2/{name}")
    encoder = stored_encoder(fixture, shape, torch.float64)
    for size in sizes_of(fixture):
        image = fixture.tensors[f"{size}.input"].double().requires_grad_(True)
        *_, (_, stream) = encoder._streams(image, stop=encoder.depth)
        cotangent = fixture.tensors[f"{size}.cotangent_patchtokens"].double()
        (gradient,) = torch.autograd.grad(encoder._patch_tokens(stream), image, cotangent)
        assert fixture.difference(f"{size}.dinput", gradient) < fixture.bound(f"{size}.dinput", torch.float64)


def sizes_of(fixture: Fixture) -> list[str]:
    sizes = list(fixture.facts["tolerance_f32_vs_f64"])
    assert len(sizes) == 2
    return sizes


def stored_encoder(fixture: Fixture, shape: EncoderShape, dtype: torch.dtype) -> DinoV2Encoder:
    encoder = DinoV2Encoder(shape, dtype=dtype)
    encoder.load_state_dict({key.removeprefix("param."): fixture.tensors[key] for key in fixture.expected("param.")})
    return encoder


def test_public_features_are_the_published_ones():
    """`forward` gives what the golden runs check through the parts it is made of."""
    fixture = load_fixture("dinov2/small_mlp_d36")
    encoder = stored_encoder(fixture, SMALL_RUNS[0][1], torch.float64)
    image = fixture.tensors["98x84.input"].double()
    result = encoder(image)
    assert result["grid"] == (7, 6)
    assert fixture.difference("98x84.fb.x_norm_patchtokens", result["features"][-1]) < 3e-7
    encoder.norm_blocks = False
    for index, features in enumerate(encoder(image)["features"]):
        assert fixture.difference(f"98x84.fb.block{index}.patch", features) < 3e-7


@pytest.mark.parametrize(("name", "variant"), KEYS.items())
def test_names_shapes_and_parameter_counts(name, variant):
    """The mask token is counted, as in both published implementations."""
    facts = load_fixture(f"dinov2/{name}").facts
    with torch.device("meta"):
        encoder = DinoV2Encoder(variant)
    assert {key: list(tensor.shape) for key, tensor in encoder.state_dict().items()} == facts["state_dict_keys"]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == facts["n_parameters"]


@pytest.mark.parametrize("field", ["smooth", "rough"])
@pytest.mark.parametrize("size", ["224x224", "448x448", "280x196", "518x518"])
@pytest.mark.parametrize(
    ("stored", "pos_mode"),
    [
        ("fb_offset0.1", "offset"),
        ("fb_offset0", "size"),
        ("transformers", "size"),
        ("fb_offset0_antialias", "antialias"),
    ],
)
def test_position_table_resampling(field, size, stored, pos_mode):
    fixture = load_fixture(f"dinov2/{INTERPOLATION}")
    table = fixture.tensors[f"{field}.pos_embed"]
    encoder = DinoV2Encoder(EncoderShape(embed_dim=6, depth=1, num_heads=1), pos_mode=pos_mode)
    encoder.pos_embed.copy_(table)
    height, width = map(int, size.split("x"))
    positions = encoder.positions((height // 14, width // 14))
    assert torch.equal(positions[:, 0], table[:, 0])
    assert relative_l2(positions[:, 1:], fixture.tensors[f"{field}.{size}.{stored}"]) < 2e-6
