"""The temporal FiLM gate: what it computes and keeps, that it repeats, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from forms import asked_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trifuse.kernels import ShapeError, backend, temporal_film_gate, temporal_film_gate_reference
from trifuse.kernels.testing import assert_op_matches

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch")
NAMES = ("features", "ecg", "weights", "scale", "shift")
NOTHING = (False,) * 5
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_format = pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)


def random_arguments(shape, dtype=torch.float32, needed=(True,) * 5, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    small = [torch.randn(len(features), n, generator=generator) for n in (shape[1], 2, shape[1], shape[1])]
    return [value.requires_grad_(need) for value, need in zip((features, *small), needed, strict=True)]


@every_backend
@every_format
def test_k22_only_the_gradients_asked_for(name, memory_format):
    for needed in asked_gradients(5):
        arguments = random_arguments((1, 2, 2, 3), needed=needed, memory_format=memory_format)
        with backend(name):
            assert_op_matches(temporal_film_gate, temporal_film_gate_reference, *arguments, atol=1e-5)
            out = temporal_film_gate(*arguments)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.sum().backward()
        assert tuple(value.grad is not None for value in arguments) == needed


class NewMaps(TorchDispatchMode):
    """Counts the results of a map's size that are not another tensor's memory."""

    def __init__(self, elements, known):
        super().__init__()
        self.elements, self.memory = elements, {value.data_ptr() for value in known}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.numel() == self.elements:
                self.count += value.data_ptr() not in self.memory
                self.memory.add(value.data_ptr())
        return result


@every_backend
@pytest.mark.parametrize("needed", [(True,) * 5, (False, *(True,) * 4), (True, *(False,) * 4)], ids=str)
def test_k22_makes_a_map_forward_and_one_backward_if_it_is_asked_for(name, needed):
    arguments = random_arguments((2, 3, 8, 8), needed=needed)
    grad = torch.randn_like(arguments[0])
    with backend(name):
        with NewMaps(grad.numel(), [*arguments, grad]) as forward:
            out = temporal_film_gate(*arguments)
        with NewMaps(grad.numel(), [*arguments, grad, out]) as backward:
            out.backward(grad)
    assert (forward.count, backward.count) == (1, int(needed[0]))


@every_backend
@pytest.mark.parametrize("argument", NAMES)
def test_k23_second_differentiation_is_refused(name, argument):
    arguments = random_arguments((1, 2, 3, 4))
    with backend(name):
        total = temporal_film_gate(*arguments).square().sum()
        (first,) = torch.autograd.grad(total, arguments[NAMES.index(argument)], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k24_saves_no_map_but_the_one_it_was_given(name, dtype):
    arguments = random_arguments((2, 3, 8, 8), dtype)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.numel(), t.data_ptr())), lambda _: None)
    with hooks, backend(name):
        with torch.no_grad():
            temporal_film_gate(*arguments)
        with torch.inference_mode():
            temporal_film_gate(*arguments)
        assert saved == []
        temporal_film_gate(*arguments)
        maps = {pointer for size, pointer in saved if size > 2 * 3}
        assert maps == {arguments[0].data_ptr()}
        saved.clear()
        temporal_film_gate(arguments[0], *(value.detach() for value in arguments[1:]))
        assert all(size <= 2 * 3 for size, _ in saved)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_k25_autocast_changes_nothing(name):
    arguments = random_arguments((2, 3, 4, 5))

    def run():
        out = temporal_film_gate(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), arguments)]

    with backend(name):
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


@every_backend
@every_format
def test_results_repeat_bit_for_bit(name, memory_format):
    def run():
        arguments = random_arguments((2, 5, 33, 41), memory_format=memory_format)
        with backend(name):
            out = temporal_film_gate(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), arguments)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("argument", NAMES)
def test_k1_k4_refuses_types_it_cannot_compute_in(argument, bad):
    arguments = dict(zip(NAMES, random_arguments((1, 2, 3, 4), needed=NOTHING), strict=True))
    with pytest.raises(TypeError, match=rf"temporal_film_gate: {argument} is torch\..*expected one of float32"):
        temporal_film_gate(**{**arguments, argument: arguments[argument].to(bad)})
    with pytest.raises(TypeError, match=rf"{argument} is a numpy\.ndarray; expected a torch\.Tensor"):
        temporal_film_gate(**{**arguments, argument: arguments[argument].numpy()})


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("features", (3, 4, 5), r"features has shape \(3, 4, 5\); expected \(B, C, H, W\); add .* features\[None\]$"),
        ("features", (2, 3, 4, 5, 6), r"features has shape \(2, 3, 4, 5, 6\); .*fold .* features\.flatten\(2, 3\)$"),
        ("ecg", (2, 4), r"ecg has shape \(2, 4\); expected \(B, C\) = \(2, 3\) for features of shape \(2, 3, 4, 5\)"),
        ("ecg", (2, 3, 4, 5), r"ecg has shape \(2, 3, 4, 5\)"),
        ("weights", (2,), r"weights has shape \(2,\); expected \(B, 2\) = \(2, 2\)"),
        ("scale", (1, 3), r"scale has shape \(1, 3\); expected \(B, C\)"),
        ("shift", (3,), r"shift has shape \(3,\); expected \(B, C\)"),
    ],
)
def test_k5_refuses_other_shapes_and_devices(argument, shape, message):
    arguments = dict(zip(NAMES, random_arguments((2, 3, 4, 5)), strict=True))
    with pytest.raises(ShapeError, match=message):
        temporal_film_gate(**{**arguments, argument: torch.zeros(shape)})
    with pytest.raises(ShapeError, match=f"{argument} on meta"):
        temporal_film_gate(**{**arguments, argument: arguments[argument].to("meta")})
