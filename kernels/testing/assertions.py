"""Hold an operator and each of its gradients against a reference in plain PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_op_matches(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    atol: float | None = None,
    **kwargs: Any,
) -> None:
    """Hold an operator against a reference: values, types, shapes, and the gradient of each argument by name.

    The truth is the reference in float64. The operator may be twice as far from it as the reference is when that runs
    in the arguments' own type, plus ``atol``: low precision is excused exactly as far as eager PyTorch needs the same
    excuse. Gradients are taken twice, for a random incoming gradient and for one of stride zero, which is what
    ``output.sum().backward()`` delivers. Arguments must come out unchanged.

    Args:
        op: the operator under test.
        reference: plain PyTorch with the same signature, able to run in float64.
        *args: arguments for both; tensors may be nested in lists and tuples. Gradients are compared for the tensors
            that require one.
        atol: absolute difference allowed on top; if None, four units in the last place of the largest true value.
        **kwargs: keyword arguments for both.

    Raises:
        AssertionError: naming what differs ("gradient of features[3]"), by how much, where, and what was allowed.
        TypeError: a result that is neither a tensor nor a list or tuple of tensors.
    """
    name = getattr(op, "__name__", repr(op))
    named = dict(_named_tensors(_named_arguments(op, args, kwargs)))
    before = {path: tensor.detach().clone() for path, tensor in named.items()}

    outputs = {}
    forms: tuple[tuple[str, Callable[..., Any], Callable[[Tensor], Tensor]], ...] = (
        ("op", op, lambda tensor: tensor),
        ("eager", reference, lambda tensor: tensor),
        ("truth", reference, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor),
    )
    for form, function, convert in forms:
        leaves = {path: convert(tensor.detach()).requires_grad_(tensor.requires_grad) for path, tensor in named.items()}
        result = function(*_replaced(args, named, leaves), **_replaced(kwargs, named, leaves))
        outputs[form] = leaves, _result_tensors(name, result)

    for path, tensor in named.items():
        assert torch.equal(tensor.detach().nan_to_num(), before[path].nan_to_num()), f"{name}: wrote into {path}"
    results = [results for _, results in outputs.values()]
    counts = [len(r) for r in results]
    assert len(set(counts)) == 1, f"{name}: returned {counts[0]} tensors, expected {counts[1]}"
    for k, (got, eager, truth) in enumerate(zip(*results, strict=True)):
        _assert_close(name, f"output {k}" if counts[0] > 1 else "output", got, eager, truth, atol)

    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(value.shape, generator=generator).to(value) for value in results[0]]
    expanded = [torch.ones(()).to(value).expand(value.shape) for value in results[0]]
    for kind, incoming in (("random", random), ("of stride zero", expanded)):
        found = [_gradients(leaves, values, incoming) for leaves, values in outputs.values()]
        for path, got in found[0].items():
            what = f"gradient of {path}, incoming gradient {kind}"
            eager, truth = found[1][path], found[2][path]
            missing = {True: "no gradient", False: "a gradient"}
            assert (got is None) == (eager is None), (
                f"{name}: {what}: expected {missing[eager is None]}, got {missing[got is None]}"
            )
            if got is not None and eager is not None and truth is not None:
                _assert_close(name, what, got, eager, truth, atol)


def _result_tensors(name: str, result: Any) -> list[Tensor]:
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    for item in results:
        if not isinstance(item, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, or a list or tuple of tensors, got a {type(item).__name__}")
    return results


def _named_arguments(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names that the operator gives them; by their place where it tells no names."""
    try:
        return inspect.signature(op).bind(*args, **kwargs).arguments
    except ValueError:  # a builtin such as torch.add
        return {"args": args, **kwargs}


def _named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested arguments, named as in ``features[3]``."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_tensors(item, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _named_tensors(item, f"{path}[{index}]")


def _replaced(value: Any, named: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Any:
    """Return nested arguments with each tensor exchanged for its leaf."""
    leaf_of = {id(tensor): leaves[path] for path, tensor in named.items()}

    def replace(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return leaf_of[id(item)]
        if isinstance(item, Mapping):
            return {key: replace(part) for key, part in item.items()}
        if isinstance(item, (list, tuple)):
            parts = [replace(part) for part in item]
            return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
        return item

    return replace(value)


def _gradients(
    leaves: Mapping[str, Tensor], outputs: Sequence[Tensor], incoming: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    wanted = {path: leaf for path, leaf in leaves.items() if leaf.requires_grad}
    reached = [
        (output, grad.to(output)) for output, grad in zip(outputs, incoming, strict=True) if output.requires_grad
    ]
    if not reached:
        return dict.fromkeys(wanted)
    found = torch.autograd.grad(
        [output for output, _ in reached],
        list(wanted.values()),
        [grad for _, grad in reached],
        retain_graph=True,
        allow_unused=True,
    )
    return dict(zip(wanted, found, strict=True))


def _assert_close(name: str, what: str, got: Tensor, eager: Tensor, truth: Tensor, atol: float | None) -> None:
    for key in ("shape", "dtype", "device"):
        mine, expected = getattr(got, key), getattr(eager, key)
        assert mine == expected, f"{name}: {what}: expected {key} {expected}, got {mine}"
    if not got.is_floating_point():
        assert torch.equal(got, eager), f"{name}: {what}: {int((got != eager).sum())} of {got.numel()} values differ"
        return
    unit = torch.finfo(got.dtype).eps
    got, eager, truth = got.detach().double(), eager.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    same = torch.equal(got[~finite].nan_to_num(0.5), truth[~finite].nan_to_num(0.5))
    assert same, f"{name}: {what}: infinities and NaN are not where the reference has them"
    if not finite.any():
        return
    error = torch.where(finite, (got - truth).abs(), 0.0)
    eager_error = torch.where(finite & eager.isfinite(), (eager - truth).abs(), 0.0).max().item()
    if atol is None:
        atol = 4 * unit * truth[finite].abs().max().item()
    where = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    largest = error[where].item()
    assert largest <= 2 * eager_error + atol, (
        f"{name}: {what}: expected {truth[where].item():.6g} at {where}, got {got[where].item():.6g}; the difference "
        f"{largest:.3g} is more than twice eager PyTorch's largest, {eager_error:.3g}, plus {atol:.3g}"
    )
