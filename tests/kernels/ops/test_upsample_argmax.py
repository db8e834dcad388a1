"""Labels from coarse logits: against the definition up to rounding, every layout, and every refusal, on all backends.

Labels are integers, so rounding shows as another class where the two largest sums are nearly equal. Each label is
therefore judged by what it costs: in float64, the sum of the class chosen may lie below the largest by no more than
float32 loses.
"""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from forms import with_every_type
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import BackendError, ShapeError, backend, upsample_argmax, upsample_argmax_reference
from trifuse.kernels.testing import peak_memory_bytes, poisoned_empty, tensors

operator_module = import_module("trifuse.kernels.ops.upsample_argmax")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, K), the maps' sizes, the labels' size: one of everything, coarse to fine, prime sizes, finer maps than labels,
# a row of more than one block, all that uint8 can tell apart, more classes than one walk takes, two strips of rows
CASES = [
    ((1, 1), [(1, 1)], (1, 1)),
    ((2, 4), [(2, 3), (4, 6), (8, 12)], (9, 13)),
    ((1, 3), [(5, 7), (11, 4)], (4, 3)),
    ((1, 2), [(1, 30)], (2, 140)),
    ((1, 256), [(1, 2)], (1, 3)),
    ((1, 35), [(2, 3), (3, 2)], (5, 4)),
    ((2, 3), [(7, 2), (20, 3)], (37, 5)),
]


def random_maps(batch_and_classes, sides, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch_and_classes, *side, generator=generator).to(dtype) for side in sides]


def by_definition(maps, size):
    """Interpolate pixel by pixel: (B, K, H, W) in float64."""
    (height, width), total = size, torch.zeros(*maps[0].shape[:2], *size, dtype=torch.float64)
    for m in maps:
        for y, x in [(y, x) for y in range(height) for x in range(width)]:
            rows, columns = neighbours(y, m.shape[2], height), neighbours(x, m.shape[3], width)
            for (i, a), (j, b) in [(r, c) for r in rows for c in columns]:
                total[:, :, y, x] += a * b * m[:, :, i, j].double()
    return total


def neighbours(place, coarse, fine):
    """Return the two coarse places around the centre of a fine one, each with its weight."""
    centre = max(0.0, (place + 0.5) * coarse / fine - 0.5)
    before = min(int(centre), coarse - 1)
    return (before, 1 - (centre - before)), (min(before + 1, coarse - 1), centre - before)


def check(name, maps, size):
    """Compare the sum of the chosen class with the largest, in float64; where only one comes near, labels are equal."""
    sums = by_definition(maps, size)
    with backend(name), poisoned_empty():
        labels = upsample_argmax(maps, size)
    assert (labels.dtype, labels.shape) == (torch.uint8, (maps[0].shape[0], *size))
    assert labels.is_contiguous()
    chosen = sums.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    scale = sum(m.abs().max().item() for m in maps) if sums.numel() else 0.0
    # places are rounded as well: at pixel 100 a weight is known to a hundred units
    lost = torch.finfo(torch.float32).eps * scale * (16 + 4 * max(size))
    assert (sums.amax(dim=1) - chosen <= lost).all()
    clear = (sums > sums.amax(dim=1, keepdim=True) - lost).sum(dim=1) == 1
    assert torch.equal(labels[clear], upsample_argmax_reference(maps, size)[clear])
    return clear


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("shape", "sides", "size", "dtype"), with_every_type(CASES, DTYPES), ids=str)
def test_values(name, dtype, shape, sides, size):
    """K14: odd, prime and single sizes among them. Only a rare pixel of drawn logits is unclear."""
    assert check(name, random_maps(shape, sides, dtype), size).float().mean() >= 0.9


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
def test_property_any_shape_layout_and_type(name, data):
    batch, classes = data.draw(st.integers(0, 2), label="B"), data.draw(st.integers(1, 4), label="K")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    side = st.integers(1, 5)
    sides = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=3), label="sizes")
    maps = [
        data.draw(tensors((batch, classes, *side), dtypes=(dtype,), expanded=True), label=f"map {i}")
        for i, side in enumerate(sides)
    ]
    check(name, maps, data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)), label="size"))


