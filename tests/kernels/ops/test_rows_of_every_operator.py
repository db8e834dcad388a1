"""Rows of the matrix of faults that hold for every operator alike, on its kernels and in plain PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from operator_calls import OPERATORS, Call, calls_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trifuse import kernels
from trifuse.kernels import ShapeError, backend, library

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
SHAPE = (2, 3, 2, 3)
SQUASHING = ("channel_gate", "dilated_attention", "monte_carlo_pool", "spatial_gate", "upsample_argmax")
SQUASHING += ("weighted_block_fusion",)  # the others give what inf - inf gives in the order in which they add
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_operator = pytest.mark.parametrize("op", OPERATORS)


def attention(shape: tuple[int, ...] = (2, 5, 2, 4)) -> Iterator[Call]:
    """Calls of the operators that have no kernels."""
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind(0)
    yield Call(kernels.memory_efficient_attention, (q, k, v), {})
    yield Call(kernels.dilated_attention_weights, (q, k), {"num_heads": 2, "dilations": (1, 2)})


def changed(call: Call, change: Callable[[Tensor], Tensor], only: int | None = None) -> Call:
    """The call with its floating-point tensors changed, or only one of them; those that had gradients are leaves."""
    leaves, tree = tree_flatten((call.arguments, call.options))
    for n, place in enumerate(places(leaves)):
        new = change(leaves[place].detach()) if only in (None, n) else leaves[place].detach()
        leaves[place] = new.requires_grad_(leaves[place].requires_grad and new.is_floating_point())
    return Call(call.function, *tree_unflatten(leaves, tree))


def places(leaves: list[Any]) -> list[int]:
    return [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def each_changed(op: str, change: Callable[[Tensor], Tensor]) -> Iterator[Call]:
    """Every call of an operator with one tensor after the other changed, and no other."""
    for call in calls_of(op, SHAPE):
        for only in range(len(places(tree_flatten((call.arguments, call.options))[0]))):
            yield changed(call, change, only)


def outcome(call: Call, name: str | None, weigh: Callable[[Tensor], Tensor] = torch.square) -> list[Tensor]:
    """The result and every gradient, with a backend forced or none."""
    if name is None:
        result = call()
    else:
        with backend(name):
            result = call()
    leaves = call.leaves()
    return [result.detach(), *(torch.autograd.grad(weigh(result).sum(), leaves) if leaves else ())]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance: Any) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@every_operator
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_k1_k4_any_argument_of_a_type_that_is_not_computed_in(op, dtype):
    for call in each_changed(op, lambda x: x.to(dtype)):
        with pytest.raises(
            TypeError, match=rf"^\w+: \w+(\[\d\])? is {dtype}; expected (one of float32, bfloat16|torch.float32)"
        ):
            call()


@every_operator
@every_backend
def test_k2_the_result_has_the_type_of_the_maps_or_the_types_are_refused(op, name):
    for call in each_changed(op, torch.Tensor.half):
        maps = next(x for x in tree_flatten(call.arguments)[0] if x.is_floating_point())
        wanted = {"segmentation_sums": torch.float32, "upsample_argmax": torch.int64}.get(op, maps.dtype)
        try:
            with backend(name):
                result = call()
        except TypeError as error:
            assert all(word in str(error) for word in ("torch.float16", "torch.float32"))  # noqa: PT017
        else:
            assert result.dtype == wanted


@every_operator
def test_k5_any_argument_on_another_device(op):
    for call in each_changed(op, lambda x: x.to("meta")):
        if len({x.device for x in tree_flatten((call.arguments, call.options))[0] if isinstance(x, Tensor)}) > 1:
            with pytest.raises(ShapeError, match=r"(meta.*cpu|cpu.*meta).*\.to\(device\)"):
                call()


@pytest.fixture
def lines(monkeypatch, caplog):
    """What the operators say of the backend that they choose."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "_logged", set())
    caplog.set_level(logging.DEBUG, "trifuse.kernels")
    return caplog


@every_operator
def test_k6_without_a_gpu_plain_pytorch_computes_what_the_reference_does_and_says_so_once(op, lines):
    for call in calls_of(op, SHAPE):
        assert_same(outcome(call, None), outcome(call, "reference"), atol=1e-4, rtol=1e-4)
    assert lines.messages == [f"{op} runs on the torch backend: CPU tensors use plain PyTorch"]


def test_k6_operators_without_kernels_say_so_once(lines):
    for call in [*attention(), *attention()]:
        call()
    assert lines.messages == [
        "memory_efficient_attention runs on the sdpa backend: xformers has no kernels for cpu tensors",
        "dilated_attention_weights runs on the torch backend: the map is there to be looked at",
    ]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[:, 0]


def at_an_odd_offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


@every_backend
@every_operator
@pytest.mark.parametrize("layout", [transposed, at_an_odd_offset, expanded], ids=lambda layout: layout.__name__)
def test_k8_k9_k10_arguments_of_any_layout(op, name, layout):
    for call in calls_of(op, SHAPE):
        given = changed(call, layout)
        assert_same(outcome(given, name), outcome(changed(given, torch.clone), name))


