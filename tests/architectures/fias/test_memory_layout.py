"""In which memory layout FIAS computes: channels innermost from its image to its heads, forward and backward."""

from __future__ import annotations

import pytest
import torch

from trifuse.architectures.fias import fias
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.benchmarks.reporting.network_calls import Dense, Recorder, is_channels_last
from trifuse.blocks.conv_norm_relu import ConvNormReLU
from trifuse.kernels import mutation_loss

THIN = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
OF_MAPS = ("channel_gate", "depthwise_multi_kernel", "monte_carlo_pool", "spatial_gate")


@pytest.mark.parametrize("adapter", ["conv", "merit", "repeat"])
def test_every_operator_of_a_training_step_gets_channels_innermost(adapter):
    with torch.device("meta"):
        model = fias(num_classes=9, input_adapter=adapter).train()
        image, target = torch.empty(2, 1, 256, 256), torch.empty(2, 256, 256, dtype=torch.int64)
    with Recorder() as recorder:
        logits = model(image)
        mutation_loss(logits, target).backward()
    seen = [
        (call.operator, map)
        for call in recorder.calls
        for map in call.arguments
        if call.operator.startswith(OF_MAPS) and isinstance(map, Dense) and len(map.shape) == 4 and map.shape[1] > 1
    ]
    assert {name for name, _ in seen} == {
        "channel_gate",
        "channel_gate_backward",
        "depthwise_multi_kernel",
        "depthwise_multi_kernel_input_gradient",
        "depthwise_multi_kernel_weight_gradients",
        "monte_carlo_pool",
        "spatial_gate",
        "spatial_gate_backward",
    }
    assert [(name, x) for name, x in seen if not is_channels_last(x)] == []
    assert all(x.is_contiguous() for x in logits)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("adapter", ["conv", "merit", "repeat"])
def test_convolutions_run_channels_last_where_the_norm_keeps_it(adapter, norm):
    model = fias(variant=THIN, decoder_heads=(4, 4, 4, 2), num_classes=4, input_adapter=adapter, norm=norm)
    found = []
    for name, layer in [*model.local_encoder.named_modules(), *model.decoder.named_modules()]:
        if isinstance(layer, ConvNormReLU):
            layer.register_forward_pre_hook(lambda _, maps, name=name: found.append((name, is_channels_last(maps[0]))))
    maps = model(torch.randn(2, 1, 64, 64))
    elsewhere = [name for name, innermost in found if not innermost]
    assert (elsewhere == []) == (norm == "batch"), elsewhere
    sum(logits.sum() for logits in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad is None or parameter.grad.is_contiguous(), name
