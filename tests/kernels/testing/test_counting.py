"""Launches are counted where kernels run, and operators that run in plain PyTorch instead are named."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import NETWORKS
from unbuildable_kernels import NO_COMPILER, make_unbuildable

from trifuse import kernels
from trifuse.kernels import BackendError, backend, library
from trifuse.kernels.testing import NoKernelRan, launches
from trifuse.kernels.testing.counting import launches_of

pytest.importorskip("triton", reason="these are Triton's launches")

from trifuse.kernels.gpu import launching


def fuse(maps=3):
    features = [torch.ones(1, 2, 4, requires_grad=True) for _ in range(maps)]
    return kernels.weighted_block_fusion(features, torch.zeros(maps, requires_grad=True))


@pytest.fixture
def no_compiler(monkeypatch):
    make_unbuildable(monkeypatch)


def test_kernels_are_counted_forward_and_backward_by_name():
    with backend("triton"), launches() as forward:
        fused = fuse(maps=40)
    with backend("triton"), launches() as backward:
        fused.sum().backward()
    assert forward.kernels == {"_weighted_block_fusion_fwd_kernel": 1}
    assert backward.kernels == {"_weighted_block_fusion_bwd_kernel": 2, "_weighted_block_fusion_logits_kernel": 1}
    assert not forward.fallbacks


def test_blocks_may_lie_inside_of_each_other():
    with backend("triton"), launches() as outer:
        fuse()
        with launches() as inner:
            fuse()
    assert (outer.kernels.total(), inner.kernels.total()) == (2, 1)


def test_plain_pytorch_launches_nothing():
    with launches() as counted:
        fuse().sum().backward()
    assert not counted.kernels
    assert not counted.fallbacks


def test_what_cannot_be_built_is_no_launch_but_a_fallback(no_compiler):
    with launches() as counted, pytest.warns(RuntimeWarning, match="plain PyTorch takes over"):
        fuse()
    assert not counted.kernels
    assert counted.fallbacks.keys() == {"weighted_block_fusion"}
    assert "cpu: " in counted.fallbacks["weighted_block_fusion"]
    assert NO_COMPILER in counted.fallbacks["weighted_block_fusion"]
    with launches() as later:
        fuse()
    assert later.fallbacks == counted.fallbacks


def test_what_was_counted_is_kept_where_the_block_fails(no_compiler):
    with pytest.raises(BackendError), launches() as counted, backend("triton"):
        fuse()
    assert counted.fallbacks.keys() == {"weighted_block_fusion"}


def test_kernels_are_expected_on_a_gpu_that_would_choose_plain_pytorch(monkeypatch):
    """As where no triton is installed: there, too, a time of plain PyTorch is none of ours."""
    monkeypatch.setattr(library, "default_backend", lambda *_: ("torch", "triton is not installed"))
    with pytest.raises(NoKernelRan, match="idle: expected Triton kernels, but it launched none on cuda"):
        launches_of("idle", lambda: None, torch.device("cuda"))
    assert launches_of("idle", lambda: None, torch.device("cpu")) == 0


# --------------------------------------------------------------------------------------- whole networks, forced


@pytest.fixture
def seen(monkeypatch):
    """Replace every launch by a note of its kernel: results mean nothing, the way to them is the GPU's."""
    found = []
    monkeypatch.setattr(launching, "launch", lambda kernel, *arguments, **settings: found.append(kernel.fn.__name__))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_whole_network_runs_forced_but_for_what_has_no_kernels(name, seen):
    network = NETWORKS[name]
    with backend("triton", strict=False):
        network.step(network.make().train(), network.batch(2)).backward()
    assert bool(seen) == network.kernels


@pytest.mark.parametrize("name", library.WITHOUT_KERNELS)
def test_forcing_without_strictness_leaves_what_has_no_kernels_alone(name):
    q, k, v = (torch.randn(1, 3, 4, 24) for _ in range(3))
    arguments, options = ((q, k, v), {}) if name == "memory_efficient_attention" else ((q, k), {"num_heads": 3})
    operator = getattr(kernels, name)
    expected = operator(*arguments, **options)
    with backend("triton", strict=False):
        assert torch.equal(operator(*arguments, **options), expected)
        with backend("triton"), pytest.raises(BackendError, match=library.WITHOUT_KERNELS[name]):
            operator(*arguments, **options)
        assert torch.equal(operator(*arguments, **options), expected)
