"""Weighted block fusion with a selection of its maps: values, gradients, and what nobody can read on the host."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from block_fusion_arguments import BACKENDS, check, interpreted, random_arguments
from forms import with_every_type
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from trifuse.kernels import ShapeError, backend, weighted_block_fusion, weighted_block_fusion_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("name", BACKENDS)
# (N, B, M, D) and the selection: one of everything, in any order, twice the same, several tiles and groups of loads
CASES = [
    ((1, 1, 1, 1), (0,)),
    ((3, 2, 5, 48), (2, 0)),
    ((5, 1, 3, 700), (4, 4, 1)),
    ((12, 2, 17, 40), (11, 8, 7, 0)),
    ((40, 1, 2, 9), (39, 23, 24, 5)),
    ((3, 2, 5, 4), ()),
]


def arguments(shape, selection, **options):
    maps, logits = random_arguments(*shape, **options)
    return maps, logits, torch.tensor(selection, dtype=torch.int64)


@every_backend
@pytest.mark.parametrize(("case", "dtype"), with_every_type([(case,) for case in CASES], DTYPES, at=3), ids=str)
def test_values_and_every_gradient(name, dtype, case):
    check(name, *arguments(*case, dtype=dtype))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_the_result_is_the_fused_map_and_the_selected_ones(name):
    maps, logits, selection = arguments((5, 2, 3, 4), (3, 1))
    with backend(name):
        fused, *selected = weighted_block_fusion(maps, logits, selection)
        assert torch.equal(fused, weighted_block_fusion(maps, logits))
    assert all(torch.equal(got, maps[i]) for got, i in zip(selected, (3, 1), strict=True))


@every_backend
@pytest.mark.parametrize("left_out", [0, 1])
def test_selected_maps_are_contiguous_memory_of_their_own(name, left_out):
    maps, logits, selection = arguments((3, 2, 6, 4), (1, 1))
    views = [feature.detach()[:, left_out:] for feature in maps]
    with backend(name):
        _, *selected = weighted_block_fusion(views, logits, selection)
    assert all(got.is_contiguous() for got in selected)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (*selected, maps[1])}) == 3


@every_backend
@pytest.mark.parametrize("layout", [lambda x: x[:, 1:], lambda x: x.mT, lambda x: x[:1].expand_as(x)])
def test_k8_strides_and_offsets(name, layout):
    maps, logits, selection = arguments((3, 2, 6, 5), (2, 0), maps_grad=False)
    check(name, [layout(feature).requires_grad_() for feature in maps], logits, selection)
    check(name, maps, logits, torch.tensor([2, 9, 0, 9])[::2])


@every_backend
@pytest.mark.parametrize("trained", [(), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize("logits_grad", [False, True])
def test_k22_selected_maps_have_a_gradient_where_maps_have_one(name, trained, logits_grad):
    """Or else whatever reads a selected map would compute one, for nobody."""
    maps, logits, selection = arguments((3, 2, 5, 4), (2, 0, 2), maps_grad=False, logits_grad=logits_grad)
    for i in trained:
        maps[i].requires_grad_()
    check(name, maps, logits, selection)
    with backend(name):
        _, *selected = weighted_block_fusion(maps, logits, selection)
    assert any(got.requires_grad for got in selected) == bool(trained)


@every_backend
def test_either_result_can_be_differentiated_alone(name):
    maps, logits, selection = arguments((3, 2, 5, 4), (2, 0))
    with backend(name):
        fused, *selected = weighted_block_fusion(maps, logits, selection)
    found = torch.autograd.grad(selected[0].square().sum(), [logits, *maps], allow_unused=True, retain_graph=True)
    assert torch.equal(found[3], 2 * maps[2])
    assert not any(gradient is not None and gradient.any() for gradient in found[:3])
    found = torch.autograd.grad(fused.square().sum(), [logits, *maps])
    want = torch.autograd.grad(weighted_block_fusion_reference(maps, logits).square().sum(), [logits, *maps])
    torch.testing.assert_close(found, want)


@every_backend
def test_k12_nothing_in_gives_nothing_out(name):
    maps, logits, selection = arguments((3, 2, 0, 4), (2, 0))
    with backend(name):
        results = weighted_block_fusion(maps, logits, selection)
    assert [result.shape for result in results] == [(2, 0, 4)] * 3


@every_backend
def test_k23_second_differentiation_is_refused(name):
    maps, logits, selection = arguments((2, 1, 2, 3), (1,))
    with backend(name):
        fused, _ = weighted_block_fusion(maps, logits, selection)
        (first,) = torch.autograd.grad(fused.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
def test_k24_saves_the_arguments_and_nothing_else(name):
    maps, logits, selection = arguments((3, 2, 4, 5), (1, 0), maps_grad=False)
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()), lambda _: None), backend(name):
        weighted_block_fusion(maps, logits, selection)
    assert saved <= {t.data_ptr() for t in (logits, selection, *maps)}


def test_gradcheck():
    maps, logits, selection = arguments((3, 2, 3, 2), (2, 0), dtype=torch.float64)
    for op in (weighted_block_fusion, weighted_block_fusion_reference):
        assert gradcheck(
            lambda logits, *maps, op=op: op(maps, logits, selection), (logits.detach().double().requires_grad_(), *maps)
        )


# --- where nobody can read the selection ------------------------------------------------------------------------------


@every_backend
def test_k27_compiles_to_one_graph_that_holds_for_every_selection(name):
    compiled = torch.compile(weighted_block_fusion, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with backend(name), torch._dynamo.config.patch(error_on_recompile=True):
        for m, selection in ((5, (0, 2)), (6, (2, 1)), (9, (1, 1))):
            for form, results in ((compiled, []), (weighted_block_fusion_reference, wanted := [])):
                maps, logits, chosen = arguments((3, 2, m, 4), selection)
                values = form(maps, logits, chosen)
                sum(value.square().sum() for value in values).backward()
                results += [*values, logits.grad, *(feature.grad for feature in maps)]
                if form is compiled:
                    got = results
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_recorded_graph_holds_for_other_values_and_selections(mode):
    first = arguments((3, 2, 5, 4), (2, 0), maps_grad=False, logits_grad=False)
    other = arguments((3, 2, 5, 4), (0, 1), maps_grad=False, logits_grad=False, seed=1)
    graph = make_fx(lambda *given: weighted_block_fusion(*given), tracing_mode=mode)(*first)
    torch.testing.assert_close(graph(*other), weighted_block_fusion_reference(*other))


def test_k7_meta_tensors_give_shapes_without_data():
    maps = [torch.empty(2**16, 2**8, 2**8, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    chosen = torch.empty(3, dtype=torch.int64, device="meta")
    results = weighted_block_fusion(maps, torch.zeros(2, device="meta"), chosen)
    assert [(result.shape, result.dtype, result.device.type) for result in results] == [
        (maps[0].shape, torch.bfloat16, "meta")
    ] * 4


@every_backend
def test_k26_vmap_and_functional_differentiation(name):
    maps, logits, selection = arguments((3, 2, 4, 5), (2, 0), maps_grad=False, logits_grad=False)
    selections = torch.stack([selection, selection.flip(0)])
    with backend(name):
        mapped = torch.vmap(weighted_block_fusion, in_dims=(None, None, 0))(maps, logits, selections)
        pulled = torch.func.grad(lambda x: weighted_block_fusion([x, *maps[1:]], logits, selection)[2].sum())(maps[0])
    for got, each in zip(zip(*mapped, strict=True), selections, strict=True):
        torch.testing.assert_close(got, weighted_block_fusion_reference(maps, logits, each))
    assert torch.equal(pulled, torch.ones_like(maps[0]))


@interpreted
@pytest.mark.parametrize("missing", [-1, 3])
def test_a_kernel_gives_nan_for_an_index_that_no_map_has(missing, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # or unwritten memory might be NaN
    gpu = import_module("trifuse.kernels.gpu.weighted_block_fusion")
    maps, logits, selection = arguments((3, 2, 4, 5), (1, missing), maps_grad=False)
    fused, *selected = gpu.forward(maps, logits, selection)
    torch.testing.assert_close(fused, weighted_block_fusion_reference(maps, logits))
    assert torch.equal(selected[0], maps[1])
    assert selected[1].isnan().all()


def test_a_compiled_form_gives_nan_for_an_index_that_no_map_has():
    maps, logits, selection = arguments((3, 2, 4, 5), (1, 3), maps_grad=False)
    _, *selected = torch.compile(weighted_block_fusion, backend="eager")(maps, logits, selection)
    assert torch.equal(selected[0], maps[1])
    assert selected[1].isnan().all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ([0, 1], TypeError, r"selection is a builtins\.list; expected a torch\.Tensor"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, r"selection is torch\.int32; expected torch\.int64"),
        (torch.tensor([[0, 1]]), ShapeError, r"selection has shape \(1, 2\); expected \(k,\)"),
        (torch.tensor([0], device="meta"), ShapeError, r"features on cpu, selection on meta; move them with"),
        (torch.tensor([0, 3, -1]), ValueError, r"selection asks for maps \[3, -1\]; expected indices from 0 to 2"),
    ],
)
def test_selections_that_are_refused(selection, error, message):
    maps, logits = random_arguments(3, 1, 2, 3)
    for name in ("torch", "reference"):
        with backend(name), pytest.raises(error, match=f"weighted_block_fusion: .*{message}"):
            weighted_block_fusion(maps, logits, selection)
