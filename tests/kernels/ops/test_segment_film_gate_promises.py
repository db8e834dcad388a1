"""The segment FiLM gate: what it computes and keeps, that it repeats, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from forms import asked_gradients
from segment_film_calls import (
    BACKENDS,
    NAMES,
    NOTHING,
    every_backend,
    interpreted,
    leaves_of,
    random_arguments,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trifuse.kernels import DataError, ShapeError, backend, segment_film_gate, segment_film_gate_reference
from trifuse.kernels.testing import assert_op_matches, launches

every_layout = pytest.mark.parametrize("layout", ["planes", "channels last"])
ARGUMENTS = ("features", "segments", *NAMES[1:])


@every_backend
@every_layout
def test_k22_only_the_gradients_asked_for(name, layout):
    for needed in asked_gradients(len(NAMES)):
        arguments = random_arguments((1, 2, 2, 3), needed=needed, layout=layout)
        with backend(name):
            out = segment_film_gate(*arguments)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.sum().backward()
        assert tuple(value.grad is not None for value in leaves_of(arguments)) == needed


@every_backend
@pytest.mark.parametrize("asked", NAMES)
def test_k22_each_gradient_alone_is_right(name, asked):
    for layout in ("planes", "channels last"):
        needed = [argument == asked for argument in NAMES]
        with backend(name):
            arguments = random_arguments(needed=needed, layout=layout)
            assert_op_matches(segment_film_gate, segment_film_gate_reference, *arguments, atol=2e-5)


@interpreted
def test_gradient_of_the_map_alone_is_one_launch():
    arguments = random_arguments(needed=(True, *(False,) * 6))
    with backend("triton"), launches() as counted:
        segment_film_gate(*arguments).sum().backward()
    assert counted.kernels == {"_segment_film_fwd_kernel": 1, "_temporal_film_bwd_kernel": 1}


class NewMaps(TorchDispatchMode):
    """Counts the results of at least a map's size that are not another tensor's memory."""

    def __init__(self, elements, known):
        super().__init__()
        self.elements, self.memory = elements, {value.data_ptr() for value in known}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.numel() >= self.elements:
                self.count += value.data_ptr() not in self.memory
                self.memory.add(value.data_ptr())
        return result


@every_backend
@pytest.mark.parametrize("needed", [(True,) * 7, (False, *(True,) * 6), (True, *(False,) * 6)], ids=str)
def test_k22_makes_a_map_forward_and_one_backward_if_it_is_asked_for(name, needed):
    """The table of 256 scores is smaller than the map, too."""
    arguments = random_arguments((2, 5, 16, 16), needed=needed)
    grad = torch.randn_like(arguments[0])
    with backend(name):
        with NewMaps(grad.numel(), [*arguments, grad]) as forward:
            out = segment_film_gate(*arguments)
        with NewMaps(grad.numel(), [*arguments, grad, out]) as backward:
            out.backward(grad)
    assert (forward.count, backward.count) == (1, int(needed[0]))


@every_backend
@pytest.mark.parametrize("argument", NAMES)
def test_k23_second_differentiation_is_refused(name, argument):
    arguments = random_arguments((1, 2, 3, 4))
    with backend(name):
        total = segment_film_gate(*arguments).square().sum()
        (first,) = torch.autograd.grad(total, leaves_of(arguments)[NAMES.index(argument)], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k24_saves_no_map_but_the_one_it_was_given(name, dtype):
    arguments = random_arguments((2, 5, 16, 16), dtype)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.numel(), t.data_ptr())), lambda _: None)
    with hooks, backend(name):
        with torch.no_grad():
            segment_film_gate(*arguments)
        with torch.inference_mode():
            segment_film_gate(*arguments)
        assert saved == []
        segment_film_gate(*arguments)
        most = 2 * 16 * 16  # one number per position, or less
        maps = {pointer for size, pointer in saved if size > most}
        assert maps == {arguments[0].data_ptr()}
        saved.clear()
        segment_film_gate(*arguments[:2], *(value.detach() for value in arguments[2:]))
        assert all(size <= most for size, _ in saved)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    arguments = random_arguments()

    def run():
        out = segment_film_gate(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), leaves_of(arguments))]

    with backend(name):
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


@every_backend
@every_layout
def test_results_repeat_bit_for_bit(name, layout):
    def run():
        arguments = random_arguments((2, 5, 33, 41), layout=layout)
        with backend(name):
            out = segment_film_gate(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), leaves_of(arguments))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("argument", NAMES)
def test_k1_k4_refuses_types_it_cannot_compute_in(argument, bad):
    arguments = dict(zip(ARGUMENTS, random_arguments((1, 2, 3, 4), needed=NOTHING), strict=True))
    with pytest.raises(TypeError, match=rf"segment_film_gate: {argument} is torch\..*expected one of float32"):
        segment_film_gate(**{**arguments, argument: arguments[argument].to(bad)})
    with pytest.raises(TypeError, match=rf"{argument} is a numpy\.ndarray; expected a torch\.Tensor"):
        segment_film_gate(**{**arguments, argument: arguments[argument].numpy()})


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.float32, torch.int8], ids=str)
def test_k4_refuses_labels_of_another_type(bad):
    arguments = random_arguments()
    with pytest.raises(TypeError, match=r"segments is torch\..*; expected uint8, .*\.to\(torch\.uint8\)"):
        segment_film_gate(arguments[0], arguments[1].to(bad), *arguments[2:])
    with pytest.raises(TypeError, match=r"segments is a numpy\.ndarray; expected a torch\.Tensor"):
        segment_film_gate(arguments[0], arguments[1].numpy(), *arguments[2:])


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("features", (3, 4, 5), r"features has shape \(3, 4, 5\); expected \(B, C, H, W\); add .* features\[None\]$"),
        ("features", (2, 3, 4, 5, 6), r"features has shape \(2, 3, 4, 5, 6\); .*fold .* features\.flatten\(2, 3\)$"),
        ("segments", (2, 4, 4), r"segments has shape \(2, 4, 4\); expected \(B, H, W\) = \(2, 4, 5\) for features of"),
        ("segments", (2, 17, 4, 5), r"segments has shape \(2, 17, 4, 5\); expected \(B, H, W\)"),
        ("shared", (2, 4), r"shared has shape \(2, 4\); expected \(B, C\) = \(2, 3\) for features of"),
        ("segment_scores", (3, 17), r"segment_scores has shape \(3, 17\); expected \(B, S\) = \(2, 17\)"),
        ("segment_scores", (17,), r"segment_scores has shape \(17,\); expected \(B, S\) = \(2, 17\)"),
        ("segment_scores", (2, 256), r"segment_scores has shape \(2, 256\); expected \(B, S\) = \(2, 255\)"),
        ("direction", (2, 3), r"direction has shape \(2, 3\); expected \(C,\) = \(3,\)"),
        ("weights", (2,), r"weights has shape \(2,\); expected \(B, 2\) = \(2, 2\)"),
        ("scale", (1, 3), r"scale has shape \(1, 3\); expected \(B, C\)"),
        ("shift", (3,), r"shift has shape \(3,\); expected \(B, C\)"),
    ],
)
def test_k5_refuses_other_shapes_and_devices(argument, shape, message):
    arguments = dict(zip(ARGUMENTS, random_arguments(), strict=True))
    with pytest.raises(ShapeError, match=message):
        segment_film_gate(**{**arguments, argument: torch.zeros(shape, dtype=arguments[argument].dtype)})
    with pytest.raises(ShapeError, match=f"{argument} on meta"):
        segment_film_gate(**{**arguments, argument: arguments[argument].to("meta")})


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_labels_above_the_number_of_segments_are_refused(name):
    arguments = random_arguments()
    arguments[1][1, 3, 4] = 18
    message = r"segment_film_gate: segments: expected 0 for no segment, or 1 to 17, .*, got label 18; give .* or set"
    with backend(name), pytest.raises(DataError, match=message):
        segment_film_gate(*arguments)


@interpreted
@every_layout
def test_kernels_count_labels_above_the_number_of_segments_as_none(layout):
    """On a GPU nobody looks at labels: no score is read beyond the last one, where there is NaN here."""
    features, segments, *small = random_arguments((2, 5, 9, 33), layout=layout)
    beyond = torch.cat([small[1].detach(), torch.full((2, 240), float("nan"))], dim=1)
    small[1] = beyond[:, :17].requires_grad_()
    strange = torch.where(segments == 3, 255, torch.where(segments == 4, 18, segments)).to(torch.uint8)
    known = torch.where(strange > 17, 0, strange)
    leaves = [features, *small]
    results = []
    for labels in (strange, known):
        out = torch.ops.trifuse.segment_film_gate(features, labels, *small)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert all(value.isfinite().all() for value in results[0])


def test_compiled_code_counts_them_as_none_too():
    arguments = random_arguments()
    torch._dynamo.reset()
    compiled = torch.compile(segment_film_gate, fullgraph=True, backend="eager")
    strange = torch.where(arguments[1] == 3, 255, arguments[1]).to(torch.uint8)
    known = torch.where(arguments[1] == 3, 0, arguments[1])
    expected = segment_film_gate_reference(arguments[0], known, *arguments[2:])
    torch.testing.assert_close(compiled(arguments[0], strange, *arguments[2:]), expected)
    torch.testing.assert_close(segment_film_gate_reference(arguments[0], strange, *arguments[2:]), expected)
