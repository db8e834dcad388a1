"""The tests of a GPU see the kernels launched, and fail where plain PyTorch would pass for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from forced_kernels import on_kernels, step_on_kernels
from unbuildable_kernels import NO_COMPILER, make_unbuildable

from trifuse import kernels
from trifuse.kernels import BackendError, backend
from trifuse.kernels.library import WITHOUT_KERNELS

pytest.importorskip("triton", reason="these are Triton's launches")
WITH_KERNELS = sorted(kernels.OPERATORS.keys() - WITHOUT_KERNELS.keys())


def leaf(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


# One call of each operator, as small as it can be.
CALLS = {
    "batch_norm_activation": lambda: (leaf(1, 2, 2, 2), None, None, leaf(2), leaf(2)),
    "channel_gate": lambda: (leaf(1, 2, 2, 2), leaf(1, 2)),
    "depthwise_multi_kernel": lambda: (leaf(1, 2, 2, 2), [leaf(2, 1, 3, 3)]),
    "dice_ce_loss": lambda: (leaf(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64)),
    "dilated_attention": lambda: (*leaf(3, 1, 2, 2, 6).unbind(), {"num_heads": 3}),
    "dilated_attention_weights": lambda: (*leaf(2, 1, 2, 2, 6).unbind(), {"num_heads": 3}),
    "instance_norm_leaky_relu": lambda: (leaf(1, 2, 2, 2), leaf(2), leaf(2)),
    "memory_efficient_attention": lambda: leaf(3, 1, 2, 1, 4).unbind(),
    "monte_carlo_pool": lambda: (leaf(1, 2, 2, 2), {"scale": 1, "cell": 0}),
    "mutation_loss": lambda: ([leaf(1, 2, 2, 2), leaf(1, 2, 1, 1)], torch.ones(1, 2, 2, dtype=torch.int64)),
    "residual_layer_norm": lambda: (leaf(1, 2, 4), leaf(1, 2, 4), leaf(4), leaf(4)),
    "segment_film_gate": lambda: (
        leaf(1, 2, 2, 2),
        torch.ones(1, 2, 2, dtype=torch.uint8),
        *(leaf(*shape) for shape in ((1, 2), (1, 3), (2,), (1, 2), (1, 2), (1, 2))),
    ),
    "spatial_gate": lambda: (leaf(1, 2, 2, 2), leaf(1, 1, 2, 2)),
    "temporal_film_gate": lambda: (leaf(1, 2, 2, 2), leaf(1, 2), leaf(1, 2), leaf(1, 2), leaf(1, 2)),
    "upsample_argmax": lambda: ([leaf(1, 2, 2, 2).detach()], (4, 4)),
    "weighted_block_fusion": lambda: ([leaf(1, 2, 4), leaf(1, 2, 4)], leaf(2)),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """The file of the tests of a GPU, on CPU tensors and the calls above."""
    spec = importlib.util.spec_from_file_location("on_gpu", Path(__file__).with_name("test_on_gpu.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "calls", lambda name, device, dtype: iter([CALLS[name]()]))
    return module


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_every_operator_launches_kernels_forward_and_backward_or_has_none(name):
    step_on_kernels(name, CALLS[name]())


@pytest.mark.parametrize("name", ["memory_efficient_attention", "weighted_block_fusion"])
def test_they_pass_where_kernels_run(on_gpu, name):
    on_gpu.test_values_and_every_gradient(name, torch.float32)


def test_they_see_the_launches_of_compiled_code(on_gpu):
    on_gpu.test_full_graph_compilation("weighted_block_fusion")


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_they_fail_where_no_kernel_can_be_built(on_gpu, name, monkeypatch):
    make_unbuildable(monkeypatch)
    for test, arguments in (
        (on_gpu.test_values_and_every_gradient, (name, torch.float32)),
        (on_gpu.test_a_recorded_operator_gives_what_it_gives_eagerly, (name,)),
    ):
        with pytest.raises(BackendError, match=NO_COMPILER):
            test(*arguments)


def test_the_others_fail_too_where_no_kernel_can_be_built(on_gpu, monkeypatch, tmp_path):
    make_unbuildable(monkeypatch)
    monkeypatch.setattr(on_gpu, "warmed_up", lambda step: step())
    for test, arguments in (
        (on_gpu.test_full_graph_compilation, ("weighted_block_fusion",)),
        (on_gpu.test_fusion_repeats_bit_for_bit, ()),
        (on_gpu.test_fusion_needs_one_map_of_extra_memory, ()),
        (on_gpu.test_a_recorded_training_step_trains_as_an_eager_one, ("plain_unet", tmp_path, monkeypatch)),
    ):
        with pytest.raises(BackendError, match=NO_COMPILER):
            test(*arguments)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_plain_pytorch_is_refused_forward_and_backward(name, monkeypatch):
    """Whatever let it run there, a call that launched nothing is no test of a kernel."""
    monkeypatch.setattr("forced_kernels.backend", lambda *_, **__: backend("torch"))
    with pytest.raises(AssertionError, match=f"{name}: kernels expected: True"):
        step_on_kernels(name, CALLS[name]())


def test_an_earlier_fallback_is_refused(monkeypatch):
    make_unbuildable(monkeypatch)
    with pytest.warns(RuntimeWarning, match="plain PyTorch takes over"):
        kernels.weighted_block_fusion(*CALLS["weighted_block_fusion"]())
    with pytest.raises(AssertionError, match=NO_COMPILER), on_kernels("upsample_argmax"):
        pass


def test_what_has_no_kernels_must_launch_none():
    expected = pytest.raises(AssertionError, match="memory_efficient_attention: kernels expected: False")
    with expected, on_kernels("memory_efficient_attention"):
        kernels.upsample_argmax(*CALLS["upsample_argmax"]())
