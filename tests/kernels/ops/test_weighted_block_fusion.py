"""Weighted block fusion: values, every gradient, every layout, and every refusal, on all three backends."""

from __future__ import annotations

import copy

import pytest
import torch
from block_fusion_arguments import BACKENDS, check, random_arguments
from forms import with_every_type
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trifuse.kernels import BackendError, ShapeError, backend, weighted_block_fusion, weighted_block_fusion_reference
from trifuse.kernels.testing import tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, B, M, D): one of everything, odd and prime sizes, more than one tile, more than one launch of the backward kernel
SHAPES = [(1, 1, 1, 1), (2, 1, 7, 3), (3, 2, 5, 48), (12, 2, 17, 40), (5, 1, 3, 700), (25, 1, 3, 5), (64, 1, 2, 9)]


def test_reference_matches_definition():
    maps, logits = random_arguments(4, 2, 3, 5)
    weights = [torch.exp(logit) / torch.exp(logits).sum() for logit in logits]
    fused = torch.zeros(2, 3, 5)
    for b in range(2):
        for m in range(3):
            for d in range(5):
                fused[b, m, d] = sum(w * feature[b, m, d] for w, feature in zip(weights, maps, strict=True))
    torch.testing.assert_close(weighted_block_fusion_reference(maps, logits), fused)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), with_every_type([(shape,) for shape in SHAPES], DTYPES, at=2), ids=str)
def test_values_and_every_gradient(name, dtype, shape):
    """K14: odd, prime and single sizes among them."""
    check(name, *random_arguments(*shape, dtype=dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 0, 5, 4), (3, 2, 0, 4), (3, 2, 5, 0)], ids=str)
def test_k12_zero_size_gives_empty_values_and_zero_gradients(name, shape):
    maps, logits = random_arguments(*shape)
    with backend(name):
        fused = weighted_block_fusion(maps, logits)
        fused.sum().backward()
    assert fused.shape == shape[1:]
    assert all(feature.grad.shape == shape[1:] for feature in maps)
    assert torch.equal(logits.grad, torch.zeros(3))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("trained", [(), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("logits_grad", [False, True])
def test_k22_only_the_gradients_asked_for(name, trained, logits_grad):
    maps, logits = random_arguments(3, 2, 5, 4, maps_grad=False, logits_grad=logits_grad)
    for i in trained:
        maps[i].requires_grad_()
    check(name, maps, logits)
    if trained or logits_grad:
        with backend(name):
            weighted_block_fusion(maps, logits).sum().backward()
        assert [feature.grad is not None for feature in maps] == [i in trained for i in range(3)]
        assert (logits.grad is not None) == logits_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_stacked_maps_equal_listed_maps(name):
    maps, logits = random_arguments(4, 2, 3, 5)
    stacked = torch.stack([feature.detach() for feature in maps]).requires_grad_()
    with backend(name):
        weighted_block_fusion(stacked, logits.detach()).square().sum().backward()
        weighted_block_fusion(maps, logits.detach()).square().sum().backward()
    torch.testing.assert_close(stacked.grad, torch.stack([feature.grad for feature in maps]))


@pytest.mark.parametrize("name", BACKENDS)
def test_k8_strides_and_offsets(name):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(2, 8, 6, generator=generator) for _ in range(3)]
    logits = torch.randn(3, generator=generator, requires_grad=True)
    for view in (
        lambda x: x[:, 1:],  # the class token left out: samples contiguous, one stride apart
        lambda x: x[:, ::2],
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, :1].expand(2, 8, 6),
        lambda x: x.as_strided((2, 3, 4), (16, 4, 1), 1),
    ):
        check(name, [view(x).detach().requires_grad_() for x in tokens], logits)
    mixed = [tokens[0][:, 1:], tokens[1].transpose(1, 2)[:, :, :6][:, :6].reshape(2, 6, 6)[:, :6]]
    mixed = [mixed[0][:, :6], mixed[1].transpose(1, 2)]
    check(name, [x.detach().requires_grad_() for x in mixed], logits[:2].detach().requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    n = data.draw(st.integers(1, 6), label="N")
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 9)), label="(B, M, D)")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    maps = [data.draw(tensors(shape, dtypes=(dtype,), expanded=True), label=f"map {i}") for i in range(n)]
    logits = data.draw(tensors((n,), dtypes=(torch.float32, dtype)), label="logits")
    check(name, maps, logits)


