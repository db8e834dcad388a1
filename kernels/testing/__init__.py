"""What you need to test and time your own operators, the same tools that test the ones in `trifuse.kernels`.

* `tensors`: a hypothesis strategy for tensors of any shape, type and memory layout.
* `assert_op_matches`: hold an operator and each of its gradients against a reference in plain PyTorch.
* `poisoned_empty`: make memory that an operator forgets to write visible.
* `peak_memory_bytes`: the most memory that a call holds.
* `saved_for_backward_bytes`: what autograd keeps of a call until its backward pass.
* `measure`, also the pytest fixture ``gpu_benchmark``: time several forms of one computation side by side.
* `compare`: hold several forms against each other in one call: equal results and gradients first, then time and memory.
* `Case`, `Pass`, `Comparison`, `clock`, `replay`: the same as a file of cases for pytest-benchmark.

pytest finds the fixture by itself (an entry point); the module imports torch and hypothesis when they are first used.

Example::

    @given(tensors(st.tuples(st.integers(0, 5), st.just(8)), dtypes=(torch.float32, torch.bfloat16)))
    def test_my_norm(x):
        assert_op_matches(my_norm, my_norm_reference, x)

    def test_my_norm_is_faster(gpu_benchmark):
        timings = gpu_benchmark({"eager": lambda: my_norm_reference(x), "fused": lambda: my_norm(x)})
        assert timings["fused"].speedup_over(timings["eager"]) > 2

    print(compare("my norm", {"eager": my_norm_reference, "fused": my_norm}, x, least_bytes=2 * x.nbytes))

    NORM = Comparison("my_norm", cases=[Case("stage 1", lambda device: (torch.ones(64, 96, device=device),))], ...)

    @pytest.mark.benchmark(timer=clock)
    @NORM.parametrize()
    def test_my_norm_side_by_side(benchmark, case, timed, provider):
        replay(benchmark, NORM.timing(case, timed, provider, seconds=1))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from .measuring import Timing, measure, peak_memory_bytes, saved_for_backward_bytes

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy
    from torch import Tensor

    from .comparing import Case, Comparison, Pass, WrongResult, compare

__all__ = [
    "Case",
    "Comparison",
    "Pass",
    "Timing",
    "WrongResult",
    "assert_op_matches",
    "clock",
    "compare",
    "gpu_benchmark",
    "measure",
    "peak_memory_bytes",
    "poisoned_empty",
    "replay",
    "saved_for_backward_bytes",
    "tensors",
]


def __getattr__(name: str) -> Any:
    if name not in ("Case", "Comparison", "Pass", "WrongResult", "compare"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".comparing", __package__), name)  # it needs torch


# ------------------------------------------------------------------------------------------------- strategies


def tensors(
    shape: SearchStrategy[Sequence[int]] | Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    requires_grad: bool | None = None,
    strided: bool = True,
    expanded: bool = False,
    device: str = "cpu",
) -> SearchStrategy[Tensor]:
    """Draw tensors of normal random values; they shrink to contiguous ones that need no gradient.

    Args:
        shape: one shape, or a strategy of shapes, e.g. ``st.tuples(st.integers(0, 4), st.just(8))``.
        dtypes: types to draw from; float32 if not given.
        requires_grad: None draws it, for types that can have a gradient.
        strided: draw permuted dimensions, steps between elements, and a storage offset as well.
        expanded: draw dimensions of stride zero as well, as `torch.Tensor.expand` makes them.
        device: where the tensors lie.
    """
    import torch
    from hypothesis import strategies as st

    shapes = shape if isinstance(shape, st.SearchStrategy) else st.just(tuple(shape))

    @st.composite
    def draw_tensor(draw: Callable[[Any], Any]) -> Tensor:
        size = tuple(draw(shapes))
        dtype = draw(st.sampled_from(dtypes or (torch.float32,)))
        generator = torch.Generator(device).manual_seed(draw(st.integers(0, 2**16)))
        order, steps, offset = tuple(range(len(size))), (1,) * len(size), 0
        if strided:
            order = tuple(draw(st.permutations(order)))
            steps = tuple(draw(st.tuples(*(st.integers(1, 2) for _ in size))))
            offset = draw(st.integers(0, 5))
        repeated = tuple(draw(st.tuples(*(st.booleans() if expanded else st.just(False) for _ in size))))
        held = [1 if repeat and length else length for repeat, length in zip(repeated, size, strict=True)]
        stored = [held[dim] * steps[dim] for dim in order]
        count = 1
        for length in stored:
            count *= length
        storage = torch.randn(offset + count, generator=generator, device=device).to(dtype)
        values = storage[offset:].view(stored).permute([order.index(dim) for dim in range(len(size))])
        for dim, step in enumerate(steps):
            values = values[(slice(None),) * dim + (slice(None, None, step),)]
        differentiable = dtype.is_floating_point or dtype.is_complex
        needs_grad = (differentiable and draw(st.booleans())) if requires_grad is None else requires_grad
        return values.expand(size).requires_grad_(needs_grad)

    return draw_tensor()


# ------------------------------------------------------------------------------------------------- assertions


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
    import torch

    name = getattr(op, "__name__", repr(op))
    named = dict(_named_tensors(_named_arguments(op, args, kwargs)))
    before = {path: tensor.detach().clone() for path, tensor in named.items()}

    outputs = {}
    for form, function, convert in (
        ("op", op, lambda tensor: tensor),
        ("eager", reference, lambda tensor: tensor),
        ("truth", reference, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor),
    ):
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
    import torch

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
    import torch

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
    import torch

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
    import torch

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
    import torch

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


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN, so that forgotten elements show.

    Integer tensors are left as they are. Only calls from Python are seen, which is where kernels get their outputs.
    """
    import torch

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def gpu_benchmark() -> Callable[..., dict[str, Timing]]:
    """Give `measure` on the GPU, or on the CPU where there is none."""
    import torch

    return partial(measure, device="cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------- pytest-benchmark


class _ReplayClock:
    """A timer that stands still except when it is told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


clock = _ReplayClock()
"""The timer of a benchmark that replays what was measured: ``@pytest.mark.benchmark(timer=clock)``.

There is one measurement. pytest-benchmark would time one form after the other, and a ratio between two moments of a
shared machine says little.
"""


def replay(benchmark: Any, timing: Timing) -> None:
    """Hand the samples of a timing to pytest-benchmark's ``benchmark`` fixture, whose timer must be `clock`."""
    remaining = iter(timing.seconds)
    benchmark.extra_info["peak_mib"] = round(timing.peak_bytes / 2**20, 2)
    benchmark.pedantic(lambda: clock.advance(next(remaining)), rounds=len(timing.seconds))
