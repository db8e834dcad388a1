"""A second derivative of an operator is right or refused, whichever way it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from operator_calls import OPERATORS, Call, calls_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from trifuse.kernels import backend

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
SHAPE = (2, 3, 2, 3)
DIFFERENTIABLE = sorted({*OPERATORS} - {"upsample_argmax"})
LINEAR = {"monte_carlo_pool"}  # whose second derivative is nothing
PLAIN = {("batch_norm_activation", "torch"), ("residual_layer_norm", "torch")}  # differentiable as often as one likes
REFUSAL = "the operator is once_differentiable; compute it inside: with trifuse.kernels.backend('reference')"

Function = Callable[..., Tensor]
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_operator = pytest.mark.parametrize("op", DIFFERENTIABLE)


def hessian(function: Function, points: Sequence[Tensor]) -> list[Tensor]:
    rows = torch.autograd.functional.hessian(function, tuple(points))
    return [block for row in rows for block in row]


def penalty(function: Function, points: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A penalty on the gradients at what a layer with the parameters, all ones, makes of the points."""
    parameters = [torch.ones_like(point).requires_grad_() for point in points]
    made = [point * parameter for point, parameter in zip(points, parameters, strict=True)]
    gradients = torch.autograd.grad(function(*made), made, create_graph=True)
    return sum(x.square().sum() for x in (*gradients, *made)), parameters


def named_in_grad(function: Function, points: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(*penalty(function, points))


def named_in_backward(function: Function, points: Sequence[Tensor]) -> list[Tensor | None]:
    total, parameters = penalty(function, points)
    total.backward(inputs=parameters)
    return [parameter.grad for parameter in parameters]


def not_named(function: Function, points: Sequence[Tensor]) -> list[Tensor | None]:
    total, parameters = penalty(function, points)
    total.backward()
    return [parameter.grad for parameter in parameters]


WAYS = (hessian, named_in_grad, named_in_backward, not_named)


def functions_of(call: Call) -> Iterator[tuple[Function, list[Tensor]]]:
    """A call as a function of all its differentiable arguments, and of each of them alone."""
    values, tree = tree_flatten((call.arguments, call.options))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    constants = [value.detach() if isinstance(value, Tensor) else value for value in values]

    def compute(chosen: Sequence[int], *points: Tensor) -> Tensor:
        replaced = dict(zip(chosen, points, strict=True))
        arguments, options = tree_unflatten([replaced.get(i, value) for i, value in enumerate(constants)], tree)
        return call.function(*arguments, **options)

    for chosen in (places, *([place] for place in places)):
        yield partial(compute, chosen), [constants[place] for place in chosen]


def right_or_refused(function: Function, points: list[Tensor], way: Callable[..., Any], name: str) -> bool:
    """Assert that a second derivative is one of both; return whether it is refused."""
    with backend(name):
        try:
            found = way(function, points)
        except RuntimeError as error:
            assert REFUSAL in str(error)  # noqa: PT017
            return True
    with backend("reference"):
        expected = way(function, points)
    torch.testing.assert_close(list(found), list(expected), atol=1e-4, rtol=1e-4)
    return False


@every_backend
@every_operator
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_k23_a_second_derivative_is_refused_whatever_is_named(op, name, way):
    for call in calls_of(op, SHAPE):
        for function, points in functions_of(call):
            refused = right_or_refused(lambda *x, of=function: of(*x).pow(3).sum(), points, way, name)
            assert refused or op in LINEAR or (op, name) in PLAIN


@every_backend
@every_operator
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_k23_a_second_derivative_of_a_plain_sum_is_right_or_refused(op, name, way):
    """Whose incoming gradient is a constant: what the operator saved alone can tell."""
    for call in calls_of(op, SHAPE):
        refused = [
            right_or_refused(lambda *x, of=function: of(*x).sum(), points, way, name)
            for function, points in functions_of(call)
        ]
        assert refused[0] or op in LINEAR or (op, name) in PLAIN


@every_backend
@every_operator
def test_k23_a_graph_of_the_gradients_changes_no_bit_of_them(op, name):
    """In a checkpoint either, which recomputes what was saved, and refuses to do so twice in one backward pass."""
    for call in calls_of(op, SHAPE):
        with backend(name):
            expected = torch.autograd.grad(call().sum(), call.leaves())
            for result in (call(), checkpoint(lambda *_, of=call: of(), *call.leaves(), use_reentrant=False)):
                gradients = torch.autograd.grad(result.sum(), call.leaves(), create_graph=True)
                assert all(map(torch.equal, gradients, expected))