def test_logit_gradients_of_small_maps_lose_nothing_to_cancellation():
    for seed in range(100):
        maps, logits = random_arguments(2, 1, 7, 6, seed=seed)
        (grad,), _ = random_arguments(1, 1, 7, 6, maps_grad=False, seed=seed + 100)
        wide = [x.detach().double().requires_grad_() for x in (*maps, logits)]
        (found,) = torch.autograd.grad(weighted_block_fusion(maps, logits), logits, grad)
        (exact,) = torch.autograd.grad(weighted_block_fusion_reference(wide[:-1], wide[-1]), wide[-1], grad.double())
        torch.testing.assert_close(found.double(), exact, atol=0, rtol=3e-7)


@pytest.mark.parametrize("common", [0, 1, 30])
def test_logit_gradients_of_large_maps_lose_no_more_than_the_reference(common):
    """Maps of which all share a part, as the blocks of one network do: what it adds to every sum cancels.

    Errors are those of eight gradients together: one alone may be right by luck.
    """
    lost = dict.fromkeys((weighted_block_fusion, weighted_block_fusion_reference), 0.0)
    for seed in range(2):
        maps, logits = random_arguments(4, 1, 512, 768, maps_grad=False, seed=seed)
        (grad, shared), _ = random_arguments(2, 1, 512, 768, maps_grad=False, seed=seed + 100)
        maps = [feature + common * shared for feature in maps]
        wide = logits.detach().double().requires_grad_()
        fused = weighted_block_fusion_reference([feature.double() for feature in maps], wide)
        (exact,) = torch.autograd.grad(fused, wide, grad.double())
        for op in lost:
            (found,) = torch.autograd.grad(op(maps, logits), logits, grad)
            lost[op] += (found.double() - exact).square().sum().item()
    assert lost[weighted_block_fusion] <= 3**2 * lost[weighted_block_fusion_reference]


@given(tensors(st.tuples(st.integers(1, 5), st.just(2), st.just(3), st.just(4))), st.floats(-50, 50))
def test_property_shift_invariance_and_gradients_that_sum_to_zero(stacked, shift):
    logits = torch.linspace(-1, 1, len(stacked), requires_grad=True)
    fused = weighted_block_fusion(stacked.detach(), logits)
    torch.testing.assert_close(weighted_block_fusion(stacked.detach(), logits + shift), fused, atol=1e-5, rtol=1e-4)
    fused.square().sum().backward()
    assert abs(logits.grad.sum().item()) <= 1e-5 * max(1.0, logits.grad.abs().max().item())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.3, 0.3, 0.3]], ids=str)