@every_backend
@every_operator
def test_k9_an_incoming_gradient_that_is_one_number_expanded(op, name):
    for call in calls_of(op, SHAPE):
        separate = outcome(call, name, lambda result: result * torch.ones_like(result))
        assert_same(outcome(call, name, lambda result: result), separate)


@every_backend
@every_operator
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5)], ids=str)
def test_k12_nothing_in_gives_nothing_out_and_gradients_of_zero(op, name, shape):
    if (op, shape[:1]) == ("monte_carlo_pool", (0,)) or (op, shape[1]) == ("segmentation_sums", 0):
        return  # there is no order of no samples, and no class of no classes
    for call in calls_of(op, shape):
        if op == "upsample_argmax" and shape[0]:
            with pytest.raises(ShapeError, match="at least one class, row and column"):
                call()
            continue
        result, *gradients = outcome(call, name)
        if op == "segmentation_sums":
            assert not result.isnan()
        elif op == "monte_carlo_pool" and shape[2] == 0:
            assert result.isnan().all()  # as a mean of nothing is
        else:
            assert not result.numel()
        assert not any(gradient.any() for gradient in gradients)
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in call.leaves()]


@every_backend
@pytest.mark.parametrize("op", SQUASHING)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_k20_infinite_arguments_give_what_the_reference_gives(op, name, value):
    for call in each_changed(op, lambda x: x.flatten().index_fill(0, torch.tensor([0]), value).view(x.shape)):
        with backend("reference"):
            expected = call()
        with backend(name):
            torch.testing.assert_close(call(), expected, equal_nan=True)


@every_backend
@pytest.mark.parametrize("op", sorted({*OPERATORS} - {*SQUASHING}))
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_k20_an_infinite_argument_spoils_what_it_spoils_in_the_reference_and_no_more(op, name, value):
    """Whether that is infinite or NaN may depend on the order of a sum; all else is what it would be."""
    for call in each_changed(op, lambda x: x.flatten().index_fill(0, torch.tensor([0]), value).view(x.shape)):
        with backend("reference"):
            expected = call()
        with backend(name):
            result = call()
        spoiled, may_be = ~expected.isfinite(), ~expected.isfinite()
        if (op, name) == ("depthwise_multi_kernel", "triton"):  # where the weight meets the zeros around the image
            may_be = spoiled.flatten(2).any(-1)[..., None, None].expand_as(spoiled)
        if (op, name) == ("batch_norm_activation", "torch"):  # PyTorch makes one shift of weight, mean and bias
            may_be = spoiled.any(0).flatten(1).any(-1)[:, None, None].expand_as(spoiled)
        assert not result[spoiled].isfinite().any()
        torch.testing.assert_close(result[~may_be], expected[~may_be], atol=1e-4, rtol=1e-4)


@every_backend
@every_operator
def test_k21_large_half_arguments_do_not_overflow_where_the_result_fits(op, name):
    for call in each_changed(op, lambda x: 1e4 * x):
        half = changed(call, torch.Tensor.half)
        with backend("reference"):
            expected = changed(half, torch.Tensor.double)().double()
        with backend(name):
            result = half()
        fits = expected.abs() < torch.finfo(torch.float16).max
        torch.testing.assert_close(result.double()[fits], expected[fits], atol=1e-2, rtol=1e-2)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_backend
@every_operator
def test_k29_deterministic_algorithms_repeat_bit_for_bit(op, name):
    for call in calls_of(op, SHAPE):
        with deterministic():
            first, second = (outcome(call, name) for _ in range(2))
        assert all(map(torch.equal, first, second))


def computed_with(call: Call, place: int, value: Tensor) -> Tensor:
    """The result of a call one of whose arguments, flattened, is another one."""
    leaves, tree = tree_flatten((call.arguments, call.options))
    arguments, options = tree_unflatten([*leaves[:place], value, *leaves[place + 1 :]], tree)
    return call.function(*arguments, **options)


@interpreted
@every_operator
def test_k26_kernels_may_run_in_a_transform_of_something_else(op):
    factors = torch.arange(3.0)
    for call in calls_of(op, SHAPE):
        with backend("triton"):
            mapped = torch.vmap(lambda factor, call=call: factor * call().detach())(factors)
            expected = call().detach()
        torch.testing.assert_close(mapped, torch.stack([factor * expected for factor in factors]))


@every_operator
@pytest.mark.parametrize("name", BACKENDS)
def test_k26_any_argument_alone_may_be_mapped(op, name):
    """Be it a map, a weight, or a target, while the others are the same for all."""
    for call in calls_of(op, SHAPE):
        for place, leaf in enumerate(tree_flatten((call.arguments, call.options))[0]):
            if isinstance(leaf, Tensor):
                several = torch.stack([leaf.detach(), leaf.detach().flip(-1) if leaf.ndim > 1 else leaf.detach()])
                with backend(name):
                    one_by_one = torch.stack([computed_with(call, place, value) for value in several])
                    torch.testing.assert_close(torch.vmap(partial(computed_with, call, place))(several), one_by_one)
