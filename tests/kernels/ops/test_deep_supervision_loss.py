"""The loss of maps at several resolutions: one operator that gives the sum of each level's loss, and its gradients."""

from __future__ import annotations

import pytest
import torch
from golden_numbers import load_fixture, relative_l2
from ready_python import SUPPORT, run_with_compiler

from trifuse.architectures.training.losses import SegmentationLoss, deep_supervision_weights
from trifuse.kernels import backend
from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss
from trifuse.kernels.ops._segmentation_loss import segmentation_loss
from trifuse.kernels.testing import launches, poisoned_empty

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
FORMULA = {"batch_dice": True, "w_ce": 0.7, "w_dice": 1.3}
WHOLE = "_level_sums_kernel"


def random_levels(samples, classes, full, *sizes):
    """Return maps of some sizes, and a target for each: a view of that of the full size; the last one is a copy."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(samples, classes, *size, generator=generator).requires_grad_() for size in sizes]
    target = torch.randint(0, max(classes, 2), (samples, *full), generator=generator)
    *views, last = [target[:, :: full[0] // h, :: full[1] // w][:, :h, :w] for h, w in sizes]
    return maps, [*views, last.flip(1, 2)]


def by_definition(maps, targets, shares, *, w_ce, w_dice, **options):
    with backend("torch"):
        losses = [
            segmentation_loss([m], t, flavour="nnunet", w_ce=share * w_ce, w_dice=share * w_dice, **options)
            for m, t, share in zip(maps, targets, shares, strict=True)
        ]
    return torch.cat(losses).sum()


def assert_as_defined(maps, targets, shares, **options):
    """Compare the kernels' loss and gradients, of memory that nobody wrote before, with the definition's."""
    expected = by_definition(maps, targets, shares, **options)
    with backend("triton"), poisoned_empty(), launches() as counted:
        loss = deep_supervision_loss(maps, targets, shares, **options)
        grads = torch.autograd.grad(loss, maps, torch.tensor(-1.5))
    assert counted.kernels[WHOLE] == 1
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, maps, torch.tensor(-1.5)), rtol=2e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize(
    ("samples", "classes", "weight"), [(2, 3, None), (3, 1, (1.0, 0.0, 1.0)), (35, 2, tuple(range(35)))]
)
def test_loss_and_gradients_are_those_of_the_definition(batch_dice, samples, classes, weight):
    """Also of more samples than are read at once, of none that counts, and with classes that are ignored."""
    maps, targets = random_levels(samples, classes, (4, 6), (4, 6), (2, 3), (1, 3))
    weight = None if weight is None else torch.tensor(weight)
    options = {**FORMULA, "batch_dice": batch_dice, "sample_weight": weight, "ignore_index": 1}
    assert_as_defined(maps, targets, [0.5, 0.3, 0.2], **options)


@interpreted
def test_levels_of_several_programs():
    """Levels whose programs walk along a line of pixels, and down rows: of several tiles, and of several walks."""
    maps, targets = random_levels(2, 2, (132, 140), (132, 140), (66, 70), (3, 2), (40, 33))
    assert_as_defined(maps, targets, [1.0, 0.5, 2.0, 0.25], **FORMULA)


@interpreted
def test_maps_of_any_layout():
    maps, targets = random_levels(2, 3, (4, 6), (4, 6), (2, 3))
    maps[0] = maps[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    maps[1] = maps[1].detach().mT.contiguous().mT.requires_grad_()
    assert_as_defined(maps, targets, [0.6, 0.4], **FORMULA)


@pytest.mark.parametrize("name", BACKENDS)
def test_golden_deep_supervision(name):
    tensors = load_fixture("losses/nnunet_deep_supervision_4").tensors
    maps = [tensors[f"logits{i}"].float().requires_grad_() for i in range(3)]
    targets = [tensors[f"target{i}"].squeeze(1) for i in range(3)]
    shares = deep_supervision_weights(4)[:3]
    with backend(name):
        loss = deep_supervision_loss(maps, targets, shares, batch_dice=True, w_ce=1.0, w_dice=1.0)
    loss.backward()
    assert relative_l2(loss, tensors["loss"].squeeze()) < 2e-6
    for i, logits in enumerate(maps):
        assert relative_l2(logits.grad, tensors[f"dlogits{i}"]) < 2e-6


@interpreted
def test_a_level_that_needs_no_gradient_gets_none():
    maps, targets = random_levels(1, 2, (4, 4), (4, 4), (2, 2), (1, 1))
    maps[1] = maps[1].detach()
    expected = by_definition(maps, targets, [1.0, 0.5, 0.5], **FORMULA)
    with backend("triton"):
        loss = deep_supervision_loss(maps, targets, [1.0, 0.5, 0.5], **FORMULA)
    grads = [torch.autograd.grad(result, maps[::2]) for result in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize(
    "change",
    [
        lambda maps, targets: ([maps[0], maps[1].bfloat16()], targets, {}),
        lambda maps, targets: ([maps[0], maps[1][:, :2]], [t.clamp(max=1) for t in targets], {}),
        lambda maps, targets: ([maps[0], maps[1][:1]], [targets[0], targets[1][:1]], {}),
        lambda maps, targets: (maps, targets, {"reduce": torch.Tensor.clone}),
        lambda maps, targets: (maps, targets, {"sample_weight": torch.ones(2, requires_grad=True)}),
        lambda maps, targets: (maps[:1], targets[:1], {}),
    ],
    ids=["types", "classes", "samples", "ranks", "trained weights", "one level"],
)
def test_what_the_operator_does_not_take_is_the_sum_of_the_levels_losses(change):
    maps, targets, options = change(*random_levels(2, 3, (4, 4), (4, 4), (2, 2)))
    shares = [0.75, 0.25][: len(maps)]
    with backend("triton"), launches() as counted:
        loss = deep_supervision_loss(maps, targets, shares, **FORMULA, **options)
    assert counted.kernels[WHOLE] == 0
    torch.testing.assert_close(loss, by_definition(maps, targets, shares, **FORMULA), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_k20_a_nan_logit_spoils_the_gradients_of_its_level_and_sample(name):
    maps, targets = random_levels(2, 3, (4, 4), (4, 4), (2, 2))
    with torch.no_grad():
        maps[1][1, 0, 0, 0] = torch.nan
    with backend(name):
        loss = deep_supervision_loss(maps, targets, [0.75, 0.25], **FORMULA)
        first, second = torch.autograd.grad(loss, maps)
    assert loss.isnan()
    assert first.isfinite().all()
    assert second[1].isnan().any()


@interpreted
def test_a_class_that_does_not_exist_makes_the_loss_nan():
    maps, targets = random_levels(1, 3, (4, 4), (4, 4), (2, 2))
    targets[1] = targets[1].clone()
    targets[1][0, 1, 1] = 3
    with backend("triton"):
        assert deep_supervision_loss(maps, targets, [0.75, 0.25], **FORMULA).isnan()


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    maps, targets = random_levels(1, 2, (2, 2), (2, 2), (1, 1))
    with backend(name):
        loss = deep_supervision_loss(maps, targets, [0.75, 0.25], **FORMULA)
        first, _ = torch.autograd.grad(loss, maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_functional_transforms(name):
    (first, second), targets = random_levels(2, 3, (4, 4), (4, 4), (2, 2))
    expected = torch.autograd.grad(by_definition([first, second], targets, [0.75, 0.25], **FORMULA), first)[0]
    with backend(name):
        pulled = torch.func.grad(
            lambda x: deep_supervision_loss([x, second.detach()], targets, [0.75, 0.25], **FORMULA)
        )(first.detach())
    torch.testing.assert_close(pulled, expected)


@interpreted
def test_k27_compiles_to_one_graph_with_dynamic_shapes():
    torch._dynamo.reset()
    loss = SegmentationLoss()
    compiled = torch.compile(
        lambda maps, target: loss(maps, {"target": target}, None), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for side in (8, 12):
        maps, (target, *_) = random_levels(2, 3, (side, side), *((side // step, side // step) for step in (1, 2, 4)))
        with backend("triton"):
            got = torch.autograd.grad(compiled(maps, target), maps[:2])
        torch.testing.assert_close(got, torch.autograd.grad(loss(maps, {"target": target}, None), maps[:2]))


@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_whose_size_does_not_divide_the_target_s(name):
    """Their target is a copy, made by nearest neighbour."""
    maps, (target, *_) = random_levels(1, 3, (7, 6), (7, 6), (4, 3), (2, 2))
    with backend(name):
        loss = SegmentationLoss()(maps, {"target": target}, None)
    rows = torch.tensor([0, 1, 3, 5])
    targets = [target, target[:, rows][:, :, ::2]]
    torch.testing.assert_close(
        loss, by_definition(maps[:2], targets, [2 / 3, 1 / 3], batch_dice=True, w_ce=1.0, w_dice=1.0)
    )


def test_kernels_are_right_as_compiled():
    pytest.importorskip("triton", reason="the virtual GPU runs what triton compiles")
    child = run_with_compiler(SUPPORT / "virtual_gpu_levels.py")
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.splitlines() == [f"{dtype}: sound" for dtype in ("float32", "bfloat16", "float16")]
