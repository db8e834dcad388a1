"""The loss over all subsets: published numbers, the naive sum, coarse maps, far maps, and every refusal."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from golden_numbers import fixture_names, load_fixture, relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from trifuse.kernels import BackendError, ShapeError, backend, dice_ce_loss, mutation_loss, mutation_loss_reference
from trifuse.kernels.cpu import segmentation_sums as cpu
from trifuse.kernels.ops._segmentation_sums import dice_ce, segmentation_sums
from trifuse.kernels.testing import assert_op_matches, peak_memory_bytes, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_arguments(samples, classes, sizes, full, *, scale=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [(scale * torch.randn(samples, classes, *size, generator=generator)).to(dtype) for size in sizes]
    return [m.requires_grad_() for m in maps], torch.randint(0, classes, (samples, *full), generator=generator)


def check(name, maps, target, **options):
    with backend(name):
        assert_op_matches(mutation_loss, mutation_loss_reference, maps, target, atol=4e-6, **options)


def naive(maps, target, gamma=0.4):
    """Every subset written out, in the order of itertools."""
    full = [F.interpolate(m, target.shape[1:], mode="bilinear", align_corners=False) for m in maps]
    truth = F.one_hot(target, maps[0].shape[1]).movedim(-1, 1)
    total = 0
    for size in range(1, len(maps) + 1):
        for subset in combinations(full, size):
            p = sum(subset).softmax(1)
            squares = (p**2).sum((0, 2, 3)) + (truth**2).sum((0, 2, 3))
            dice = (2 * (p * truth).sum((0, 2, 3)) + 1e-5) / (squares + 1e-5)
            total = total + gamma * (1 - dice).mean() + (1 - gamma) * F.cross_entropy(sum(subset), target)
    return total


@pytest.mark.parametrize("name", BACKENDS)
def test_what_lies_beside_coarse_maps_in_memory_is_not_read(name):
    """Their last row and column have no neighbour, not even one of weight 0: what lies there may be NaN."""
    (coarse,), target = random_arguments(1, 3, [(3, 4)], (6, 9))
    around = torch.full((1, 3, 5, 6), torch.nan)
    around[..., 1:4, 1:5] = coarse.detach()
    view = around[..., 1:4, 1:5].requires_grad_()
    with backend(name):
        losses = [mutation_loss([maps], target) for maps in (coarse, view)]
        gradients = [torch.autograd.grad(loss, maps)[0] for loss, maps in zip(losses, (coarse, view), strict=True)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("fixture", [name for name in fixture_names("losses") if "mutation_n" in name])
def test_golden_mutation(name, fixture):
    fixture = load_fixture(fixture)
    weights = fixture.facts["constructor"]
    for dtype in (torch.float32,) if name == "triton" else (torch.float32, torch.float64):
        maps = [fixture.tensors[f"map{i}"].to(dtype, copy=True).requires_grad_() for i in range(weights["n_maps"])]
        with backend(name):
            loss = mutation_loss(maps, fixture.tensors["labels"], gamma=weights["weight_dice"])
        loss.backward()
        bound = 1e-9 if dtype == torch.float64 else 2e-6
        assert relative_l2(loss, fixture.tensors["loss"].squeeze()) < bound
        assert max(relative_l2(m.grad, fixture.tensors[f"dmap{i}"]) for i, m in enumerate(maps)) < bound


def test_golden_subsets_have_their_places():
    """Upstream lists the same subsets in another order; each has its own cross-entropy and Dice."""
    fixture = load_fixture("losses/mutation_n3_w0.6_0.4")
    maps, target = [fixture.tensors[f"map{i}"].double() for i in range(3)], fixture.tensors["labels"]
    sums = segmentation_sums(maps, target, squared=True)
    for i, subset in enumerate(fixture.facts["subsets"]):
        place = sum(2**member for member in subset) - 1
        torch.testing.assert_close(sums.nll[:, place].sum() / target.numel(), fixture.tensors["subset_ce"][i])
    order = load_fixture("losses/mutation_powerset_order").facts["order"]
    for n in (1, 2, 3, 4):
        places = sorted(sum(2**member for member in subset) for subset in order[str(n)] if subset)
        assert places == list(range(1, 2**n))


@pytest.mark.parametrize("op", [mutation_loss, mutation_loss_reference])
def test_gradient_is_that_of_the_naive_sum_in_float64(op):
    for sizes in ([(6, 5)] * 3, [(2, 3), (4, 5), (6, 5)]):
        maps, target = random_arguments(2, 4, sizes, (6, 5), dtype=torch.float64)
        got = torch.autograd.grad(op(maps, target), maps)
        expected = torch.autograd.grad(naive(maps, target), maps)
        torch.testing.assert_close(op(maps, target), naive(maps, target), rtol=1e-12, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("classes", "sizes", "full"),
    [
        (3, [(3, 4)], (3, 4)),
        (2, [(1, 1), (3, 5)], (3, 5)),
        (4, [(3, 4)] * 3, (3, 4)),
        (2, [(3, 2), (2, 4), (1, 3)], (5, 4)),
        (2, [(2, 3)] * 4, (2, 3)),
        (2, [(7, 3)], (18, 5)),  # two strips of rows share coarse rows
        (2, [(2, 60)], (2, 140)),  # three tiles share coarse columns
        (2, [(5, 2), (3, 2), (2, 1)], (70, 3)),  # three strips of rows, and further coarse rows in each
        (9, [(2, 1)] * 3, (2, 1)),  # more sums than a program has registers for
        (9, [(1, 1), (2, 1), (1, 1)], (2, 1)),  # of coarse maps these take two launches
        (9, [(1, 1)] * 4, (2, 1)),  # and of four maps two programs in each
    ],
    ids=str,
)
def test_b15_one_to_four_maps_at_any_size(name, classes, sizes, full):
    check(name, *random_arguments(1, classes, sizes, full))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"subsets": "deep_supervision", "reduction": "mean"},
        {"subsets": "last", "gamma": 0.7},
        {"reduction": "mean", "ignore_index": 1},
    ],
    ids=str,
)
def test_options(name, options):
    maps, target = random_arguments(2, 3, [(2, 2), (3, 2)], (3, 4))
    check(name, maps, target, **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("coarse", [False, True])
def test_maps_that_disagree_by_more_than_an_exponential_can_hold(name, coarse):
    """One map is sure of class 0, the other of class 1, by 200: every product of exponentials is zero."""
    maps = [torch.zeros(1, 3, 2, 2) for _ in range(2)]
    maps[0][:, 0], maps[1][:, 1] = 200.0, 199.0
    maps[0][:, :, 0, 0] = 0.0  # not everywhere
    target = torch.tensor([0, 1, 2, 0]).view(1, 2, 2)
    if coarse:
        target = target.repeat_interleave(9, 1).repeat_interleave(2, 2)  # far in the first program, not in all
    check(name, [m.requires_grad_() for m in maps], target)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=8)
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    n, samples = data.draw(st.integers(1, 3), label="n"), data.draw(st.integers(0, 2), label="B")
    size = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 4)), label="(H, W)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    maps = []
    for i in range(n):
        coarse = tuple(data.draw(st.integers(1, side)) for side in size) if all(size) else size
        maps.append(data.draw(tensors((samples, 2, *coarse), dtypes=(dtype,), expanded=True), label=f"map {i}"))
    target = torch.randint(0, 2, (samples, *size), generator=torch.Generator().manual_seed(0))
    # A gradient may be stored in bfloat16, whose last bits the interpreter cuts off instead of rounding.
    atol = 4e-6 if dtype == torch.float32 else 4e-2
    with backend(name):
        assert_op_matches(mutation_loss, mutation_loss_reference, maps, target, atol=atol)


@pytest.mark.parametrize("name", BACKENDS)
def test_k35_class_outside_is_refused_on_a_cpu_and_nan_in_a_kernel(name):
    maps, target = random_arguments(1, 3, [(3, 4)] * 2, (3, 4))
    for wrong in (3, -1, 2**40, -(2**40)):
        target[0, 1, 2] = wrong
        with pytest.raises(ValueError, match="classes 0 to 2 in the target"):
            mutation_loss(maps, target)
        if name == "triton":  # behind the check, as on a GPU
            sums, _ = torch.ops.trifuse.segmentation_sums(maps, target, True, None)
            assert sums[..., -1].isnan().all()
            grads = torch.autograd.grad(sums[..., -1].nan_to_num().sum(), maps)
            assert all(grad[0, :, 1, 2].isnan().all() and grad.isnan().sum() == 3 for grad in grads)
        else:
            loss = torch.compile(mutation_loss, backend="eager", fullgraph=True)(maps, target)
            assert loss.isnan()
    target[0, 1, 2] = 255
    with backend(name):
        assert mutation_loss(maps, target, ignore_index=255).isfinite()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("classes", [3, 17])  # of 17, the sums of two maps are those of two programs
def test_k19_nan_stays_in_the_sums_of_its_sample_and_map(name, classes):
    maps, target = random_arguments(2, classes, [(3, 4)] * 2, (3, 4))
    maps[1].data[1, 2, 1, 2] = float("nan")
    for ignored in (None, int(target[1, 1, 2])):
        with backend(name):
            sums = segmentation_sums(maps, target, squared=True, ignore_index=ignored)
            loss = mutation_loss(maps, target, ignore_index=ignored)
        for part in (sums.intersection, sums.predicted, sums.nll):
            assert part[0].isfinite().all()
            assert part[1, 0].isfinite().all()  # the subset of the first map alone
        assert sums.predicted[1, 1:].isnan().all()
        assert sums.true.isfinite().all()
        assert loss.isnan()
    with backend(name):
        grads = torch.autograd.grad(segmentation_sums(maps, target, squared=True).nll.sum(), maps)
    assert all(grad[1, :, 1, 2].isnan().all() and grad.isnan().sum() == classes for grad in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_logits_of_many_classes_along_many_rows(name):
    """32 exponentials of 1 add up to 32, and 32 of these sums, multiplied, to what float32 does not hold."""
    maps, target = [torch.zeros(1, 32, 33, 64)], torch.zeros(1, 33, 64, dtype=torch.int64)
    with backend(name):
        sums = segmentation_sums(maps, target, squared=True)
    torch.testing.assert_close(sums.nll, torch.tensor([[33 * 64 * math.log(32)]]))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["torch", "reference", "compiled"])
def test_k19_nan_of_one_sample_does_not_hide_that_the_maps_of_another_disagree(name, trained):
    maps = [torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)]
    maps[0][1, 0] = maps[1][1, 1] = 200.0
    maps[0][0, 0, 0, 0] = float("nan")
    maps = [m.requires_grad_(trained) for m in maps]
    target = torch.zeros(2, 2, 2, dtype=torch.int64)
    compute = partial(segmentation_sums, squared=True)
    if name == "compiled":
        sums = torch.compile(compute, backend="aot_eager", fullgraph=True)(maps, target)
    else:
        with backend(name):
            sums = compute(maps, target)
    assert sums.intersection[1].isfinite().all()
    assert sums.nll[1].tolist() == pytest.approx([0.0, 800.0, 4 * math.log(2.0)])


@pytest.mark.parametrize("loss", [mutation_loss, dice_ce_loss])
def test_k26_samples_with_their_targets_are_mapped(loss):
    logits, target = torch.randn(3, 2, 4, 5, 5), torch.randint(4, (3, 2, 5, 5))
    call = (lambda x, t: loss([x], t)) if loss is mutation_loss else loss
    one_by_one = torch.stack([call(x, t) for x, t in zip(logits, target, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(logits, target), one_by_one)


def test_no_weight_at_all_is_no_loss():
    maps, target = random_arguments(1, 3, [(3, 4)], (3, 4))
    sums = segmentation_sums(maps, target, squared=False)
    options = {"flavour": "nnunet", "w_ce": 1.0, "w_dice": 1.0, "sample_weight": torch.zeros(1)}
    assert dice_ce(sums, batch_dice=False, **options).item() == 0.0


def test_maps_without_classes_are_refused():
    with pytest.raises(ShapeError, match="at least one class"):
        mutation_loss([torch.randn(2, 0, 4, 4)], torch.zeros(2, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", BACKENDS)
def test_k24_saves_the_arguments_and_small_sums(name):
    maps, target = random_arguments(2, 3, [(8, 8), (16, 16)], (16, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None), backend(name):
        with torch.no_grad():
            mutation_loss(maps, target)
        assert saved == []
        mutation_loss(maps, target)
    assert {t.data_ptr() for t in saved if t.numel() > 100} == {t.data_ptr() for t in (*maps, target)}


@pytest.mark.parametrize("name", BACKENDS)
def test_results_repeat_bit_for_bit(name):
    def run():
        maps, target = random_arguments(1, 2, [(3, 3), (17, 2)], (17, 5))
        with backend(name):
            loss = mutation_loss(maps, target)
        return loss, *torch.autograd.grad(loss, maps)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_chunks_of_samples_and_of_rows(monkeypatch):
    for elements in (1, 300, 2000):
        monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", elements)
        check("torch", *random_arguments(3, 3, [(9, 5), (4, 2), (2, 5)], (9, 5)))


def test_no_map_at_full_size_is_held():
    maps, target = random_arguments(1, 9, [(16, 16), (32, 32)], (512, 512))
    full_bytes = 4 * 9 * target.numel()
    assert peak_memory_bytes(lambda: mutation_loss(maps, target).backward()) < 2.5 * full_bytes


@pytest.mark.parametrize("name", [BACKENDS[0], pytest.param("torch", marks=pytest.mark.slow)])
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(mutation_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for side, scale in ((4, 1.0), (6, 90.0)):
        maps, target = random_arguments(2, 3, [(2, 3), (side, side)], (side, side), scale=scale)
        with backend(name):
            got = torch.autograd.grad(compiled(maps, target), maps)
        torch.testing.assert_close(got, torch.autograd.grad(mutation_loss_reference(maps, target), maps))


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    meta = [torch.empty(2**10, 2**8, 2**7, 2**7, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    loss = mutation_loss(meta, torch.empty(2**10, 2**9, 2**9, device="meta", dtype=torch.int64))
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    with FakeTensorMode():
        maps, target = [torch.empty(2, 3, 4, 4, requires_grad=True)] * 2, torch.empty(2, 8, 8, dtype=torch.int64)
        mutation_loss(maps, target).backward()
        assert maps[0].grad.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_functional_transforms(name):
    (first, second), target = random_arguments(2, 3, [(2, 2), (4, 4)], (4, 4))
    with backend(name):
        pulled = torch.func.grad(lambda x: mutation_loss([x, second.detach()], target))(first.detach())
        pushed = torch.func.jvp(
            lambda x: mutation_loss([x, second.detach()], target), (first.detach(),), (torch.ones_like(first),)
        )[1]
    (expected,) = torch.autograd.grad(mutation_loss_reference([first, second], target), first)
    torch.testing.assert_close(pulled, expected)
    torch.testing.assert_close(pushed, expected.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    maps, target = random_arguments(1, 2, [(2, 2)], (2, 2))
    with backend(name):
        (first,) = torch.autograd.grad(mutation_loss(maps, target), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
def test_opcheck():
    maps, target = random_arguments(1, 2, [(2, 2), (1, 2)], (2, 2))
    torch.library.opcheck(torch.ops.trifuse.segmentation_sums.default, (maps, target, True, None))
    frozen = [m.detach() for m in maps]
    torch.library.opcheck(
        torch.ops.trifuse.segmentation_sums_backward.default,
        (torch.ones(1, 3, 5), frozen, target, True, 1, [True, False]),
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_k25_autocast_changes_nothing(name):
    maps, target = random_arguments(1, 3, [(2, 2), (4, 4)], (4, 4))
    with backend(name):
        plain = mutation_loss(maps, target)
        grads = torch.autograd.grad(plain, maps)
        with torch.autocast("cpu", torch.bfloat16):
            again = mutation_loss(maps, target)
            assert torch.equal(again, plain)
            assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, maps), grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps, target: (maps, target[:, :3]), r"logits\[1\] is \(4, 4\); expected at most"),
        (lambda maps, target: ([m.repeat(2, 1, 1, 1) for m in maps], target), "expected a target"),
        (lambda maps, target: ([m.long() for m in maps], target), r"logits\[0\] is torch.int64; expected one of"),
        (lambda maps, target: ([maps[0], maps[1].double()], target), r"logits\[1\] is torch.float64"),
        (lambda maps, target: (maps, target.to("meta")), "target on meta"),
        (lambda maps, target: (maps, target.int()), "type torch.int64"),
    ],
)
def test_what_fits_is_remembered_and_nothing_else(change, message):
    """What differs in one thing from arguments that fitted is refused."""
    arguments = random_arguments(1, 3, [(2, 2), (4, 4)], (4, 4))
    for _ in range(2):
        mutation_loss(*arguments)
        with pytest.raises((ShapeError, TypeError), match=message):
            mutation_loss(*change(*arguments))


def test_rejects():
    maps, target = random_arguments(1, 3, [(2, 2), (4, 4)], (4, 4))
    for wrong, message in (([], "1 to 5 .*, got 0"), ([maps[1]] * 6, "got 6"), (maps[1], r"sequence .* \[logits\]$")):
        with pytest.raises(ShapeError, match=message):
            mutation_loss(wrong, target)
    with pytest.raises(ValueError, match=r"subsets: expected one of .*, got 'all'"):
        mutation_loss(maps, target, subsets="all")
    with pytest.raises(ValueError, match=r"reduction: expected one of .*, got 'none'"):
        mutation_loss(maps, target, reduction="none")
    with pytest.raises(ShapeError, match=r"logits\[1\] has shape \(1, 2, 4, 4\)"):
        mutation_loss([maps[0], maps[1][:, :2]], target)
    with pytest.raises(TypeError, match=r"logits\[1\] is torch.float16; expected torch.float32"):
        mutation_loss([maps[0], maps[1].half()], target)
    with pytest.raises(ShapeError, match=r"logits\[1\] is \(4, 4\); expected at most the target's size \(3, 3\)"):
        mutation_loss(maps, target[:, :3, :3])
    with pytest.raises(ShapeError, match="on one device"):
        mutation_loss(maps, target.to("meta"))
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        mutation_loss([m.double() for m in maps], target)
