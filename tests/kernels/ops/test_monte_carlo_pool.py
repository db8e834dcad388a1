"""Monte Carlo pooling: one cell's mean, its gradient, every way to give a draw, and every refusal, on all backends."""

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
from torch.nn.functional import adaptive_avg_pool2d

from trifuse.kernels import BackendError, ShapeError, backend, monte_carlo_pool, monte_carlo_pool_reference
from trifuse.kernels.ops.monte_carlo_pool import LARGEST_SCALE
from trifuse.kernels.testing import assert_op_matches, poisoned_empty, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
every_backend = pytest.mark.parametrize("name", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one of everything, fewer rows than cells, odd and prime sizes, overlapping cells, more pixels than a tile
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 2), (2, 3, 5, 7), (1, 20, 8, 8), (2, 2, 33, 41)]
DRAWS = {
    "numbers": (3, 5),
    "shared tensors": (torch.tensor(2), torch.tensor(3)),
    "a draw per sample": (torch.tensor([2, 3]), torch.tensor([1, 7])),
    "cells alone per sample": (3, torch.tensor([8, 0])),
}
QUICK_DRAWS = ("numbers", "a draw per sample")


def random_maps(shape, dtype=torch.float32, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)


def permutations(shape, kind):
    generator = torch.Generator().manual_seed(7)
    batch, _, height, width = shape
    orders = [torch.randperm(height * width, generator=generator) for _ in range(batch)]
    return {"ordered": None, "shuffled": orders[0], "shuffled per sample": torch.stack(orders)}[kind]


def check(name, x, **draw):
    atol = 2e-6 + 4 * torch.finfo(x.dtype).eps  # the interpreter cuts off what a GPU rounds when bfloat16 is stored
    with backend(name), poisoned_empty():
        assert_op_matches(monte_carlo_pool, monte_carlo_pool_reference, x, atol=atol, **draw)


def for_batch(draw, batch):
    return [value[:batch] if isinstance(value, torch.Tensor) and value.ndim else value for value in DRAWS[draw]]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (13, 7)], ids=str)
def test_reference_matches_adaptive_average_pooling(size):
    x = random_maps((2, 3, *size), torch.float64)
    order = torch.randperm(size[0] * size[1], generator=torch.Generator().manual_seed(1))
    for maps, permutation in ((x, None), (x.flatten(2)[:, :, order].view_as(x), order)):
        for scale in (1, 2, 3, 4):
            expected = adaptive_avg_pool2d(maps, scale).flatten(2)
            for cell in range(scale**2):
                pooled = monte_carlo_pool_reference(x, scale=scale, cell=cell, permutation=permutation)
                torch.testing.assert_close(pooled, expected[:, :, cell], rtol=1e-14, atol=1e-14)


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES, at=2), ids=str)
@pytest.mark.parametrize("draw", QUICK_DRAWS)
def test_values_and_gradient(name, dtype, shape, draw):
    """K13, K14: odd, prime and single sizes, and fewer rows than cells, among them."""
    scale, cell = for_batch(draw, shape[0])
    check(name, random_maps(shape, dtype), scale=scale, cell=cell, permutation=permutations(shape, "shuffled"))
    check(name, random_maps(shape, dtype), scale=1, cell=0)


@every_backend
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", ["ordered", "shuffled", "shuffled per sample"])
def test_every_way_to_give_a_draw(name, draw, kind):
    shape = (2, 3, 5, 7)
    scale, cell = DRAWS[draw]
    check(name, random_maps(shape), scale=scale, cell=cell, permutation=permutations(shape, kind))


@every_backend
def test_gradient_is_the_share_of_each_chosen_position(name):
    """A third of 8 positions covers 3, 4 and 3 of them."""
    x, order = random_maps((1, 1, 8, 8)), permutations((1, 1, 8, 8), "shuffled")
    with backend(name):
        monte_carlo_pool(x, scale=3, cell=4, permutation=order).sum().backward()
    expected = torch.zeros(64)
    expected[order.view(8, 8)[2:6, 2:6].flatten()] = 1 / 16
    torch.testing.assert_close(x.grad.flatten(), expected)


@every_backend
@pytest.mark.parametrize("kind", ["ordered", "shuffled"])
@pytest.mark.parametrize("draw", QUICK_DRAWS)
def test_k19_only_the_drawn_cell_is_read(name, kind, draw):
    shape = (2, 3, 6, 7)
    scale, cell = DRAWS[draw]
    order, x = permutations(shape, kind), random_maps(shape)
    with backend(name):
        (gradient,) = torch.autograd.grad(monte_carlo_pool(x, scale=scale, cell=cell, permutation=order).sum(), x)
        spoiled = torch.where(gradient == 0, torch.nan, x)
        pooled = monte_carlo_pool(spoiled, scale=scale, cell=cell, permutation=order)
    expected = monte_carlo_pool_reference(x, scale=scale, cell=cell, permutation=order)
    torch.testing.assert_close(pooled, expected)


