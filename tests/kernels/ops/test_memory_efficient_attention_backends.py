"""Attention: which implementation is chosen, by calling both."""

from __future__ import annotations

import re
import sys
import types
from importlib import import_module

import pytest
import torch
from attention_arguments import check, random_arguments, random_bias
from ready_python import run_python

from trifuse.kernels import BackendError, backend
from trifuse.kernels.ops.memory_efficient_attention import (
    attention_backend,
    memory_efficient_attention,
    memory_efficient_attention_reference,
)

operator_module = import_module("trifuse.kernels.ops.memory_efficient_attention")
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_forced_backends():
    q, k, v = random_arguments(1, 3, 4, 2, 8)
    with backend("triton"), pytest.raises(BackendError, match="no Triton kernel, for SDPA and xformers are already it"):
        memory_efficient_attention(q, k, v)
    with backend("reference"):
        out = memory_efficient_attention(q, k, v)
    assert torch.equal(out, memory_efficient_attention_reference(q, k, v))


def test_k6_cpu_never_imports_xformers():
    child = run_python("-c", CPU_ONLY)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""


CPU_ONLY = """
import sys, torch
from trifuse.kernels.ops.memory_efficient_attention import memory_efficient_attention, attention_backend
q = torch.randn(1, 3, 2, 8)
memory_efficient_attention(q, q, q)
assert attention_backend(q.device, q.dtype)[0] == "sdpa"
loaded = {"xformers", "triton"} & sys.modules.keys()
assert not loaded, loaded
"""


@pytest.fixture
def fake_xformers(monkeypatch):
    """An xformers that works, and counts its calls."""
    calls = []

    def attend(q, k, v, attn_bias=None, p=0.0, scale=None):
        calls.append(None if attn_bias is None else attn_bias.shape)
        return memory_efficient_attention_reference(q, k, v, scale=scale, attn_bias=attn_bias, dropout_p=p)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, package.ops = attend, ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def test_a_probe_is_a_call_forward_and_backward(fake_xformers):
    assert operator_module._obstacle(operator_module._sdpa_fused, CPU, torch.float32) == ""
    assert operator_module._obstacle(operator_module._xformers, CPU, torch.float32) == ""
    assert len(fake_xformers) == 1


def test_a_probe_reports_what_the_call_raises(monkeypatch, fake_xformers):
    def no_kernel(*args, **options):
        raise NotImplementedError("no operator found\nfor these inputs")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", no_kernel)
    assert operator_module._obstacle(operator_module._xformers, CPU, torch.float32) == "no operator found"
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "xformers" in operator_module._obstacle(operator_module._xformers, CPU, torch.float32)

    def forward_only(q, k, v, **options):
        return q.detach()

    assert "grad" in operator_module._obstacle(forward_only, CPU, torch.float32)


@pytest.mark.parametrize(
    ("sdpa", "xformers", "choice", "reason"),
    [
        ("", "", "sdpa", "PyTorch has a fused kernel for torch.float16"),
        ("", "broken", "sdpa", "PyTorch has a fused kernel for torch.float16"),
        ("old GPU", "", "xformers", r"PyTorch has no fused kernel for torch.float16 on this GPU \(old GPU\)"),
        ("old GPU", "broken", "sdpa", r"neither PyTorch \(old GPU\) nor xformers \(broken\)"),
    ],
)
def test_choice_on_a_gpu_follows_the_probes_and_is_made_once(monkeypatch, sdpa, xformers, choice, reason):
    obstacles = {operator_module._sdpa_fused: sdpa, operator_module._xformers: xformers}
    probed = []

    def obstacle(attend, device, dtype):
        probed.append(attend)
        return obstacles[attend]

    monkeypatch.setattr(operator_module, "_obstacle", obstacle)
    attention_backend.cache_clear()
    chosen, why = attention_backend(GPU, torch.float16)
    calls = len(probed)
    assert attention_backend(GPU, torch.float16) == (chosen, why)
    attention_backend.cache_clear()
    assert chosen == choice
    assert re.search(reason, why)
    assert len(probed) == calls == (2 if sdpa else 1)


@pytest.fixture
def xformers_chosen(monkeypatch, fake_xformers):
    monkeypatch.setattr(operator_module, "attention_backend", lambda device, dtype: ("xformers", "for the test"))
    return fake_xformers


def test_xformers_serves_where_it_is_chosen(xformers_chosen):
    q, k, v = random_arguments(2, 3, 4, 2, 8)
    check(q, k, v, attn_bias=random_bias(4), scale=0.2)
    assert set(xformers_chosen) == {(2, 2, 3, 4)}  # it takes no broadcastable bias


def test_xformers_does_not_serve_compilers_or_a_forced_backend(xformers_chosen):
    q, k, v = random_arguments(1, 3, 4, 2, 8)
    with backend("torch"):
        memory_efficient_attention(q, k, v)
    torch._dynamo.reset()
    torch.compile(memory_efficient_attention, fullgraph=True, backend="eager")(q, k, v)
    torch.func.grad(lambda q: memory_efficient_attention(q, k, v).sum())(q.detach())
    assert xformers_chosen == []
