"""What dilated attention is: the golden data, a loop over pixels and taps, the border rules, and the channel layout."""

from __future__ import annotations

import math

import pytest
import torch
from golden_numbers import fixture_names, load_fixture

from trifuse.kernels import (
    backend,
    dilated_attention,
    dilated_attention_reference,
    dilated_attention_weights,
    dilated_attention_weights_reference,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
FIXTURES = fixture_names("dilated_attention")
EVERY_PATH = [(name, path, dtype) for name in FIXTURES for path in ("torch", "reference") for dtype in (32, 64)]
# The kernels are held against the reference elsewhere; here in make test once for each dilation and number of heads.
QUICK = ("op_k3_d1_h3x8_7x5", "op_k3_d2_h2x8_6x6_scale0.3", "op_k3_d3_h1x8_2x3")
EVERY_PATH += [
    pytest.param(name, "triton", 32, marks=() if name.endswith(QUICK) else pytest.mark.slow)
    for name in FIXTURES
    if "_k3_" in name
]
SIZES = [(1, 1), (2, 2), (5, 7), (8, 8), (13, 6)]


def taps_of(i, length, kernel_size, dilation, border):
    """Where the taps of one position of one axis lie, from the words of the definition; None where there is nothing."""
    if border != "shift":
        taps = [i + dilation * t for t in range(-(kernel_size // 2), kernel_size // 2 + 1)]
        return [tap if 0 <= tap < length else None for tap in taps]
    line = range(i % dilation, length, dilation)
    windows = [line[n : n + kernel_size] for n in range(len(line) - kernel_size + 1)]
    return list(min(windows, key=lambda window: abs(window[kernel_size // 2] - i)))


def attention_by_loop(q, k, v, grad, kernel_size, dilation, scale, border):
    """One head, (H, W, d) in float64: the result, dq, dk and dv, tap by tap as the gradients are derived on paper."""
    height, width, d = q.shape
    out, dq, dk, dv = (torch.zeros(height, width, d, dtype=torch.float64) for _ in range(4))
    nothing = torch.zeros(d, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            rows = taps_of(y, height, kernel_size, dilation, border)
            columns = taps_of(x, width, kernel_size, dilation, border)
            taps = [None if row is None or column is None else (row, column) for row in rows for column in columns]
            if border == "mask":
                taps = [tap for tap in taps if tap is not None]
            logits = [scale * float(q[y, x] @ (nothing if tap is None else k[tap])) for tap in taps]
            total = sum(math.exp(logit) for logit in logits)
            weights = [math.exp(logit) / total for logit in logits]
            products = [float(grad[y, x] @ (nothing if tap is None else v[tap])) for tap in taps]
            mean = sum(p * product for p, product in zip(weights, products, strict=True))
            for tap, p, product in zip(taps, weights, products, strict=True):
                if tap is not None:
                    out[y, x] += p * v[tap]
                    dq[y, x] += scale * p * (product - mean) * k[tap]
                    dk[tap] += scale * p * (product - mean) * q[y, x]
                    dv[tap] += p * grad[y, x]
    return out, dq, dk, dv


def random_maps(height, width, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, height, width, channels, generator=generator, dtype=torch.float64) for _ in range(4)]


def assert_equals_the_loop(name, height, width, dilation, border, kernel_size=3, channels=2):
    *maps, grad = random_maps(height, width, channels)
    expected = attention_by_loop(*(x[0] for x in (*maps, grad)), kernel_size, dilation, channels**-0.5, border)
    for x in maps:
        x.requires_grad_()
    with backend(name):
        options = {"num_heads": 1, "kernel_size": kernel_size, "dilations": (dilation,), "border": border}
        out = dilated_attention(*maps, **options)
    found = [out, *torch.autograd.grad(out, maps, grad)]
    for what, mine, truth in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(mine[0].detach(), truth, rtol=1e-12, atol=1e-14, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_loop_over_pixels_and_taps(name, size, dilation):
    """K13: a window may reach out of the image on all sides, and its zeros take part in the softmax."""
    assert_equals_the_loop(name, *size, dilation, "zero")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize(
    ("border", "size", "dilation", "kernel_size"),
    [
        ("mask", (1, 1), 2, 3),
        ("mask", (5, 7), 3, 3),
        ("mask", (6, 3), 1, 5),
        ("shift", (3, 3), 1, 3),
        ("shift", (9, 10), 3, 3),
        ("shift", (6, 11), 2, 3),
        ("shift", (11, 10), 2, 5),
        ("zero", (4, 7), 2, 5),
        ("zero", (2, 3), 3, 1),
    ],
)
def test_borders_and_other_windows_equal_the_loop(name, border, size, dilation, kernel_size):
    assert_equals_the_loop(name, *size, dilation, border, kernel_size)


@pytest.mark.parametrize(("name", "path", "bits"), EVERY_PATH)
def test_golden_values_and_every_gradient(name, path, bits):
    if path == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU machine test_on_gpu.py runs the kernels")
    fixture, dtype = load_fixture(name), {32: torch.float32, 64: torch.float64}[bits]
    made = fixture.facts["constructor"]
    maps = [fixture.tensors[x].to(dtype).requires_grad_() for x in "qkv"]
    with backend(path):
        out = dilated_attention(
            *(x.permute(0, 2, 3, 1) for x in maps),
            num_heads=fixture.facts["shapes"]["heads"],
            kernel_size=made["kernel_size"],
            dilations=(made["dilation"],),
            scale=made["qk_scale"],
        )
    grads = torch.autograd.grad(out, maps, fixture.tensors["cotangent"].to(dtype))
    for what, result in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert fixture.difference(what, result) <= fixture.bound(what, dtype), what


def test_zeros_outside_of_the_image_dilute_the_weights():
    """On one pixel eight of nine taps are padding, each with logit 0: it is not the value itself that comes out."""
    q, k, v, _ = random_maps(1, 1, 4)
    e = torch.exp((q * k).sum() * 4**-0.5)
    for name in ("torch", "reference"):
        with backend(name):
            diluted = dilated_attention(q, k, v, num_heads=1, dilations=(2,))
            masked = dilated_attention(q, k, v, num_heads=1, dilations=(2,), border="mask")
        torch.testing.assert_close(diluted, v * e / (e + 8))
        torch.testing.assert_close(masked, v)


@pytest.mark.parametrize("name", ["torch", "reference", pytest.param("triton", marks=interpreted)])
def test_channels_are_ordered_dilation_head_channel(name):
    """One value in one channel lights up that channel alone, at the pixels that its dilation connects."""
    dilations, heads, d = (1, 2), 4, 8
    for channel in (0, 7, 9, 16, 31):
        v = torch.zeros(1, 7, 7, heads * d)
        v[0, 3, 3, channel] = 1.0
        with backend(name):
            out = dilated_attention(torch.zeros_like(v), torch.zeros_like(v), v, num_heads=heads, dilations=dilations)
        r = dilations[channel // (heads // 2 * d)]
        expected = torch.zeros_like(v)
        expected[0, 3 - r : 4 + r : r, 3 - r : 4 + r : r, channel] = 1 / 9
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("border", ["zero", "mask", "shift"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_are_the_map_that_attention_uses(dtype, border):
    q, k, v, _ = (x.to(dtype) for x in random_maps(10, 9, 12))
    options = {"num_heads": 6, "dilations": (1, 2, 3), "border": border}
    weights = dilated_attention_weights(q, k, **options)
    assert weights.shape == (1, 6, 10, 9, 9)
    assert weights.dtype == dtype
    expected = dilated_attention_weights_reference(q.double(), k.double(), **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), expected, rtol=4 * eps, atol=eps / 8)
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(1, 6, 10, 9).double(), rtol=9 * eps, atol=0)
    with backend("reference"):
        torch.testing.assert_close(weights, dilated_attention_weights(q, k, **options), rtol=4 * eps, atol=eps / 8)
    if border == "zero":
        seen = [[(y + dy, x + dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)] for y in range(10) for x in range(9)]
        values = torch.zeros(10, 9, 2, dtype=torch.float64)
        for pixel, taps in enumerate(seen):
            for tap, (y, x) in enumerate(taps):
                if 0 <= y < 10 and 0 <= x < 9:
                    place = (pixel // 9, pixel % 9)
                    values[place] += expected[0, 2, *place, tap] * v[0, y, x, 4:6].double()
        out = dilated_attention_reference(q.double(), k.double(), v.double(), **options)
        torch.testing.assert_close(out[0, ..., 4:6], values)


def test_weights_are_differentiable():
    q, k, _, _ = (x.requires_grad_() for x in random_maps(3, 4, 3))
    for border in ("zero", "mask"):
        call = lambda q, k, b=border: dilated_attention_weights(q, k, num_heads=3, border=b)  # noqa: E731
        assert torch.autograd.gradcheck(call, (q, k))
