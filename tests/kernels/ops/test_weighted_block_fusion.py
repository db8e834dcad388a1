"""Weighted block fusion: values, every gradient, every layout, and every refusal, on all three backends."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import BackendError, ShapeError, backend, weighted_block_fusion, weighted_block_fusion_reference
from trifuse.kernels.testing import assert_op_matches, peak_memory_bytes, poisoned_empty, tensors

operator_module = import_module("trifuse.kernels.ops.weighted_block_fusion")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, B, M, D): one of everything, odd and prime sizes, more than one tile, more than one launch of the backward kernel
SHAPES = [(1, 1, 1, 1), (2, 1, 7, 3), (3, 2, 5, 48), (12, 2, 17, 40), (5, 1, 3, 700), (25, 1, 3, 5), (64, 1, 2, 9)]


def random_arguments(n, b, m, d, dtype=torch.float32, maps_grad=True, logits_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(b, m, d, generator=generator).to(dtype).requires_grad_(maps_grad) for _ in range(n)]
    return maps, torch.randn(n, generator=generator).requires_grad_(logits_grad)


def check(name, maps, logits):
    """Compare with the reference; each logit's gradient is a difference of dot products, which float32 rounds."""
    atol = 4 * torch.finfo(torch.float32).eps * max(4, maps[0].numel()) ** 0.5
    with backend(name), poisoned_empty():
        assert_op_matches(weighted_block_fusion, weighted_block_fusion_reference, maps, logits, atol=atol)


def test_reference_matches_definition():
    maps, logits = random_arguments(4, 2, 3, 5)
    weights = [torch.exp(logit) / torch.exp(logits).sum() for logit in logits]
    fused = torch.zeros(2, 3, 5)
    for b in range(2):
        for m in range(3):
            for d in range(5):
                fused[b, m, d] = sum(w * feature[b, m, d] for w, feature in zip(weights, maps, strict=True))
    torch.testing.assert_close(weighted_block_fusion_reference(maps, logits), fused)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_every_gradient(name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(name, *random_arguments(*shape, dtype=dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 0, 5, 4), (3, 2, 0, 4), (3, 2, 5, 0)], ids=str)
def test_k12_zero_size_gives_empty_values_and_zero_gradients(name, shape):
    maps, logits = random_arguments(*shape)
    with backend(name):
        fused = weighted_block_fusion(maps, logits)
        fused.sum().backward()
    assert fused.shape == shape[1:]
    assert all(feature.grad.shape == shape[1:] for feature in maps)
    assert torch.equal(logits.grad, torch.zeros(3))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("trained", [(), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("logits_grad", [False, True])
def test_k22_only_the_gradients_asked_for(name, trained, logits_grad):
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=logits_grad)
    for i in trained:
        maps[i].requires_grad_()
    check(name, maps, logits)
    if trained or logits_grad:
        with backend(name):
            weighted_block_fusion(maps, logits).sum().backward()
        assert [feature.grad is not None for feature in maps] == [i in trained for i in range(3)]
        assert (logits.grad is not None) == logits_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_stacked_maps_equal_listed_maps(name):
    maps, logits = random_arguments(4, 2, 3, 5)
    stacked = torch.stack([feature.detach() for feature in maps]).requires_grad_()
    with backend(name):
        weighted_block_fusion(stacked, logits.detach()).square().sum().backward()
        weighted_block_fusion(maps, logits.detach()).square().sum().backward()
    torch.testing.assert_close(stacked.grad, torch.stack([feature.grad for feature in maps]))


@pytest.mark.parametrize("name", BACKENDS)
def test_k8_strides_and_offsets(name):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(2, 8, 6, generator=generator) for _ in range(3)]
    logits = torch.randn(3, generator=generator, requires_grad=True)
    for view in (
        lambda x: x[:, 1:],  # the class token left out: samples contiguous, one stride apart
        lambda x: x[:, ::2],
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, :1].expand(2, 8, 6),
        lambda x: x.as_strided((2, 3, 4), (16, 4, 1), 1),
    ):
        check(name, [view(x).detach().requires_grad_() for x in tokens], logits)
    mixed = [tokens[0][:, 1:], tokens[1].transpose(1, 2)[:, :, :6][:, :6].reshape(2, 6, 6)[:, :6]]
    mixed = [mixed[0][:, :6], mixed[1].transpose(1, 2)]
    check(name, [x.detach().requires_grad_() for x in mixed], logits[:2].detach().requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    n = data.draw(st.integers(1, 6), label="N")
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 9)), label="(B, M, D)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    maps = [data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label=f"map {i}") for i in range(n)]
    logits = data.draw(tensors((n,), dtypes=(torch.float32, dtype)), label="logits")
    check(name, maps, logits)


