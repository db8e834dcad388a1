"""The dilated-attention block: published values and gradients, its layout of weights, and how it starts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from golden_numbers import fixture_names, load_fixture

from trifuse.blocks import DilatedAttention
from trifuse.kernels import ShapeError, backend, dilated_attention_weights_reference

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands for a GPU that is not here")
FIXTURES = [name for name in fixture_names("dilateformer_modules") if "/msda_" in name]
PATHS = [("torch", torch.float64), ("torch", torch.float32), ("reference", torch.float64), ("reference", torch.float32)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_block(dim=12, num_heads=3, **options):
    block = DilatedAttention(dim, num_heads, **options)
    block.reset_parameters(seeded())
    return block


def random_map(*shape, requires_grad=False):
    return torch.randn(*shape, generator=seeded(1)).requires_grad_(requires_grad)


def assert_published(name, path, dtype):
    fixture = load_fixture(name)
    made = fixture.facts["constructor"]
    options = {{"dilation": "dilations"}.get(key, key): value for key, value in made["kwargs"].items()}
    block = DilatedAttention(*made["args"], **options).to(dtype)
    state = {key.removeprefix("param."): value for key, value in fixture.tensors.items() if key.startswith("param.")}
    block.load_state_dict(state)
    x = fixture.tensors["input"].to(dtype).requires_grad_()
    with backend(path):
        out = block(x)
        out.backward(fixture.tensors["cotangent"].to(dtype))
    found = {"out": out, "dinput": x.grad, **{f"grad.{key}": p.grad for key, p in block.named_parameters()}}
    assert set(found) == {"out", "dinput"} | {key for key in fixture.tensors if key.startswith("grad.")}
    worst = fixture.facts["tolerance_f32_vs_f64"]["param_grads_worst"][0]
    for what, result in found.items():
        bound = fixture.bound(what, dtype)
        if what.startswith("grad.") and dtype == torch.float32:
            bound = max(bound, 10 * worst)
        assert fixture.difference(what, result) <= bound, what


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_golden_values_and_every_gradient(name, path, dtype):
    assert len(FIXTURES) == 3
    assert_published(name, path, dtype)


@interpreted
@pytest.mark.parametrize("name", [name for name in FIXTURES if not name.endswith("k5")])
def test_golden_values_and_every_gradient_of_the_kernels(name):
    assert_published(name, "triton", torch.float32)


def test_parameter_names_are_those_of_published_weights():
    shapes = {name: tuple(parameter.shape) for name, parameter in random_block().named_parameters()}
    assert shapes == {"qkv.weight": (36, 12, 1, 1), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,)}
    unbiased = random_block(qkv_bias=False)
    assert [name for name, _ in unbiased.named_parameters()] == ["qkv.weight", "proj.weight", "proj.bias"]


def test_projection_is_the_convolution_it_is_stored_as():
    """The bias does not apply outside of the image: padding comes after the projection."""
    block, x = random_block(), random_map(1, 3, 2, 12)
    q, k, v = block.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(3, dim=-1)
    with backend("reference"):
        expected = block(x)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.attention_map(x), dilated_attention_weights_reference(q, k, num_heads=3))
    assert block.attention_map(x).shape == (1, 3, 3, 2, 9)
    assert not torch.allclose(v, torch.zeros_like(v))


@pytest.mark.parametrize("name", ["torch", "reference", pytest.param("triton", marks=interpreted)])
def test_input_is_left_as_it_is_and_backward_works(name):
    """The published module overwrites its own input, and its backward pass then fails."""
    block, x = random_block(), random_map(1, 4, 3, 12)
    before, leaf = x.clone(), x.requires_grad_()
    with backend(name):
        block(leaf).square().sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert leaf._version == 0
    assert leaf.grad.abs().sum() > 0
    assert {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize(
    "options",
    [{"border": "mask"}, {"border": "shift"}, {"scale": 0.1}, {"kernel_size": 5}, {"dilations": (2,)}],
    ids=str,
)
def test_options_reach_attention_and_its_map(options):
    block, x = random_block(**options), random_map(1, 9, 10, 12)
    with backend("reference"):
        expected, weights = block(x), block.attention_map(x)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.attention_map(x), weights)
    assert not torch.allclose(expected, random_block()(x), atol=1e-4)


def test_starts_repeatably_and_as_the_published_network():
    block, again, other = random_block(96, 3), random_block(96, 3), DilatedAttention(96, 3)
    other.reset_parameters(seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), again.parameters(), strict=True))
    assert not torch.equal(block.qkv.weight, other.qkv.weight)
    assert block.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.proj.bias.any()
    bound = 96**-0.5
    for parameter in (block.qkv.weight, block.qkv.bias):
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert parameter.abs().max() <= bound


def test_b8_refuses_heads_that_do_not_fit():
    with pytest.raises(ShapeError, match="DilatedAttention: 12 channels are not divisible by num_heads 9"):
        DilatedAttention(12, 9)
    with pytest.raises(ShapeError, match="DilatedAttention: num_heads 4 is not divisible by the 3 dilations"):
        DilatedAttention(12, 4)
    with pytest.raises(ShapeError, match=r"DilatedAttention: dilations: expected a sequence .*, got 2; pass \(2,\)$"):
        DilatedAttention(12, 3, dilations=2)
    with pytest.raises(ValueError, match="DilatedAttention: border: expected one of"):
        DilatedAttention(12, 3, border="wrap")


@pytest.mark.parametrize("shape", [(1, 12, 4, 5), (4, 5, 12)], ids=str)
def test_b3_b4_refuses_maps_of_another_layout(shape):
    with pytest.raises(ShapeError, match=r"expected a map \(B, H, W, 12\), got .*permute\(0, 2, 3, 1\)"):
        random_block()(torch.zeros(shape))


def test_b14_copies_and_pickles():
    block, x = random_block(), random_map(1, 4, 5, 12)
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(block), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), block(x))


def test_k25_autocast():
    block, x = random_block(), random_map(1, 4, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), atol=2e-2, rtol=2e-2)
