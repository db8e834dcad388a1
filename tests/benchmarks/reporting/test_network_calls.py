"""A step's calls are traced as the network makes them."""

from __future__ import annotations

import pytest
import torch

from trifuse.benchmarks.reporting.network_calls import Call, Dense, Recorder, is_channels_last, trace
from trifuse.kernels import channel_gate


def test_a_call_is_recorded_with_shapes_strides_and_types_and_counted():
    x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    gate = torch.empty(2, 8, device="meta")
    with Recorder() as recorder:
        for _ in range(3):
            channel_gate(x, gate)
    dense = Dense((2, 8, 4, 4), (128, 1, 32, 8), torch.bfloat16)
    call = Call("channel_gate", (dense, Dense((2, 8), (8, 1), torch.float32)), dense)
    assert recorder.calls == {call: 3}
    assert call.nbytes == 2 * 2 * 8 * 4 * 4 * 2 + 2 * 8 * 4
    assert recorder.nbytes == {"trifuse::channel_gate": 3 * call.nbytes}


def test_views_move_no_bytes_and_other_operations_do():
    x = torch.empty(4, 6, device="meta")
    with Recorder() as recorder:
        x.t().reshape(6, 4)
        x + x
    assert recorder.nbytes == {"aten::add": 3 * 4 * 6 * 4}
    assert recorder.calls == {}


@pytest.mark.parametrize("last", [True, False])
def test_a_convolution_keeps_the_layout_of_its_input_as_on_a_gpu(last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=layout).requires_grad_()
    weight = torch.empty(6, 8, 3, 3, device="meta")
    with Recorder():
        out = torch.conv2d(x, weight, padding=1)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert [is_channels_last(out), is_channels_last(grad)] == [last, last]


def test_attention_reads_and_writes_no_weights_as_on_a_gpu():
    moved = trace("DINO-UNet base", 2).nbytes
    assert moved["aten::_softmax"] < 1e-6 * moved["aten::_scaled_dot_product_flash_attention"], "that of 12 weights"
    assert "aten::bmm" not in moved


def test_memory_that_is_asked_for_is_not_moved():
    with Recorder() as recorder:
        x = torch.empty(4, 6, device="meta")
        torch.empty_like(x)
        x.new_empty(3)
    assert recorder.nbytes == {}


def test_a_described_tensor_is_made_again():
    dense = Dense.of(torch.empty(2, 3, 4).transpose(1, 2))
    assert Dense.of(dense.zeros()) == dense
    assert not dense.zeros().any()


def test_the_gradients_of_a_step_are_calls_of_it():
    assert {call.operator for call in trace("TAFF-UNet", 2).calls} >= {
        "segment_film_gate",
        "segment_film_gate_backward",
        "segmentation_sums_deep_supervision_backward",
    }


def test_batch_norms_and_their_activations_are_one_operator_in_the_networks():
    """All but the norms between FIAS's stages, which nothing follows, and rectifiers of a gate's few numbers."""
    dino, fias = (trace(name, 2).nbytes for name in ("DINO-UNet base", "FIAS"))
    assert dino["trifuse::batch_norm_activation_backward"] > dino["trifuse::batch_norm_activation"] > 0
    assert not {"aten::relu", "aten::threshold_backward", "aten::native_batch_norm"} & dino.keys()
    assert fias["aten::native_batch_norm"] < 0.05 * fias["trifuse::batch_norm_activation"]
    assert fias["aten::relu"] + fias["aten::threshold_backward"] < 1e-3 * fias["trifuse::batch_norm_activation"]