@given(tensors((2, 3, 4, 5), requires_grad=False), st.floats(-8, 8), st.integers(0, 2))
def test_property_a_constant_for_all_classes_changes_nothing_and_a_large_one_decides(logits, shift, winner):
    assume(not check("torch", [logits], (7, 6)).logical_not().any())
    plain = upsample_argmax([logits], (7, 6))
    clear = check("torch", [logits, torch.full((2, 3, 1, 1), shift)], (7, 6))
    assert torch.equal(upsample_argmax([logits, torch.full((2, 3, 1, 1), shift)], (7, 6))[clear], plain[clear])
    offset = torch.zeros(2, 3, 1, 1)
    offset[:, winner] = 100
    assert upsample_argmax([logits, offset], (7, 6)).eq(winner).all()


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_first_of_equal_classes_wins(name):
    maps = [torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0]).view(1, 5, 1, 1)]
    with backend(name):
        assert upsample_argmax(maps, (2, 3)).eq(1).all()
        assert upsample_argmax([torch.full((1, 4, 2, 2), -1e30)], (2, 2)).eq(0).all()


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k19_a_class_is_ruled_out_by_a_large_number_and_not_by_an_infinite_one(name):
    """An infinite logit times a weight of zero is NaN."""
    maps = random_maps((1, 3), [(4, 4)])
    with backend(name):
        for least, wins in ((-torch.inf, True), (-1e30, False)):
            maps[0][:, 1] = least
            assert bool((upsample_argmax(maps, (4, 4)) == 1).any()) == wins


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k19_first_nan_wins_where_it_is_read_and_nowhere_else(name):
    maps = random_maps((2, 4), [(3, 6)])
    clean = upsample_argmax_reference(maps, (6, 12))
    maps[0][1, 2, 1, 3] = maps[0][1, 3, 1, 3] = torch.nan
    with backend(name):
        labels = upsample_argmax(maps, (6, 12))
    read = torch.zeros(2, 6, 12, dtype=torch.bool)
    read[1, 0:5, 5:9] = True  # the first row reads its neighbour too, with weight zero
    assert labels[read].eq(2).all()
    assert torch.equal(labels[~read], clean[~read])


@pytest.mark.parametrize("name", BACKENDS)
def test_k12_an_empty_batch_gives_no_labels(name):
    with backend(name):
        assert upsample_argmax([torch.zeros(0, 3, 2, 2)], (4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize("name", BACKENDS)
def test_k8_strides_and_offsets(name):
    (wide,) = random_maps((2, 5), [(6, 8)])
    for view in (
        lambda x: x[:, 1:4],
        lambda x: x[:, ::2, 1::2, ::3],
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, :1, :1].expand(2, 5, 3, 4),
    ):
        check(name, [view(wide), view(wide + 1).clone()], (5, 6))


@pytest.mark.parametrize("rows", [1, 3])
def test_bands_of_rows_join(rows, monkeypatch):
    monkeypatch.setattr(operator_module, "BAND_ELEMENTS", rows * 4 * 13)
    check("torch", random_maps((2, 4), [(2, 3), (9, 6)]), (10, 13))


@pytest.mark.parametrize("name", BACKENDS)
def test_sums_are_not_rounded_to_the_maps_type(name):
    """1 + 1/512 is no bfloat16: rounded sums would tie, and the first class would win."""
    first, second = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1 / 512])
    maps = [values.bfloat16().view(1, 2, 1, 1) for values in (first, second)]
    with backend(name):
        assert upsample_argmax(maps, (1, 1)).item() == 1


def test_k3_float64_is_computed_in_float64():
    maps = [torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64).view(1, 2, 1, 1)]
    assert upsample_argmax(maps, (3, 2)).eq(1).all()
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        upsample_argmax(maps, (3, 2))


def test_no_map_of_all_classes_at_full_resolution():
    """The labels, and bands of a quarter of a MiB: not 16 MiB for each map."""
    maps = random_maps((2, 8), [(16, 16), (32, 32)])
    used = peak_memory_bytes(lambda: upsample_argmax(maps, (512, 512)))
    assert used <= 2 * 512 * 512 + 5 * 4 * operator_module.BAND_ELEMENTS


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
def test_opcheck():
    maps = random_maps((2, 3), [(2, 3), (4, 5)])
    torch.library.opcheck(torch.ops.trifuse.upsample_argmax.default, (maps, [5, 6]))


