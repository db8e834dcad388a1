"""The gates of channels and of positions: values, both gradients, every layout, and every refusal, on all backends."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from forms import with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import (
    BackendError,
    ShapeError,
    backend,
    channel_gate,
    channel_gate_reference,
    spatial_gate,
    spatial_gate_reference,
)
from trifuse.kernels.testing import assert_op_matches, launches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATES = {
    channel_gate: (channel_gate_reference, lambda b, c, h, w: (b, c)),
    spatial_gate: (spatial_gate_reference, lambda b, c, h, w: (b, 1, h, w)),
}
both_gates = pytest.mark.parametrize("op", GATES, ids=lambda op: op.__name__)
every_backend = pytest.mark.parametrize("name", BACKENDS)
# one of everything, odd and prime sizes, more channels than a tile, more pixels than a tile
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 70, 4, 4), (2, 2, 33, 41), (3, 2, 1, 9)]


def random_arguments(op, shape, dtype=torch.float32, x_grad=True, gate_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_(x_grad)
    return x, torch.randn(GATES[op][1](*shape), generator=generator).requires_grad_(gate_grad)


def check(op, name, x, gate):
    """Compare with the reference; a gate's gradient is a sum over a map, which float32 rounds."""
    atol = 4 * torch.finfo(torch.float32).eps * max(4, x.numel()) ** 0.5 + 4 * torch.finfo(x.dtype).eps
    if gate.dtype != torch.float32:  # the interpreter cuts off what a GPU rounds when low precision is stored
        atol += torch.finfo(gate.dtype).eps * max(4, x.numel()) ** 0.5
    with backend(name), poisoned_empty():
        assert_op_matches(op, GATES[op][0], x, gate, atol=atol)


@interpreted
def test_a_sum_in_one_part_is_not_added_up_by_another_launch():
    with backend("triton"), launches() as counted:
        channel_gate(*random_arguments(channel_gate, (2, 3, 5, 7))).sum().backward()
    assert counted.kernels == {"_gate_fwd_kernel": 1, "_channel_gate_bwd_kernel": 1}


@both_gates
def test_reference_matches_definition(op):
    x, gate = random_arguments(op, (2, 3, 4, 5))
    gated = torch.zeros(2, 3, 4, 5)
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, gated.shape)).tolist():
        value = gate[b, c] if op is channel_gate else gate[b, 0, h, w]
        gated[b, c, h, w] = x[b, c, h, w] / (1 + torch.exp(-value))
    torch.testing.assert_close(GATES[op][0](x, gate), gated)