@every_backend
@pytest.mark.parametrize("draw", DRAWS)
def test_k12_no_samples_and_no_channels(name, draw):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        x = random_maps(shape)
        scale, cell = for_batch(draw, shape[0])
        with backend(name):
            pooled = monte_carlo_pool(x, scale=scale, cell=cell)
            pooled.sum().backward()
        assert pooled.shape == shape[:2]
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k12_a_map_without_positions_gives_nan_as_a_mean_does(name):
    x = random_maps((2, 3, 0, 5))
    with backend(name):
        pooled = monte_carlo_pool(x, scale=2, cell=1)
        pooled.sum().backward()
    assert pooled.isnan().all()
    assert x.grad.shape == x.shape


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., 1 : x.shape[3] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one map for all channels": lambda x: x[:, :1].expand_as(x),
    "one column": lambda x: x[..., :1],
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["ordered", "shuffled per sample"])
def test_k8_k9_k10_strides_and_offsets(name, layout, kind):
    x = LAYOUTS[layout](random_maps((2, 5, 6, 7), requires_grad=False)).requires_grad_()
    check(name, x, scale=2, cell=1, permutation=permutations(x.shape, kind))
    check(name, x, scale=torch.tensor([1, 2]), cell=torch.tensor([0, 3]), permutation=permutations(x.shape, kind))


@interpreted
@pytest.mark.parametrize("kind", ["ordered", "shuffled per sample"])
def test_k8_k9_k14_channels_that_are_moved_sixteen_bytes_at_once(kind, monkeypatch):
    kernels = import_module("trifuse.kernels.gpu.monte_carlo_pool")
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)  # so that programs take several steps
    wide = random_maps((2, 24, 17, 9), requires_grad=False).contiguous(memory_format=torch.channels_last)
    for x in (wide, wide[:, :12], wide[:, 4:20]):
        check("triton", x.requires_grad_(), scale=2, cell=1, permutation=permutations(x.shape, kind))
        wide = wide.detach()


@every_backend
@given(data=st.data())
def test_property_any_shape_layout_type_and_draw(name, data):
    shape = data.draw(st.tuples(st.integers(1, 2), *(st.integers(1, 6) for _ in range(3))), label="(B, C, H, W)")
    x = data.draw(tensors(shape, dtypes=DTYPES, expanded=True), label="x")
    scale = data.draw(st.integers(1, 4), label="scale")
    cell = data.draw(st.integers(0, scale**2 - 1), label="cell")
    kind = data.draw(st.sampled_from(["ordered", "shuffled", "shuffled per sample"]), label="order")
    if data.draw(st.booleans(), label="as tensors"):
        scale, cell = torch.full((len(x),), scale), torch.tensor(cell)
    check(name, x, scale=scale, cell=cell, permutation=permutations(shape, kind))


def test_gradcheck_reference_and_cpu_path():
    x, order = random_maps((2, 2, 3, 4), torch.float64), permutations((2, 2, 3, 4), "shuffled")
    for op in (monte_carlo_pool, monte_carlo_pool_reference):
        for scale, cell, permutation in ((2, 1, order), (torch.tensor([2, 3]), torch.tensor([1, 7]), None)):
            draw = {"scale": scale, "cell": cell, "permutation": permutation}
            assert gradcheck(lambda x, op=op, draw=draw: op(x, **draw), (x,))


def test_k3_float64_is_computed_in_float64():
    x = random_maps((2, 3, 5, 7), torch.float64)
    expected = x[:, :, :3, 3:].mean((2, 3))
    torch.testing.assert_close(monte_carlo_pool(x, scale=2, cell=1), expected, rtol=1e-15, atol=1e-15)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        monte_carlo_pool(x, scale=2, cell=1)


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
@pytest.mark.parametrize("layout", [lambda x: x, LAYOUTS["channels last"]], ids=["planes", "channels last"])
def test_opcheck(layout):
    shape = (2, 3, 4, 5)
    x = layout(random_maps(shape, requires_grad=False)).requires_grad_()
    numbers = (3, 5, None, None, permutations(shape, "shuffled"))
    tensors_given = (0, 0, *DRAWS["a draw per sample"], None)
    for draw in (numbers, tensors_given):
        torch.library.opcheck(torch.ops.trifuse.monte_carlo_pool.default, (x, *draw))
        backward = torch.ops.trifuse.monte_carlo_pool_backward.default
        torch.library.opcheck(backward, (torch.randn(2, 3), shape, *draw, x.is_contiguous()))


