"""In which memory layout FIAS computes: channels innermost from its image to its heads, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trifuse.architectures.fias import fias
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.blocks.conv_norm_relu import ConvNormReLU
from trifuse.kernels import mutation_loss

THIN = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
OF_MAPS = ("channel_gate", "depthwise_multi_kernel", "monte_carlo_pool", "spatial_gate")


def has_channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) != 1


class GpuLayouts(TorchDispatchMode):
    """Record the maps that each operator of trifuse is called with, while convolutions answer as a GPU's do.

    They keep the layout of their input; on the meta device PyTorch gives their results the other one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "aten::convolution" and has_channels_innermost(args[0]):
            return out.contiguous(memory_format=torch.channels_last)
        if name == "aten::convolution_backward" and has_channels_innermost(args[1]) and out[0] is not None:
            return out[0].contiguous(memory_format=torch.channels_last), *out[1:]
        if name.startswith(tuple(f"trifuse::{op}" for op in OF_MAPS)):
            maps = [x for x in args if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 1]
            self.maps += [(name.removeprefix("trifuse::"), x) for x in maps]
        return out


@pytest.mark.parametrize("adapter", ["conv", "merit", "repeat"])
def test_every_operator_of_a_training_step_gets_channels_innermost(adapter):
    with torch.device("meta"):
        model = fias(num_classes=9, input_adapter=adapter).train()
        image, target = torch.empty(2, 1, 256, 256), torch.empty(2, 256, 256, dtype=torch.int64)
    with GpuLayouts() as seen:
        logits = model(image)
        mutation_loss(logits, target).backward()
    assert {name for name, _ in seen.maps} == {
        "channel_gate",
        "channel_gate_backward",
        "depthwise_multi_kernel",
        "depthwise_multi_kernel_input_gradient",
        "depthwise_multi_kernel_weight_gradients",
        "monte_carlo_pool",
        "spatial_gate",
        "spatial_gate_backward",
    }
    assert [(name, x.shape, x.stride()) for name, x in seen.maps if not has_channels_innermost(x)] == []
    assert all(x.is_contiguous() for x in logits)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("adapter", ["conv", "merit", "repeat"])
def test_convolutions_run_channels_last_where_the_norm_keeps_it(adapter, norm):
    model = fias(variant=THIN, decoder_heads=(4, 4, 4, 2), num_classes=4, input_adapter=adapter, norm=norm)
    found = []
    for name, layer in [*model.local_encoder.named_modules(), *model.decoder.named_modules()]:
        if isinstance(layer, ConvNormReLU):
            layer.register_forward_pre_hook(
                lambda _, maps, name=name: found.append((name, has_channels_innermost(maps[0])))
            )
    maps = model(torch.randn(2, 1, 64, 64))
    elsewhere = [name for name, innermost in found if not innermost]
    assert (elsewhere == []) == (norm == "batch"), elsewhere
    sum(logits.sum() for logits in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad is None or parameter.grad.is_contiguous(), name
