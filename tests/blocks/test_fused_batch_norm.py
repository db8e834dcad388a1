"""A batch norm and its activation, computed at once, are what they are in turn, whatever is done to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trifuse.blocks import ConvNormReLU
from trifuse.blocks.normalization import BatchNorm
from trifuse.blocks.plain_layers import NormGeluSequential
from trifuse.kernels import ShapeError, backend
from trifuse.kernels.testing import launches


def rectified() -> ConvNormReLU:
    return ConvNormReLU(2, 3).double()


def gelus() -> NormGeluSequential:
    layers = [nn.Conv2d(2, 3, 3), BatchNorm(3), nn.GELU(), nn.Conv2d(3, 3, 1), BatchNorm(3)]
    return NormGeluSequential(*layers).double()


def norm_of(block: nn.Module) -> BatchNorm:
    return next(module for module in block.modules() if isinstance(module, BatchNorm))


def in_turn(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layers give one after the other."""
    if isinstance(block, ConvNormReLU):
        return torch.relu(nn.BatchNorm2d.forward(block.norm, block.conv(x)))
    return nn.Sequential.forward(block, x)


every_block = pytest.mark.parametrize("make", [rectified, gelus])


@every_block
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_steps_and_evaluation_are_those_of_the_layers(make, momentum, tracks):
    """Values, gradients, running statistics and the number of batches; the state has the same names."""
    torch.manual_seed(0)
    fused = make()
    for norm in (module for module in fused.modules() if isinstance(module, BatchNorm)):
        norm.momentum, norm.track_running_stats = momentum, tracks
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    apart = copy.deepcopy(fused)
    for _ in range(3):
        x = torch.randn(3, 2, 6, 7, dtype=torch.float64) + 1
        results = fused(x), in_turn(apart, x)
        torch.testing.assert_close(*results)
        for result in results:
            result.square().sum().backward()
    torch.testing.assert_close(fused.state_dict(), apart.state_dict())
    torch.testing.assert_close(*([p.grad for p in block.parameters()] for block in (fused, apart)))
    assert norm_of(fused).num_batches_tracked == (3 if tracks else 0)
    torch.testing.assert_close(fused.eval()(x), in_turn(apart.eval(), x))


def doubled_by_a_hook(block: nn.Module) -> None:
    norm_of(block).register_forward_hook(lambda norm, given, result: 2 * result)


def doubled_by_its_forward(block: nn.Module) -> None:
    norm, forward = norm_of(block), norm_of(block).forward
    norm.forward = lambda x: 2 * forward(x)


class Doubled(nn.Module):
    """Stands in a norm's place."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 2 * self.norm(x)


class DoublingNorm(BatchNorm):
    """A norm of a class of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


def doubled_in_its_place(block: nn.Module) -> None:
    replace(block, Doubled(norm_of(block)))


def doubled_by_its_class(block: nn.Module) -> None:
    norm_of(block).__class__ = DoublingNorm


def replace(block: nn.Module, norm: nn.Module) -> None:
    if isinstance(block, ConvNormReLU):
        block.norm = norm
    else:
        block[1] = norm


@every_block
@pytest.mark.parametrize(
    "change", [doubled_by_a_hook, doubled_by_its_forward, doubled_in_its_place, doubled_by_its_class]
)
def test_b16_what_is_done_to_a_norm_acts_before_the_activation(make, change):
    block = make()
    changed = copy.deepcopy(block)
    with torch.no_grad():
        norm_of(block).weight.mul_(2)
        norm_of(block).bias.mul_(2)
    change(changed)
    x = torch.randn(3, 2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(changed(x), block(x))


@pytest.mark.parametrize("change", ["hook", "forward", "place", "approximate"])
def test_b16_what_is_done_to_a_gelu_acts(change):
    block = gelus()
    x = torch.randn(3, 2, 6, 7, dtype=torch.float64)
    plain = block(x)
    if change == "hook":
        block[2].register_forward_hook(lambda layer, given, result: 2 * result)
    elif change == "forward":
        block[2].forward = lambda x: 2 * F.gelu(x)
    elif change == "place":
        block[2] = nn.SiLU()
    else:
        block[2] = nn.GELU(approximate="tanh")
    assert not torch.allclose(block(x), plain, rtol=1e-8, atol=0)


@every_block
def test_a_synchronised_norm_is_called(make):
    """`SyncBatchNorm` shares statistics among ranks, which no operator here does: a network keeps it."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    called = []
    (norm, *_) = [module for module in block.modules() if isinstance(module, nn.SyncBatchNorm)]
    norm.register_forward_hook(lambda *_: called.append(True))
    block.eval()(torch.randn(3, 2, 6, 7, dtype=torch.float64))
    assert called


@every_block
def test_b7_a_single_value_per_channel_is_refused_with_a_remedy(make):
    block = make()
    size = 1 if isinstance(block, ConvNormReLU) else 3
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"more than one value per channel, got shape \(1, 3, 1, 1\).*norm='group'"):
        block(x)
    assert block.eval()(x).isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
@every_block
def test_a_plain_norm_and_its_activation_are_one_launch(make):
    block, x = make().float(), torch.randn(2, 2, 6, 7)
    with backend("triton"), launches() as counted:
        block(x)
    assert counted.kernels == {"_small_maps_fwd_kernel": 1}
