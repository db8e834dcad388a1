"""Weighted block fusion under PyTorch's compilers, tracers and transforms, and what it saves."""

from __future__ import annotations

import pytest
import torch
from block_fusion_arguments import BACKENDS, interpreted, random_arguments
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import backend, weighted_block_fusion, weighted_block_fusion_reference


@pytest.mark.slow  # one form of each operator: test_registered_operators.py
@interpreted
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(trained):
    maps, logits = random_arguments(3, 2, 5, 7, maps_grad=trained)
    torch.library.opcheck(torch.ops.trifuse.weighted_block_fusion.default, (maps, logits))
    grad = torch.randn(2, 5, 7)
    frozen = [feature.detach() for feature in maps]
    torch.library.opcheck(
        torch.ops.trifuse.weighted_block_fusion_backward.default, (grad, frozen, logits.detach(), [trained] * 3)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_k27_compiles_to_one_graph_with_dynamic_shapes(name):
    compiled = torch.compile(weighted_block_fusion, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 6, 9):
            maps, logits = random_arguments(3, 2, m, 4)
            compiled(maps, logits).square().sum().backward()
            got = [logits.grad, *(feature.grad for feature in maps)]
            maps, logits = random_arguments(3, 2, m, 4)
            weighted_block_fusion_reference(maps, logits).square().sum().backward()
            torch.testing.assert_close(got, [logits.grad, *(feature.grad for feature in maps)])


def test_k7_fake_and_meta_tensors_give_shapes_without_data():
    maps = [torch.empty(2**16, 2**8, 2**8, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    fused = weighted_block_fusion(maps, torch.zeros(2, device="meta"))
    assert (fused.shape, fused.dtype, fused.device.type) == (maps[0].shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        maps, logits = [torch.empty(2, 5, 4, requires_grad=True) for _ in range(2)], torch.zeros(2, requires_grad=True)
        fused = weighted_block_fusion(maps, logits)
        fused.sum().backward()
        assert [fused.shape, logits.grad.shape, maps[1].grad.shape] == [(2, 5, 4), (2,), (2, 5, 4)]


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
def test_recorded_graph_holds_for_other_values(mode):
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=False)
    graph = make_fx(lambda maps, logits: weighted_block_fusion(maps, logits), tracing_mode=mode)(maps, logits)
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=False, seed=1)
    torch.testing.assert_close(graph(maps, logits), weighted_block_fusion_reference(maps, logits))


@pytest.mark.parametrize("name", BACKENDS)
def test_k26_vmap_functional_and_forward_mode_differentiation(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False, logits_grad=False)
    many_logits = torch.stack([logits, logits + 1, -logits])
    with backend(name):
        mapped = torch.vmap(weighted_block_fusion, in_dims=(None, 0))(maps, many_logits)
        _, pushed = torch.func.jvp(lambda x: weighted_block_fusion(maps, x), (logits,), (torch.ones(3),))
        pulled = torch.func.grad(lambda x: weighted_block_fusion(maps, x).square().sum())(logits)
    torch.testing.assert_close(mapped, torch.stack([weighted_block_fusion_reference(maps, x) for x in many_logits]))
    torch.testing.assert_close(pushed, torch.zeros_like(pushed), atol=1e-6, rtol=0)
    logits.requires_grad_()
    weighted_block_fusion_reference(maps, logits).square().sum().backward()
    torch.testing.assert_close(pulled, logits.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_k23_second_differentiation_is_refused(name):
    maps, logits = random_arguments(2, 1, 2, 3)
    with backend(name):
        (first,) = torch.autograd.grad(weighted_block_fusion(maps, logits).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_k24_saves_the_arguments_and_nothing_else(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None), backend(name):
        with torch.no_grad():
            weighted_block_fusion(maps, logits)
        with torch.inference_mode():
            weighted_block_fusion(maps, logits)
        assert saved == []
        weighted_block_fusion(maps, logits)
        assert sorted(saved) == sorted(t.data_ptr() for t in (logits, *maps))
        saved.clear()
        trained, frozen_logits = random_arguments(3, 2, 4, 5, logits_grad=False)
        weighted_block_fusion(trained, frozen_logits)
        assert saved == [frozen_logits.data_ptr()]


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    maps, logits = random_arguments(3, 2, 4, 5)
    with backend(name):
        plain = weighted_block_fusion(maps, logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(weighted_block_fusion(maps, logits), plain)