def test_k34_extreme_and_equal_logits(name, logits):
    maps, _ = random_arguments(3, 1, 4, 5)
    check(name, maps, torch.tensor(logits, requires_grad=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_k34_one_map_has_weight_one_and_no_logit_gradient(name):
    (feature,), logits = random_arguments(1, 2, 3, 4)
    with backend(name):
        fused = weighted_block_fusion([feature], logits)
        fused.square().sum().backward()
    assert torch.equal(fused, feature)
    assert logits.grad.item() == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_infinite_and_nan_logits_give_nan_as_softmax_does(name, bad):
    maps, _ = random_arguments(3, 1, 2, 3)
    with backend(name):
        assert weighted_block_fusion(maps, torch.tensor([0.0, bad, 1.0])).isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_k19_nan_stays_where_it_is(name):
    maps, logits = random_arguments(3, 2, 4, 5, maps_grad=False)
    maps[1][1, 2, 3] = float("nan")
    with backend(name):
        fused = weighted_block_fusion(maps, logits)
    assert fused.isnan().sum() == 1
    assert fused[1, 2, 3].isnan()


def test_gradcheck_reference_and_cpu_path():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    logits = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    for op in (weighted_block_fusion, weighted_block_fusion_reference):
        assert gradcheck(lambda logits, *maps, op=op: op(maps, logits), (logits, *maps))


def test_k3_float64_is_computed_in_float64():
    maps, logits = random_arguments(3, 2, 3, 4, dtype=torch.float64)
    truth = torch.einsum("n,nbmd->bmd", logits.double().softmax(0), torch.stack(maps))
    torch.testing.assert_close(weighted_block_fusion(maps, logits), truth, rtol=1e-14, atol=1e-14)
    with backend("triton"), pytest.raises(BackendError, match="float64"):
        weighted_block_fusion(maps, logits)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_refuses_types_it_cannot_compute_in(bad):
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False, logits_grad=False)
    with pytest.raises(TypeError, match=r"weighted_block_fusion: features\[0\] is torch\..*expected one of float32"):
        weighted_block_fusion([feature.to(bad) for feature in maps], logits)
    with pytest.raises(TypeError, match=r"weighted_block_fusion: logits is torch\."):
        weighted_block_fusion(maps, logits.to(bad))


def test_k1_refuses_what_is_no_tensor():
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False, logits_grad=False)
    with pytest.raises(TypeError, match=r"features\[0\] is a numpy\.ndarray; expected a torch\.Tensor"):
        weighted_block_fusion([feature.numpy() for feature in maps], logits)
    with pytest.raises(TypeError, match=r"features\[1\] is a numpy\.ndarray; expected a torch\.Tensor"):
        weighted_block_fusion([maps[0], maps[1].numpy()], logits)
    with pytest.raises(TypeError, match=r"logits is a builtins\.list; expected a torch\.Tensor"):
        weighted_block_fusion(maps, [0.0, 0.0])


def test_k2_mixed_types_are_refused_and_output_keeps_the_maps_type():
    maps, logits = random_arguments(2, 1, 2, 3, maps_grad=False)
    with pytest.raises(TypeError, match=r"features\[1\] is torch\.float16; expected torch\.float32"):
        weighted_block_fusion([maps[0], maps[1].half()], logits)
    assert weighted_block_fusion([feature.half() for feature in maps], logits).dtype == torch.float16


@pytest.mark.parametrize(
    ("maps", "logits", "message"),
    [
        ([], torch.zeros(0), "features is empty"),
        ([torch.zeros(2, 3)], torch.zeros(1), r"features\[0\] has shape \(2, 3\); expected \(B, M, D\)"),
        ([torch.zeros(2, 3, 4, 5)], torch.zeros(1), r"flatten\(2\)\.transpose\(1, 2\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2), r"one tensor of shape \(2, 3, 4\); expected \(N, B, M, D\)"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)], torch.zeros(2), r"features\[1\] has shape \(1, 2, 4\)"),
        ([torch.zeros(1, 2, 3)], torch.zeros(2), r"logits has shape \(2,\); expected \(1,\)"),
        ([torch.zeros(1, 2, 3)], torch.zeros(1, 1), r"logits has shape \(1, 1\); expected \(1,\)"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")], torch.zeros(2), r"features\[1\] is on meta"),
        ([torch.zeros(1, 2, 3)], torch.zeros(1, device="meta"), "features on cpu, logits on meta"),
    ],
)
def test_k5_refuses_what_does_not_fit(maps, logits, message):
    with pytest.raises(ShapeError, match=message):
        weighted_block_fusion(maps, logits)


@pytest.mark.parametrize("name", BACKENDS)
def test_arguments_are_left_alone(name):
    maps, logits = random_arguments(3, 2, 4, 5)
    before = copy.deepcopy([feature.detach() for feature in maps])
    with backend(name):
        weighted_block_fusion(maps, logits).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))