@every_backend
@pytest.mark.parametrize("draw", [pytest.param(x, marks=() if x in QUICK_DRAWS else pytest.mark.slow) for x in DRAWS])
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name, draw):
    torch._dynamo.reset()
    compiled = torch.compile(monte_carlo_pool, fullgraph=True, backend="aot_eager", dynamic=True)
    scale, cell = DRAWS[draw]
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for width in (5, 6, 9):
            x = random_maps((2, 3, 4, width))
            draw = {"scale": scale, "cell": cell, "permutation": permutations(x.shape, "shuffled")}
            (got,) = torch.autograd.grad(compiled(x, **draw).square().sum(), x)
            (expected,) = torch.autograd.grad(monte_carlo_pool_reference(x, **draw).square().sum(), x)
            torch.testing.assert_close(got, expected)


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    x = torch.empty(2**8, 2**8, 2**8, 2**8, device="meta", dtype=torch.bfloat16)
    number = torch.zeros((), dtype=torch.int64, device="meta")
    pooled = monte_carlo_pool(x, scale=number, cell=number)
    assert (pooled.shape, pooled.dtype, pooled.device.type) == ((2**8, 2**8), torch.bfloat16, "meta")
    with FakeTensorMode():
        x, number = torch.empty(2, 3, 4, 5, requires_grad=True), torch.zeros((), dtype=torch.int64)
        for draw in ({"scale": 2, "cell": 1}, {"scale": number, "cell": number}):
            monte_carlo_pool(x, permutation=torch.empty(20, dtype=torch.int64), **draw).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_draws(mode):
    def pool(x, scale, cell, order):
        return monte_carlo_pool(x, scale=scale, cell=cell, permutation=order)

    x, shape = random_maps((2, 3, 4, 5), requires_grad=False), (2, 3, 4, 5)
    recorded = (x, torch.tensor(2), torch.tensor([1, 3]), permutations(shape, "shuffled"))
    other = (x + 1, torch.tensor(3), torch.tensor([8, 0]), permutations(shape, "shuffled").flip(0))
    graph = make_fx(pool, tracing_mode=mode)(*recorded)
    expected = monte_carlo_pool_reference(x + 1, scale=other[1], cell=other[2], permutation=other[3])
    torch.testing.assert_close(graph(*other), expected)


@every_backend
@pytest.mark.parametrize("draw", QUICK_DRAWS)
def test_k26_vmap_functional_and_forward_mode_differentiation(name, draw):
    x = random_maps((2, 3, 4, 5), requires_grad=False)
    scale, cell = DRAWS[draw]
    draw = {"scale": scale, "cell": cell, "permutation": permutations(x.shape, "shuffled")}
    orders = torch.stack([draw["permutation"], draw["permutation"].flip(-1)])
    with backend(name):
        mapped = torch.vmap(lambda x: monte_carlo_pool(x, **draw))(torch.stack([x, -x]))
        _, pushed = torch.func.jvp(lambda x: monte_carlo_pool(x, **draw), (x,), (torch.ones_like(x),))
        pulled = torch.func.grad(lambda x: monte_carlo_pool(x, **draw).sum())(x)
        reordered = torch.vmap(lambda order: monte_carlo_pool(x, **draw | {"permutation": order}))(orders)
    expected = monte_carlo_pool_reference(x, **draw)
    torch.testing.assert_close(mapped, torch.stack([expected, -expected]))
    one_by_one = [monte_carlo_pool_reference(x, **draw | {"permutation": order}) for order in orders]
    torch.testing.assert_close(reordered, torch.stack(one_by_one))
    torch.testing.assert_close(pushed, torch.ones(2, 3))
    torch.testing.assert_close(pulled.sum((2, 3)), torch.ones(2, 3))


