"""Dilated attention: what it keeps, what it costs, that it repeats, and what it refuses."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch

from trifuse.kernels import ShapeError, backend, dilated_attention, dilated_attention_weights
from trifuse.kernels.ops.dilated_attention import packed_dilated_attention
from trifuse.kernels.testing import peak_memory_bytes

planes_module = import_module("trifuse.kernels.cpu.dilated_attention")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
THREE = {"num_heads": 3}


def packed_map(*shape, dtype=torch.float32, requires_grad=True):
    qkv = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return qkv.to(dtype).requires_grad_(requires_grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    qkv = packed_map(1, 2, 3, 9)
    with backend(name):
        out = dilated_attention(*qkv.chunk(3, dim=-1), **THREE)
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_k24_saves_the_arguments_and_one_number_per_pixel_and_head(name, packed):
    qkv = packed_map(2, 5, 4, 9)
    maps = [qkv] if packed else [x.detach().requires_grad_() for x in qkv.chunk(3, dim=-1)]
    attend = (lambda: packed_dilated_attention(qkv, **THREE)) if packed else (lambda: dilated_attention(*maps, **THREE))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None), backend(name):
        with torch.no_grad():
            attend()
        with torch.inference_mode():
            attend()
        assert saved == []
        attend()
    arguments = [t for t in saved if t.data_ptr() in {x.data_ptr() for x in maps}]
    assert len(arguments) == len(maps)
    numbers = sum(t.numel() for t in saved) - sum(t.numel() for t in arguments)
    assert numbers == (2 * 3 * 5 * 4 if name == "triton" else 0)


def test_saves_at_most_a_fifth_of_what_the_unfold_form_saves():
    """Counted by the hooks for both, storage that several of them share once."""
    baselines = import_module("trifuse.benchmarks.baselines.dilated_attention")

    def saved_bytes(attend):
        storages = {}
        qkv = packed_map(2, 64, 64, 3 * 72)

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = attend(*qkv.chunk(3, dim=-1), **THREE)
        assert out.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    assert saved_bytes(dilated_attention) <= saved_bytes(baselines.unfold_attention) / 5


def test_peak_extra_memory_of_the_cpu_path():
    """Beyond result and gradient there are the planes of one chunk alone: nothing of all the windows' size."""
    qkv = packed_map(8, 32, 32, 3 * 72, requires_grad=False)
    assert peak_memory_bytes(lambda: packed_dilated_attention(qkv, **THREE)) <= 1.5 * qkv.nbytes
    qkv.requires_grad_()
    step = lambda: torch.autograd.grad(packed_dilated_attention(qkv, **THREE).sum(), qkv)  # noqa: E731
    assert peak_memory_bytes(step) <= 4 * qkv.nbytes


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    maps = packed_map(1, 3, 4, 9).chunk(3, dim=-1)
    with backend(name):
        for border in ("zero", "mask"):
            plain = dilated_attention(*maps, border=border, **THREE)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(dilated_attention(*maps, border=border, **THREE), plain)
    weights = dilated_attention_weights(*maps[:2], **THREE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dilated_attention_weights(*maps[:2], **THREE), weights)


@pytest.mark.parametrize("name", BACKENDS)
def test_k29_results_repeat_bit_for_bit(name):
    def run():
        qkv = packed_map(1, 13, 11, 9)
        with backend(name):
            out = dilated_attention(*qkv.chunk(3, dim=-1), **THREE)
        return out, torch.autograd.grad(out.square().sum(), qkv)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_arguments_are_left_alone(name):
    qkv = packed_map(1, 3, 4, 9)
    before = copy.deepcopy(qkv.detach())
    with backend(name):
        dilated_attention(*qkv.chunk(3, dim=-1), **THREE).sum().backward()
    assert torch.equal(qkv.detach(), before)