@given(tensors(st.tuples(st.integers(1, 5), st.just(2), st.just(3), st.just(4))), st.floats(-50, 50))
def test_property_shift_invariance_and_gradients_that_sum_to_zero(stacked, shift):
    logits = torch.linspace(-1, 1, len(stacked), requires_grad=True)
    fused = weighted_block_fusion(stacked.detach(), logits)
    torch.testing.assert_close(weighted_block_fusion(stacked.detach(), logits + shift), fused, atol=1e-5, rtol=1e-4)
    fused.square().sum().backward()
    assert abs(logits.grad.sum().item()) <= 1e-5 * max(1.0, logits.grad.abs().max().item())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.3, 0.3, 0.3]], ids=str)
def test_k34_extreme_and_equal_logits(name, logits):
    maps, _ = random_arguments(3, 1, 4, 5)
    check(name, maps, torch.tensor(logits, requires_grad=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_k34_one_map_has_weight_one_and_no_logit_gradient(name):
    (feature,), logits = random_arguments(1, 2, 3, 4)
    with backend(name):
        fused = weighted_block_fusion([feature], logits)
        fused.square().sum().backward()
    assert torch.equal(fused, feature)
    assert logits.grad.item() == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_infinite_and_nan_logits_give_nan_as_softmax_does(name, bad):
    maps, _ = random_arguments(3, 1, 2, 3)
    with backend(name):
        assert weighted_block_fusion(maps, torch.tensor([0.0, bad, 1.0])).isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_k19_nan_stays_where_it_is(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False)
    maps[1][1, 2, 3] = float("nan")
    with backend(name):
        fused = weighted_block_fusion(maps, logits)
    assert fused.isnan().sum() == 1
    assert fused[1, 2, 3].isnan()


def test_gradcheck_reference_and_cpu_path():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    logits = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    for op in (weighted_block_fusion, weighted_block_fusion_reference):
        assert gradcheck(lambda logits, *maps, op=op: op(maps, logits), (logits, *maps))


def test_k3_float64_is_computed_in_float64():
    maps, logits = random_arguments(3, 2, 3, 4, dtype=torch.float64)
    truth = torch.einsum("n,nbmd->bmd", logits.double().softmax(0), torch.stack(maps))
    torch.testing.assert_close(weighted_block_fusion(maps, logits), truth, rtol=1e-14, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        weighted_block_fusion(maps, logits)


@interpreted
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(trained):
    maps, logits = random_arguments(3, 2, 5, 7, maps_grad=trained)
    torch.library.opcheck(torch.ops.trifuse.weighted_block_fusion.default, (maps, logits))
    grad = torch.randn(2, 5, 7)
    frozen = [feature.detach() for feature in maps]
    torch.library.opcheck(
        torch.ops.trifuse.weighted_block_fusion_backward.default, (grad, frozen, logits.detach(), [trained] * 3)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    compiled = torch.compile(weighted_block_fusion, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 6, 9):
            maps, logits = random_arguments(3, 2, m, 4)
            compiled(maps, logits).square().sum().backward()
            got = [logits.grad, *(feature.grad for feature in maps)]
            maps, logits = random_arguments(3, 2, m, 4)
            weighted_block_fusion_reference(maps, logits).square().sum().backward()
            torch.testing.assert_close(got, [logits.grad, *(feature.grad for feature in maps)])


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    maps = [torch.empty(2**16, 2**8, 2**8, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    fused = weighted_block_fusion(maps, torch.zeros(2, device="meta"))
    assert (fused.shape, fused.dtype, fused.device.type) == (maps[0].shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        maps, logits = [torch.empty(2, 5, 4, requires_grad=True) for _ in range(2)], torch.zeros(2, requires_grad=True)
        fused = weighted_block_fusion(maps, logits)
        fused.sum().backward()
        assert [fused.shape, logits.grad.shape, maps[1].grad.shape] == [(2, 5, 4), (2,), (2, 5, 4)]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_recorded_graph_holds_for_other_values(mode):
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=False)
    graph = make_fx(weighted_block_fusion, tracing_mode=mode)(maps, logits)
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=False, seed=1)
    torch.testing.assert_close(graph(maps, logits), weighted_block_fusion_reference(maps, logits))


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False, logits_grad=False)
    many_logits = torch.stack([logits, logits + 1, -logits])
    with backend(name):
        mapped = torch.vmap(weighted_block_fusion, in_dims=(None, 0))(maps, many_logits)
        _, pushed = torch.func.jvp(lambda x: weighted_block_fusion(maps, x), (logits,), (torch.ones(3),))
        pulled = torch.func.grad(lambda x: weighted_block_fusion(maps, x).square().sum())(logits)
    torch.testing.assert_close(mapped, torch.stack([weighted_block_fusion_reference(maps, x) for x in many_logits]))
    torch.testing.assert_close(pushed, torch.zeros_like(pushed), atol=1e-6, rtol=0)
    logits.requires_grad_()
    weighted_block_fusion_reference(maps, logits).square().sum().backward()
    torch.testing.assert_close(pulled, logits.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    maps, logits = random_arguments(2, 1, 2, 3)
    with backend(name):
        (first,) = torch.autograd.grad(weighted_block_fusion(maps, logits).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_k24_saves_the_arguments_and_nothing_else(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None), backend(name):
        with torch.no_grad():
            weighted_block_fusion(maps, logits)
        with torch.inference_mode():
            weighted_block_fusion(maps, logits)
        assert saved == []
        weighted_block_fusion(maps, logits)
        assert sorted(saved) == sorted(t.data_ptr() for t in (logits, *maps))
        saved.clear()
        trained, frozen_logits = random_arguments(3, 2, 4, 5, logits_grad=False)
        weighted_block_fusion(trained, frozen_logits)
        assert saved == [frozen_logits.data_ptr()]


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    maps, logits = random_arguments(3, 2, 4, 5)
    with backend(name):
        plain = weighted_block_fusion(maps, logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(weighted_block_fusion(maps, logits), plain)


@pytest.mark.parametrize("name", BACKENDS)
def test_results_repeat_bit_for_bit(name):
    def run():
        maps, logits = random_arguments(26, 3, 41, 48, maps_grad=False)
        with backend(name):
            fused = weighted_block_fusion(maps, logits)
        fused.backward(torch.randn(fused.shape, generator=torch.Generator().manual_seed(3)))
        return fused, logits.grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@interpreted
def test_backward_adds_up_many_tiles_in_few_programs(monkeypatch):
    gpu = import_module("trifuse.kernels.gpu.weighted_block_fusion")
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 3)
    check("triton", *random_arguments(3, 3, 11, 160, dtype=torch.bfloat16))
    monkeypatch.setattr(gpu, "REDUCE_ELEMENTS", 4)
    check("triton", *random_arguments(3, 3, 11, 160))


@interpreted
def test_kernels_are_launched_on_the_device_of_their_arguments(monkeypatch):
    entered = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor.shape) or device_of(tensor))
    check("triton", *random_arguments(2, 1, 2, 3))
    assert entered
    assert set(entered) == {(1, 2, 3)}


def test_maps_are_cut_into_even_launches():
    gpu = import_module("trifuse.kernels.gpu.weighted_block_fusion")
    assert gpu.launch_groups(1) == [(0, 1)]
    assert gpu.launch_groups(24) == [(0, 24)]
    assert gpu.launch_groups(40) == [(0, 20), (20, 40)]
    assert gpu.launch_groups(64) == [(0, 21), (21, 42), (42, 64)]


def test_chunked_path_over_several_chunks(monkeypatch):
    monkeypatch.setattr(operator_module, "CHUNK_ELEMENTS", 16)
    for dtype in (torch.float32, torch.bfloat16):
        check("torch", *random_arguments(3, 2, 5, 7, dtype=dtype))
        maps, logits = random_arguments(3, 2, 6, 7, dtype=dtype, maps_grad=False)
        check("torch", [feature[:, 1:].requires_grad_() for feature in maps], logits)


@pytest.mark.parametrize("name", BACKENDS)
def test_low_precision_terms_are_not_rounded_before_they_are_added(name):
    """A third has no exact bfloat16, so terms rounded on their own do not cancel."""
    maps = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (1.0, -1.0, 0.0)]
    with backend(name):
        assert weighted_block_fusion(maps, torch.zeros(3)).item() == 0


def test_peak_extra_memory_is_one_map():
    maps, logits = random_arguments(12, 1, 257, 512, maps_grad=False)
    map_bytes = maps[0].numel() * maps[0].element_size()
    grad = torch.ones_like(maps[0])
    for n in (2, 12):
        some = logits[:n].detach().requires_grad_()
        assert peak_memory_bytes(lambda n=n, some=some: weighted_block_fusion(maps[:n], some)) <= 1.2 * map_bytes
        both = lambda n=n, some=some: weighted_block_fusion(maps[:n], some).backward(grad)  # noqa: E731
        assert peak_memory_bytes(both) <= 1.2 * map_bytes


SPARSE_MAP = """
import mmap, os, sys, tempfile
import numpy, torch
from trifuse.kernels import backend, weighted_block_fusion
with tempfile.TemporaryFile() as file:
    file.truncate(11 << 30)
    values = torch.from_numpy(numpy.memmap(file, dtype=numpy.float32, mode="r+"))
    # a stride beyond 2^31, and one below it whose multiples are beyond
    for shape, strides in (((2, 1, 16), (5 << 29, 16, 1)), ((3, 1, 16), (5 << 28, 16, 1))):
        x = values.as_strided(shape, strides)
        x[-1] = 3.0
        with backend("triton"):
            fused = weighted_block_fusion([x, x], torch.zeros(2))
        assert fused[:-1].eq(0).all() and fused[-1].eq(3).all(), fused
        x[-1] = 0.0
"""


@interpreted
def test_k17_strides_beyond_2_to_the_31():
    """Samples lie far apart in a sparse file; offsets of 32 bits would leave it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SPARSE_MAP]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False, logits_grad=False)
    with pytest.raises(TypeError, match=r"weighted_block_fusion: features\[0\] is torch\..*expected one of float32"):
        weighted_block_fusion([feature.to(bad) for feature in maps], logits)
    with pytest.raises(TypeError, match=r"weighted_block_fusion: logits is torch\."):
        weighted_block_fusion(maps, logits.to(bad))


def test_k1_refuses_what_is_no_tensor():
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False, logits_grad=False)
    with pytest.raises(TypeError, match=r"features\[0\] is a numpy\.ndarray; expected a torch\.Tensor"):
        weighted_block_fusion([feature.numpy() for feature in maps], logits)
    with pytest.raises(TypeError, match=r"features\[1\] is a numpy\.ndarray; expected a torch\.Tensor"):
        weighted_block_fusion([maps[0], maps[1].numpy()], logits)
    with pytest.raises(TypeError, match=r"logits is a builtins\.list; expected a torch\.Tensor"):
        weighted_block_fusion(maps, [0.0, 0.0])


def test_k2_mixed_types_are_refused_and_output_keeps_the_maps_type():
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False)
    with pytest.raises(TypeError, match=r"features\[1\] is torch\.float16; expected torch\.float32"):
        weighted_block_fusion([maps[0], maps[1].half()], logits)
    assert weighted_block_fusion([feature.half() for feature in maps], logits).dtype == torch.float16


@pytest.mark.parametrize(
    ("maps", "logits", "message"),
    [
        ([], torch.zeros(0), "features is empty"),
        ([torch.zeros(2, 3)], torch.zeros(1), r"features\[0\] has shape \(2, 3\); expected \(B, M, D\)"),
        ([torch.zeros(2, 3, 4, 5)], torch.zeros(1), r"flatten\(2\)\.transpose\(1, 2\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2), r"one tensor of shape \(2, 3, 4\); expected \(N, B, M, D\)"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)], torch.zeros(2), r"features\[1\] has shape \(1, 2, 4\)"),
        ([torch.zeros(1, 2, 3)], torch.zeros(2), r"logits has shape \(2,\); expected \(1,\)"),
        ([torch.zeros(1, 2, 3)], torch.zeros(1, 1), r"logits has shape \(1, 1\); expected \(1,\)"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")], torch.zeros(2), r"features\[1\] is on meta"),
        ([torch.zeros(1, 2, 3)], torch.zeros(1, device="meta"), "features on cpu, logits on meta"),
    ],
)
def test_k5_refuses_what_does_not_fit(maps, logits, message):
    with pytest.raises(ShapeError, match=message):
        weighted_block_fusion(maps, logits)


@pytest.mark.parametrize("name", BACKENDS)
def test_arguments_are_left_alone(name):
    maps, logits = random_arguments(3, 2, 4, 5)
    before = copy.deepcopy([feature.detach() for feature in maps])
    with backend(name):
        weighted_block_fusion(maps, logits).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))