@pytest.mark.parametrize("name", BACKENDS)
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for height in (5, 6, 9):
            maps = random_maps((2, 3), [(height, 3), (4, 4)])
            labels = compiled(maps, (height + 1, 7))
            assert torch.equal(labels, upsample_argmax_reference(maps, (height + 1, 7)))


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    for dtype in (torch.bfloat16, torch.float64):
        labels = upsample_argmax([torch.empty(2**12, 9, 64, 64, device="meta", dtype=dtype)], (2**10, 2**11))
        assert (labels.shape, labels.dtype, labels.device.type) == ((2**12, 2**10, 2**11), torch.uint8, "meta")
    with FakeTensorMode():
        assert upsample_argmax([torch.empty(2, 3, 4, 4)], (8, 6)).shape == (2, 8, 6)


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    def label(coarse, fine):
        return upsample_argmax([coarse, fine], (7, 9))

    sides = [(2, 3), (4, 5)]
    graph = make_fx(label, tracing_mode=mode)(*random_maps((2, 3), sides))
    maps = random_maps((2, 3), sides, seed=1)
    assert torch.equal(graph(*maps), upsample_argmax_reference(maps, (7, 9)))


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_vmap(name):
    (logits,) = random_maps((2, 3), [(4, 5)])
    many = torch.stack([logits, -logits])
    with backend(name):
        mapped = torch.vmap(lambda x: upsample_argmax([x], (6, 7)))(many)
    assert torch.equal(mapped, torch.stack([upsample_argmax_reference([each], (6, 7)) for each in many]))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k24_nothing_is_saved_or_differentiated(name):
    saved = []
    maps = [m.requires_grad_() for m in random_maps((1, 3), [(2, 3), (3, 3)])]
    before = copy.deepcopy(maps)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None), backend(name):
        labels = upsample_argmax(maps, (5, 6))
    assert (saved, labels.requires_grad) == ([], False)
    assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    maps = random_maps((1, 5), [(4, 4), (7, 7)])
    with backend(name):
        plain = upsample_argmax(maps, (9, 9))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(upsample_argmax(maps, (9, 9)), plain)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    with pytest.raises(TypeError, match=r"upsample_argmax: logits\[0\] is torch\..*expected one of float32"):
        upsample_argmax([torch.zeros(1, 2, 3, 3).to(bad)], (4, 4))


def test_k1_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"logits\[1\] is a numpy\.ndarray; expected a torch\.Tensor"):
        upsample_argmax([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).numpy()], (4, 4))


def test_k2_mixed_types_are_refused():
    with pytest.raises(TypeError, match=r"logits\[1\] is torch\.float16; expected torch\.float32"):
        upsample_argmax([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).half()], (4, 4))


@pytest.mark.parametrize(
    ("logits", "size", "message"),
    [
        (torch.zeros(1, 2, 3, 3), (4, 4), r"logits is one tensor.*pass \[logits\]"),
        ([], (4, 4), "logits is empty"),
        ([torch.zeros(2, 3, 3)], (4, 4), r"logits\[0\] has shape \(2, 3, 3\); expected \(B, K, h, w\)"),
        ([torch.zeros(1, 0, 3, 3)], (4, 4), "at least one class, row and column"),
        ([torch.zeros(1, 2, 0, 3)], (4, 4), "at least one class, row and column"),
        ([torch.zeros(1, 2, 3, 0)], (4, 4), "at least one class, row and column"),
        (
            [torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3)],
            (4, 4),
            r"expected the batch and the classes of logits\[0\]",
        ),
        ([torch.zeros(1, 257, 1, 1)], (4, 4), "257 classes; expected at most 256"),
        ([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, device="meta")], (4, 4), r"logits\[1\] on meta"),
        ([torch.zeros(1, 2, 3, 3)], (4, 0), r"size is \(4, 0\); expected \(height, width\)"),
        ([torch.zeros(1, 2, 3, 3)], (0, 4), r"size is \(0, 4\)"),
        ([torch.zeros(1, 2, 3, 3)], (4, 4, 4), r"size is \(4, 4, 4\)"),
    ],
)
def test_k5_refuses_what_does_not_fit(logits, size, message):
    with pytest.raises(ShapeError, match=message):
        upsample_argmax(logits, size)