@both_gates
@every_backend
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES), ids=str)
def test_values_and_both_gradients(op, name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(op, name, *random_arguments(op, shape, dtype))


@both_gates
@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_k12_zero_size(op, name, shape):
    x, gate = random_arguments(op, shape)
    with backend(name):
        out = op(x, gate)
        out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(gate.grad, torch.zeros_like(gate))


@both_gates
@every_backend
@pytest.mark.parametrize(("x_grad", "gate_grad"), [(True, False), (False, True), (False, False)])
def test_k22_only_the_gradients_asked_for(op, name, x_grad, gate_grad):
    x, gate = random_arguments(op, (2, 3, 4, 5), x_grad=x_grad, gate_grad=gate_grad)
    check(op, name, x, gate)
    if x_grad or gate_grad:
        with backend(name):
            op(x, gate).sum().backward()
        assert (x.grad is not None, gate.grad is not None) == (x_grad, gate_grad)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "some channels of a map": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all samples": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


@both_gates
@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_k8_k9_k10_strides_and_offsets(op, name, layout):
    x = LAYOUTS[layout](random_arguments(op, (2, 3, 6, 5))[0].detach())
    _, gate = random_arguments(op, x.shape)
    check(op, name, x.requires_grad_(), gate)
    strided_gate = torch.stack([gate, gate], -1)[..., 1].detach().requires_grad_()
    check(op, name, x, strided_gate)
    with backend(name):
        assert layout != "channels last" or op(x, gate).is_contiguous(memory_format=torch.channels_last)


@both_gates
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k8_k9_k14_channels_that_are_moved_sixteen_bytes_at_once(op, dtype):
    maps = import_module("trifuse.kernels.gpu.maps")
    x, gate = random_arguments(op, (2, 24, 3, 5), dtype)
    wide = torch.cat([x, x], 1).detach().contiguous(memory_format=torch.channels_last)
    for part in (wide[:, :24].contiguous(memory_format=torch.channels_last), wide[:, :24], wide[:, 4:28]):
        assert maps.unit_of(part) == 16 // dtype.itemsize
        check(op, "triton", part.requires_grad_(), gate)
    assert maps.unit_of(wide[:, :23]) == maps.unit_of(x) == maps.unit_of(wide, x) == 1


@interpreted
def test_tiles_along_the_channels_are_hardly_idle():
    maps = import_module("trifuse.kernels.gpu.maps")
    tiles = {
        channels: maps.tile_of(torch.empty(1, channels, 64, 64).to(memory_format=torch.channels_last))
        for channels in (2, 24, 64, 72, 144, 576)
    }
    assert tiles == {2: (2, 512), 24: (16, 64), 64: (64, 16), 72: (16, 64), 144: (32, 32), 576: (64, 16)}


@both_gates
@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(op, name, data):
    shape = data.draw(st.tuples(*(st.integers(0, most) for most in (2, 5, 5, 6))), label="(B, C, H, W)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x = data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label="x")
    gate = data.draw(tensors(GATES[op][1](*shape), dtypes=(torch.float32, dtype), expanded=True), label="gate")
    check(op, name, x, gate)


@both_gates
@every_backend
def test_k21_large_gates_saturate(op, name):
    x, gate = random_arguments(op, (1, 2, 3, 4))
    gate = torch.where(gate > 0, 1e4, -1e4).requires_grad_()
    check(op, name, x, gate)


@both_gates
@every_backend
def test_k19_nan_stays_where_it_is(op, name):
    x, gate = random_arguments(op, (2, 3, 4, 5), x_grad=False, gate_grad=False)
    x[1, 2, 3, 4] = float("nan")
    with backend(name):
        gated = op(x, gate)
    assert gated.isnan().sum() == 1
    assert gated[1, 2, 3, 4].isnan()


@both_gates
def test_gradcheck_reference_and_cpu_path(op):
    x, gate = (a.detach().double().requires_grad_() for a in random_arguments(op, (2, 3, 2, 2)))
    for form in (op, GATES[op][0]):
        assert gradcheck(form, (x, gate))


@both_gates
def test_k3_float64_is_computed_in_float64(op):
    x, gate = (a.detach().double() for a in random_arguments(op, (2, 3, 2, 2)))
    truth = x * torch.sigmoid(gate[:, :, None, None] if op is channel_gate else gate)
    torch.testing.assert_close(op(x, gate), truth, rtol=1e-15, atol=1e-15)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        op(x, gate)


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
@both_gates
def test_opcheck(op):
    x, gate = random_arguments(op, (2, 3, 4, 5))
    torch.library.opcheck(getattr(torch.ops.trifuse, op.__name__).default, (x, gate))
    backward = getattr(torch.ops.trifuse, f"{op.__name__}_backward").default
    for map_ in (x.detach(), LAYOUTS["channels last"](x.detach())):
        torch.library.opcheck(backward, (torch.randn(2, 3, 4, 5), map_, gate.detach(), True))
    torch.library.opcheck(backward, (torch.randn(2, 3, 4, 5), x.detach(), gate.detach(), False))


@both_gates
@every_backend
def test_k27_compiles_to_one_graph_with_dynamic_shapes(op, name):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            x, gate = random_arguments(op, (2, 3, 4, width))
            got = torch.autograd.grad(compiled(x, gate).square().sum(), (x, gate))
            expected = torch.autograd.grad(GATES[op][0](x, gate).square().sum(), (x, gate))
            torch.testing.assert_close(got, expected)


@both_gates
def test_k7_fake_and_meta_tensors_give_shapes_without_data(op):
    shape = (2**8, 2**8, 2**8, 2**8)
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    gated = op(x, torch.zeros(GATES[op][1](*shape), device="meta"))
    assert (gated.shape, gated.dtype, gated.device.type) == (shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        x, gate = random_arguments(op, (2, 3, 4, 5))
        op(x, gate).sum().backward()
        assert (x.grad.shape, gate.grad.shape) == (x.shape, gate.shape)


@both_gates
@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(op, mode):
    arguments = [random_arguments(op, (2, 3, 4, 5), x_grad=False, gate_grad=False, seed=seed) for seed in (0, 1)]
    graph = make_fx(op, tracing_mode=mode)(*arguments[0])
    torch.testing.assert_close(graph(*arguments[1]), GATES[op][0](*arguments[1]))


@both_gates
@every_backend
def test_k26_vmap_functional_and_forward_mode_differentiation(op, name):
    x, gate = random_arguments(op, (2, 3, 4, 5), x_grad=False, gate_grad=False)
    gates, reference = torch.stack([gate, -gate]), GATES[op][0]
    with backend(name):
        mapped = torch.vmap(op, in_dims=(None, 0))(x, gates)
        _, pushed = torch.func.jvp(lambda gate: op(x, gate), (gate,), (torch.ones_like(gate),))
        pulled = torch.func.grad(lambda gate: op(x, gate).square().sum())(gate)
    torch.testing.assert_close(mapped, torch.stack([reference(x, g) for g in gates]))
    s = torch.sigmoid(gate[:, :, None, None] if op is channel_gate else gate)
    torch.testing.assert_close(pushed, x * s * (1 - s))
    gate.requires_grad_()
    torch.testing.assert_close(pulled, torch.autograd.grad(reference(x, gate).square().sum(), gate)[0])


@both_gates
@every_backend
def test_k23_second_differentiation_is_refused(op, name):
    x, gate = random_arguments(op, (1, 2, 3, 4))
    with backend(name):
        (first,) = torch.autograd.grad(op(x, gate).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@both_gates
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k24_saves_the_arguments_and_nothing_else(op, name, dtype):
    x, gate = random_arguments(op, (2, 3, 4, 5), dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None), backend(name):
        with torch.no_grad():
            op(x, gate)
        with torch.inference_mode():
            op(x, gate)
        assert saved == []
        op(x, gate)
        assert sorted(saved) == sorted((x.data_ptr(), gate.data_ptr()))
        saved.clear()
        op(x, gate.detach())
        assert saved == [gate.data_ptr()]


@both_gates
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(op, name):
    x, gate = random_arguments(op, (2, 3, 4, 5))
    with backend(name):
        plain = op(x, gate)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(x, gate), plain)


@both_gates
@every_backend
def test_results_repeat_bit_for_bit(op, name):
    def run():
        x, gate = random_arguments(op, (2, 5, 33, 41))
        with backend(name):
            gated = op(x, gate)
        return [gated, *torch.autograd.grad(gated.square().sum(), (x, gate))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@interpreted
@pytest.mark.parametrize("layout", [lambda x: x, LAYOUTS["channels last"]], ids=["planes", "channels last"])
def test_channels_of_many_pixels_are_summed_in_parts(monkeypatch, layout):
    maps = import_module("trifuse.kernels.gpu.maps")
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    monkeypatch.setattr(import_module("trifuse.kernels.gpu.gates"), "ADD_ROWS", 4)
    x, gate = random_arguments(channel_gate, (2, 3, 7, 11), torch.bfloat16)
    assert maps.part_programs(layout(x.detach()), *maps.tile_of(layout(x.detach())))[1] > 1
    check(channel_gate, "triton", layout(x.detach()).requires_grad_(), gate)
    monkeypatch.setattr(maps, "ENOUGH_PROGRAMS", 1)
    assert maps.part_programs(x, 1, 16)[1] == 1


@both_gates
@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(op, bad):
    x, gate = random_arguments(op, (1, 2, 3, 4), x_grad=False, gate_grad=False)
    with pytest.raises(TypeError, match=rf"{op.__name__}: x is torch\..*expected one of float32"):
        op(x.to(bad), gate)
    with pytest.raises(TypeError, match=rf"{op.__name__}: gate is torch\..*expected one of float32"):
        op(x, gate.to(bad))
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        op(x.numpy(), gate)


@both_gates
def test_k2_output_keeps_the_map_s_type(op):
    x, gate = random_arguments(op, (1, 2, 3, 4))
    assert op(x.half(), gate).dtype == torch.float16
    assert torch.autograd.grad(op(x.half(), gate).sum(), gate)[0].dtype == torch.float32


@both_gates
def test_k5_refuses_what_does_not_fit(op):
    x, gate = random_arguments(op, (2, 3, 4, 5))
    with pytest.raises(ShapeError, match=r"x has shape \(3, 4, 5\); expected \(B, C, H, W\)"):
        op(x[0], gate)
    with pytest.raises(ShapeError, match=r"x has shape \(1, 2, 3, 4, 5\); .*fold .* x\.flatten\(2, 3\)$"):
        op(x[None], gate)
    with pytest.raises(ShapeError, match=rf"{op.__name__}: gate has shape .*; expected \(B, .* = \(2, "):
        op(x, gate[:1])
    with pytest.raises(ShapeError, match="x on cpu, gate on meta"):
        op(x, gate.to("meta"))


def test_a_gate_of_a_single_position_is_not_one_of_the_channels():
    x, gate = torch.randn(2, 5, 1, 1, requires_grad=True), torch.randn(2, 1, 1, 1, requires_grad=True)
    assert_op_matches(spatial_gate, spatial_gate_reference, x, gate)
