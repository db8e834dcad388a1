"""Which backend and which device: what is asked of a GPU before anything runs on it."""

from __future__ import annotations

import types
from importlib import import_module

import pytest
import torch

from trifuse.architectures.training.distributed import choose_device
from trifuse.kernels import BackendError, ShapeError, library, upsample_argmax, weighted_block_fusion
from trifuse.kernels.errors import UnusableKernel

attention = import_module("trifuse.kernels.ops.memory_efficient_attention")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.setattr(library, "_unusable", {})
    library._capability_obstacle.cache_clear()
    yield
    library._capability_obstacle.cache_clear()


def test_a_gpu_takes_triton():
    assert library.default_backend(GPU, torch.bfloat16, "channel_gate")[0] == "triton"


def test_an_old_gpu_takes_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    chosen, reason = library.default_backend(GPU, torch.float32)
    assert (chosen, reason[:37]) == ("torch", "compute capability (7, 5) of GPU 0 is")


def test_amd_s_gpus_have_no_such_number(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert library.default_backend(GPU, torch.float32)[0] == "triton"


def test_tensors_in_two_places_are_named():
    with pytest.raises(ShapeError, match=r"on cuda:0.*on cpu"):
        weighted_block_fusion([torch.ones(1, 2, 3, device="cuda")], torch.ones(1))


def test_a_kernel_that_cannot_be_built_leaves_plain_pytorch(monkeypatch):
    from trifuse.kernels.gpu import launching

    def launch(*_, **__):
        raise UnusableKernel("no C compiler")

    monkeypatch.setattr(launching, "launch", launch)
    with pytest.warns(RuntimeWarning, match="plain PyTorch takes over.*cuda:0: no C compiler"):
        labels = upsample_argmax([torch.zeros(1, 2, 2, 2, device="cuda")], (4, 4))
    assert labels.is_cuda
    assert library.default_backend(GPU, torch.float32, "upsample_argmax") == ("torch", "no C compiler")


@pytest.mark.parametrize("word", ["auto", "cuda", "cuda:0"])
def test_the_gpu_is_chosen(word):
    assert choose_device(word) == GPU


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="needs GPU number 1; found 1 GPUs"):
        choose_device("cuda:1")


def broken(*_, **__):
    raise NotImplementedError("no kernel\nfor it")


def test_attention_asks_pytorch_then_xformers(monkeypatch):
    def answer():
        attention.attention_backend.cache_clear()
        return attention.attention_backend(GPU, torch.float16)

    assert answer() == ("sdpa", "PyTorch has a fused kernel for torch.float16 on this GPU")
    monkeypatch.setattr(attention, "_sdpa_fused", broken)
    working = types.SimpleNamespace(memory_efficient_attention=lambda q, k, v, **_: q + k + v)
    monkeypatch.setitem(import_module("sys").modules, "xformers.ops", working)
    assert answer() == ("xformers", "PyTorch has no fused kernel for torch.float16 on this GPU (no kernel)")
    q = torch.ones(1, 2, 2, 8, device="cuda", dtype=torch.float16)
    assert torch.equal(attention.memory_efficient_attention(q, q, q), 3 * q)
    working.memory_efficient_attention = broken
    assert answer()[0] == "sdpa"
    assert answer()[1].startswith("unfused, as neither PyTorch (no kernel) nor xformers (no kernel)")
