"""Which backend a tensor gets."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from operator_calls import OPERATORS, calls_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map_only

from trifuse.kernels import dilated_attention_weights, library, memory_efficient_attention

CPU = torch.device("cpu")
ADVICE = r" is a DTensor; expected .*\.to_local\(\).*\.full_tensor\(\)"


def test_cpu_tensors_choose_the_kernels_only_where_a_driver_runs_them_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def chosen(dtype):
        return library.default_backend(CPU, dtype)[0], library.triton_obstacle(CPU, dtype) == ""

    assert chosen(torch.float32) == ("torch", False)
    with library.compiled_on_cpu():
        assert chosen(torch.float32) == ("triton", True)
        assert chosen(torch.float64) == ("torch", False)
    assert chosen(torch.float32) == ("torch", False)


def test_the_refusal_of_a_cpu_tensor_names_both_ways_to_run_kernels_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with library.backend("triton"), pytest.raises(library.BackendError) as refused:
        library.choose_backend("channel_gate", torch.zeros(2, 3))
    assert "TRITON_INTERPRET=1" in str(refused.value)
    assert "`with trifuse.kernels.testing.virtual_gpu():`" in str(refused.value)


def test_k6_one_debug_line_says_which_backend_an_operator_chose_and_why(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "_logged", set())
    x = torch.zeros(2, 3)
    with caplog.at_level(logging.DEBUG, "trifuse.kernels"):
        for op in ("channel_gate", "channel_gate", "upsample_argmax"):
            library.choose_backend(op, x)
        with library.backend("reference"):
            library.choose_backend("monte_carlo_pool", x)
    because = "runs on the torch backend: CPU tensors use plain PyTorch"
    assert caplog.messages == [f"channel_gate {because}", f"upsample_argmax {because}"]


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("op", OPERATORS)
def test_k28_a_distributed_tensor_is_refused_with_advice(op, mesh):
    for call in calls_of(op, (1, 2, 2, 3)):
        arguments = tree_map_only(Tensor, lambda x: distribute_tensor(x.detach(), mesh), call.arguments)
        with pytest.raises(TypeError, match=ADVICE):
            call.function(*arguments, **call.options)


def test_k28_attention_refuses_distributed_tensors_too(mesh):
    q = distribute_tensor(torch.randn(1, 2, 2, 4), mesh)
    with pytest.raises(TypeError, match=ADVICE):
        memory_efficient_attention(q, q, q)
    with pytest.raises(TypeError, match=ADVICE):
        dilated_attention_weights(q, q, num_heads=2, dilations=(1, 2))
