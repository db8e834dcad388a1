"""Dice and cross-entropy straight from the maps: the definition's values and gradients, in few launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.kernels import backend, dice_ce_loss, mutation_loss
from trifuse.kernels.ops._segmentation_loss import segmentation_loss
from trifuse.kernels.ops._segmentation_sums import dice_ce, segmentation_sums
from trifuse.kernels.testing import launches, poisoned_empty

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
pytestmark = interpreted


def random_arguments(samples, classes, sizes, full):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(samples, classes, *size, generator=generator).requires_grad_() for size in sizes]
    return maps, torch.randint(0, max(classes, 2), (samples, *full), generator=generator)


def by_definition(maps, target, *, flavour, ignore_index=None, **options):
    sums = segmentation_sums(maps, target, squared=flavour == "transunet", ignore_index=ignore_index)
    return dice_ce(sums, flavour=flavour, **options)


@pytest.mark.parametrize("flavour", ["nnunet", "transunet"])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize(
    ("samples", "classes", "weight"),
    [
        (2, 3, None),
        (3, 1, (1.0, 0.0, 1.0)),
        (2, 5, (0.0, 0.0)),  # nothing counts
        (35, 2, tuple(i % 3 for i in range(70))[::2]),  # more samples than are read at once, integers
    ],
)
def test_losses_and_gradients_are_those_of_the_definition(flavour, batch_dice, samples, classes, weight):
    maps, target = random_arguments(samples, classes, [(2, 3), (1, 2)], (2, 3))
    weight = None if weight is None else torch.tensor([*weight, *weight])[::2][:samples]
    if weight is not None:
        weight = torch.stack([weight, weight], 1)[:, 0]  # not contiguous
    options = {"flavour": flavour, "batch_dice": batch_dice, "w_ce": 0.7, "w_dice": 1.3, "sample_weight": weight}
    expected = by_definition(maps, target, ignore_index=1, **options)
    direction = torch.tensor([0.5, -1.0, 2.0])
    with backend("triton"), poisoned_empty():
        losses = segmentation_loss(maps, target, ignore_index=1, **options)
        grads = torch.autograd.grad(losses, maps, direction)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, maps, direction), rtol=2e-5, atol=1e-7)


def test_sums_of_many_programs_are_added_up():
    """More programs than are added up at once, and more sums than fit beside each other."""
    maps, target = random_arguments(1, 5, [(300, 1), (200, 2)], (600, 2))
    with backend("torch"):
        expected = segmentation_sums(maps, target, squared=True)
    with backend("triton"), poisoned_empty():
        sums = segmentation_sums(maps, target, squared=True)
    torch.testing.assert_close(sums, expected)


def test_weights_that_are_trained_get_their_gradient():
    maps, target = random_arguments(2, 3, [(2, 3)], (2, 3))
    weight = torch.ones(2, requires_grad=True)
    with backend("triton"):
        loss = SegmentationLoss()(maps, {"target": target, "sample_weight": weight}, None)
    assert torch.autograd.grad(loss, weight)[0].abs().sum() > 0


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that compute something: no views, and no memory that is only asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        own = func.namespace == "trifuse" or "empty" in func.__name__ or func is torch.ops.aten.detach.default
        checked = func in (torch.ops.aten.aminmax.default, torch.ops.aten._local_scalar_dense.default)
        if not (view or own or checked or func.overloadpacket in (torch.ops.aten.ge, torch.ops.aten.lt)):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def launched_by(loss) -> tuple[int, int]:
    """Return how much a GPU would launch for a loss, and for its gradient from a given gradient of the loss."""
    ones = torch.ones(())
    with backend("triton"):
        loss()  # builds, once, what the gradient needs
        with Operations() as operations, launches() as counted:
            result = loss()
        forward = len(operations.names) + counted.kernels.total()
        with Operations() as operations, launches() as counted:
            result.backward(ones)
    return forward, len(operations.names) + counted.kernels.total()


@pytest.mark.parametrize("flavour", ["nnunet", "transunet"])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_a_loss_takes_three_launches_and_its_gradient_two(flavour, batch_dice):
    (logits,), target = random_arguments(1, 3, [(4, 4)], (4, 4))
    options = {"flavour": flavour, "batch_dice": batch_dice}
    assert launched_by(lambda: dice_ce_loss(logits, target, **options)) == (3, 2)


def test_the_loss_over_all_subsets_takes_one_more():
    maps, target = random_arguments(1, 3, [(4, 4)] * 3, (4, 4))
    assert launched_by(lambda: mutation_loss(maps, target)) == (4, 2)


def test_gradients_of_coarse_maps_take_one_launch_more_however_many_there_are():
    maps, target = random_arguments(1, 3, [(4, 4), (2, 3), (1, 2)], (4, 4))
    assert launched_by(lambda: mutation_loss(maps, target)) == (4, 3)


def test_deep_supervision_takes_four_launches_and_two_however_many_outputs_there_are():
    """Targets of the coarser outputs are views."""
    for sides in ((8, 4, 2), (16, 8, 4, 2, 1)):
        maps, target = random_arguments(2, 3, [(side, side) for side in sides], sides[:1] * 2)
        batch = {"target": target, "sample_weight": torch.ones(2)}
        assert launched_by(lambda maps=maps, batch=batch: SegmentationLoss()(maps, batch, None)) == (4, 2)