def test_cpu_path_over_several_chunks_equals_one(monkeypatch):
    def run():
        qkv = packed_map(5, 4, 3, 36)
        out = dilated_attention(*qkv.chunk(3, dim=-1), num_heads=6)
        return out, torch.autograd.grad(out.square().sum(), qkv)[0]

    whole = run()
    for elements in (1, 150):
        monkeypatch.setattr(planes_module, "CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(run(), whole)


def test_k18_grids_have_one_axis_and_heads_keep_whole_pixels_in_a_thread():
    """Axes y and z of a grid end at 65535; up to 32 channels a thread holds a pixel, and loads 16 bytes at a time."""
    gpu = import_module("trifuse.kernels.gpu.dilated_attention")
    for d, pixels in ((8, 128), (24, 128), (32, 128), (33, 64), (72, 32), (128, 32)):
        x = torch.empty(70000, 3, 5, 3 * d, device="meta", dtype=torch.bfloat16)
        settings = gpu._settings(128, gpu._layouts([x]), 3, (1, 2, 3), "zero")
        assert (settings["PIXELS"], settings["CHUNK"]) == (pixels, 8 * 128 // pixels)
        assert gpu._grid(x, 3, settings) == (70000 * 3,)
        assert settings["UNIT"] == (8 if 3 * d % 8 == 0 else 1)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x = torch.zeros(1, 2, 2, 3)
    for i in range(3):
        maps = [x.to(bad) if i == j else x for j in range(3)]
        with pytest.raises(TypeError, match=rf"dilated_attention: {'qkv'[i]} is torch\..*expected one of float32"):
            dilated_attention(*maps, **THREE)
    with pytest.raises(TypeError, match=r"dilated_attention_weights: k is a numpy\.ndarray; expected a torch\.Tensor"):
        dilated_attention_weights(x, x.numpy(), **THREE)


def test_k2_mixed_types_are_refused_and_output_keeps_its_type():
    x = torch.zeros(1, 2, 2, 3)
    with pytest.raises(TypeError, match=r"one type for all maps, got q is torch.float32, k is torch.float16.*\.to\("):
        dilated_attention(x, x.half(), x, **THREE)
    assert dilated_attention(x.half(), x.half(), x.half(), **THREE).dtype == torch.float16


ZEROS = torch.zeros(1, 4, 5, 12)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ([ZEROS[0]] * 3, THREE, r"q of shape \(B, H, W, C\), got \(4, 5, 12\).*permute\(0, 2, 3, 1\)"),
        ([ZEROS, ZEROS[..., :6], ZEROS], THREE, r"k of the shape of q, \(1, 4, 5, 12\), got \(1, 4, 5, 6\)"),
        ([ZEROS, ZEROS, ZEROS[:, :2]], THREE, r"v of the shape of q, \(1, 4, 5, 12\), got \(1, 2, 5, 12\)"),
        ([ZEROS, ZEROS.to("meta"), ZEROS], THREE, "q on cpu, k on meta, v on cpu; move them"),
        ([ZEROS] * 3, {"num_heads": 9}, "12 channels are not divisible by num_heads 9"),
        ([ZEROS] * 3, {"num_heads": 4}, r"num_heads 4 is not divisible by the 3 dilations \(1, 2, 3\)"),
        ([ZEROS] * 3, {"num_heads": 0}, "num_heads 0 is not divisible by the 3 dilations"),
        ([ZEROS] * 3, {**THREE, "kernel_size": 4}, "odd kernel_size of at least 1, got 4; use 5"),
        ([ZEROS] * 3, {**THREE, "kernel_size": -3}, "odd kernel_size of at least 1, got -3; use 1"),
        ([ZEROS] * 3, {**THREE, "dilations": ()}, r"at least one of them, got \(\)"),
        ([ZEROS] * 3, {**THREE, "dilations": 2}, r"dilations: expected a sequence of .*, got 2; pass \(2,\)$"),
        ([ZEROS] * 3, {**THREE, "dilations": (1, 0, 2)}, r"dilations of at least 1.*got \(1, 0, 2\)"),
        ([ZEROS] * 3, {**THREE, "border": "shift"}, "height 4 is too small for border 'shift'.* = 9.*border='zero'"),
    ],
)
def test_k5_k16_refuses_what_does_not_fit(maps, options, message):
    with pytest.raises(ShapeError, match=message):
        dilated_attention(*maps, **options)


def test_refuses_an_unknown_border():
    with pytest.raises(ValueError, match="border: expected one of 'zero', 'mask', 'shift', got 'reflect'"):
        dilated_attention(ZEROS, ZEROS, ZEROS, num_heads=3, border="reflect")