@every_backend
def test_k23_second_differentiation_is_refused(name):
    x = random_maps((1, 2, 3, 4))
    with backend(name):
        pooled = monte_carlo_pool(x, scale=2, cell=1, permutation=permutations(x.shape, "shuffled"))
        (first,) = torch.autograd.grad(pooled.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
def test_k24_saves_no_map(name):
    x, saved = random_maps((2, 3, 4, 5)), []
    order = permutations(x.shape, "shuffled")
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None), backend(name):
        for draw in DRAWS.values():
            monte_carlo_pool(x, scale=draw[0], cell=draw[1], permutation=order)
    assert all(not tensor.is_floating_point() for tensor in saved)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    x = random_maps((2, 3, 4, 5))
    with backend(name):
        plain = monte_carlo_pool(x, scale=2, cell=1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(monte_carlo_pool(x, scale=2, cell=1), plain)


@interpreted
@pytest.mark.parametrize("layout", [lambda x: x, LAYOUTS["channels last"]], ids=["planes", "channels last"])
@pytest.mark.parametrize("scale", [1, 2])
def test_large_cells_are_summed_in_parts(monkeypatch, layout, scale):
    maps = import_module("trifuse.kernels.gpu.maps")
    monkeypatch.setattr(maps, "TILE", 16)
    monkeypatch.setattr(maps, "TILES_PER_PART", 2)
    x = layout(random_maps((2, 3, 7, 11), torch.bfloat16, requires_grad=False))
    assert maps.part_programs(x, *maps.tile_of(x))[1] > 1
    check("triton", x.requires_grad_(), scale=scale, cell=0, permutation=permutations(x.shape, "shuffled"))


@pytest.mark.parametrize("size", [(5, 7), (1, 70_001), (65_537, 1)], ids=str)
@interpreted
def test_large_scales_and_long_maps_need_more_than_32_bits_in_between(size):
    x = random_maps((1, 1, *size)).requires_grad_()
    for cell in (LARGEST_SCALE - 1, LARGEST_SCALE**2 // 2 + 17, LARGEST_SCALE**2 - 1):
        check("triton", x, scale=torch.tensor(LARGEST_SCALE), cell=torch.tensor(cell))


@interpreted
def test_k35_a_cell_that_does_not_exist_gives_nan_where_nobody_may_look():
    for scale, cell in ((2, 4), (2, -1), (0, 0), (LARGEST_SCALE + 1, 0), (2**32 + 2, 0)):
        with backend("triton"):
            pooled = monte_carlo_pool(random_maps((1, 2, 4, 5)), scale=torch.tensor(scale), cell=torch.tensor(cell))
        assert pooled.isnan().all()
        for pool in (monte_carlo_pool, monte_carlo_pool_reference):
            with pytest.raises(ValueError, match=rf"got scale {scale} and cell {cell}; expected a scale of at least 1"):
                pool(random_maps((1, 2, 4, 5)), scale=torch.tensor(scale), cell=torch.tensor(cell))
    with backend("triton"):
        pooled = monte_carlo_pool(
            random_maps((1, 2, 2, 2)), scale=1 + 1, cell=0, permutation=torch.tensor([9, 1, 2, 3])
        )
    assert pooled.isnan().all()


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    x = random_maps((1, 2, 3, 4), requires_grad=False)
    with pytest.raises(TypeError, match=r"monte_carlo_pool: x is torch\..*expected one of float32"):
        monte_carlo_pool(x.to(bad), scale=1, cell=0)
    with pytest.raises(TypeError, match=r"x is a numpy\.ndarray; expected a torch\.Tensor"):
        monte_carlo_pool(x.numpy(), scale=1, cell=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ShapeError, r"x has shape \(3, 4, 5\); expected \(B, C, H, W\)"),
        ({"scale": 2.0}, TypeError, "scale is a float; expected an int64 tensor"),
        ({"cell": True}, TypeError, "cell is a bool"),
        ({"permutation": [0, 1]}, TypeError, "permutation is a list"),
        ({"scale": torch.tensor(2.0)}, TypeError, r"scale is torch\.float32; expected torch\.int64"),
        ({"cell": torch.tensor([0, 1, 2])}, ShapeError, r"cell has shape \(3,\); expected \(\) or \(2,\)"),
        ({"permutation": torch.arange(9)}, ShapeError, r"permutation has shape \(9,\); expected \(20,\) or \(2, 20\)"),
        ({"cell": torch.tensor(0, device="meta")}, ShapeError, "x on cpu, cell on meta"),
        ({"scale": 0, "cell": 0}, ValueError, "got scale 0 and cell 0"),
        ({"scale": 2, "cell": 4}, ValueError, "got scale 2 and cell 4"),
        ({"scale": 2, "cell": torch.tensor([1, 9])}, ValueError, "got scale 2 and cell 9"),
    ],
)
def test_k5_refuses_what_does_not_fit(changed, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 5), "scale": 2, "cell": 1, "permutation": None, **changed}
    with pytest.raises(error, match=message):
        monte_carlo_pool(arguments.pop("x"), **arguments)
