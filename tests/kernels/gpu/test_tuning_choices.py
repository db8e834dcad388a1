"""Every choice of every launcher computes the same."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest
import torch
from toy_launcher import interpreted

from trifuse import kernels
from trifuse.kernels import backend
from trifuse.kernels.gpu import tuning
from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss
from trifuse.kernels.testing import assert_op_matches

pytest.importorskip("triton", reason="its kernels are what is tuned")


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tunables(op: str) -> list[tuning.Tunable]:
    """Return the launchers with choices that an operator comes by."""
    launchers = {value.name: value for file in GPU_FILES for value in vars(file).values() if is_tunable(value)}
    return [launchers[name] for name in CHECKS[op][0]]


def is_tunable(value: object) -> bool:
    return isinstance(value, tuning.Tunable)


def check(op: str, *args, **kwargs) -> None:
    assert_op_matches(getattr(kernels, op), getattr(kernels, f"{op}_reference"), *args, **kwargs)


def check_fusion() -> None:
    maps, logits = [values(1, 5, 211, seed=i) for i in (1, 2)], values(2)
    for selection in ((), (torch.tensor([1, 0]),)):
        check("weighted_block_fusion", maps, logits, *selection, atol=1e-4)


def check_sums() -> None:
    """A coarse map, whose rows are walked over, and a full one, which is one line of pixels."""
    check("mutation_loss", [values(1, 2, 4, 2)], torch.arange(17 * 3).view(1, 17, 3) % 2, atol=1e-5)
    check("mutation_loss", [values(1, 2, 35, 31)], torch.arange(35 * 31).view(1, 35, 31) % 2, atol=1e-5)
    maps, target = [values(1, 2, 17, 3), values(1, 2, 9, 2)], torch.arange(17 * 3).view(1, 17, 3) % 2
    targets, options = [target, target[:, ::2, ::2]], {"batch_dice": True, "w_ce": 1.0, "w_dice": 1.0}
    loss = deep_supervision_loss(maps, targets, [1.0, 0.5], **options)
    with backend("torch"):
        expected = deep_supervision_loss(maps, targets, [1.0, 0.5], **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(result, maps) for result in (loss, expected)))


def check_segments() -> None:
    segments = (torch.arange(17 * 17).view(1, 17, 17) % 4).to(torch.uint8)
    small = [values(*shape, seed=i) for i, shape in enumerate(((1, 5), (1, 3), (5,), (1, 2), (1, 5), (1, 5)))]
    check("segment_film_gate", values(1, 5, 17, 17, seed=9), segments, *small, atol=5e-4)


def check_labels() -> None:
    maps, size = [values(1, 3, 2, 3)], (2, 300)
    assert torch.equal(kernels.upsample_argmax(maps, size), kernels.upsample_argmax_reference(maps, size))


GPU_FILES = [
    import_module(f"trifuse.kernels.gpu.{path.stem}") for path in sorted(Path(tuning.__file__).parent.glob("[a-z]*.py"))
]
# For each operator the launchers that it comes by, and a comparison with the reference on more than one tile.
CHECKS = {
    "batch_norm_activation": (
        ("instance_norm_leaky_relu.normalise", "instance_norm_leaky_relu_backward.map_gradient"),
        lambda: check(
            "batch_norm_activation", values(2, 1, 97, 97), None, None, values(1, seed=1), values(1, seed=2), atol=1e-3
        ),
    ),
    "channel_gate": (
        ("gates.gate_forward",),
        lambda: check("channel_gate", values(1, 2, 33, 65), values(1, 2, seed=1), atol=2e-4),
    ),
    "depthwise_multi_kernel": (
        ("depthwise_multi_kernel.convolve", "depthwise_multi_kernel_backward.weight_gradients"),
        lambda: check("depthwise_multi_kernel", values(1, 2, 5, 3), [values(2, 1, 3, 3, seed=1)], atol=1e-5),
    ),
    "dilated_attention": (
        ("dilated_attention.forward", "dilated_attention.backward"),
        lambda: check(
            "dilated_attention", *(values(1, 5, 14, 8, seed=i) for i in range(3)), num_heads=1, dilations=(1,)
        ),
    ),
    "instance_norm_leaky_relu": (
        ("instance_norm_leaky_relu.normalise", "instance_norm_leaky_relu_backward.map_gradient"),
        lambda: check(
            "instance_norm_leaky_relu", values(1, 1, 130, 130), values(1, seed=1), values(1, seed=2), atol=1e-3
        ),
    ),
    "monte_carlo_pool": (
        ("monte_carlo_pool.pool_forward", "monte_carlo_pool.pool_backward"),
        lambda: check("monte_carlo_pool", values(1, 2, 33, 65), scale=1, cell=0),
    ),
    "segment_film_gate": (("segment_film_gate.forward", "segment_film_gate_backward.map_pass"), check_segments),
    "segmentation_sums": (
        (
            "segmentation_sums.forward",
            "segmentation_loss.forward",
            "segmentation_sums_backward.backward",
            "deep_supervision_loss.forward",
            "deep_supervision_loss.backward",
        ),
        check_sums,
    ),
    "spatial_gate": (
        ("gates.gate_forward", "gates.spatial_gate_backward"),
        lambda: check("spatial_gate", values(1, 40, 5, 13), values(1, 1, 5, 13, seed=1), atol=1e-5),
    ),
    "temporal_film_gate": (
        ("temporal_film_gate.forward",),
        lambda: check(
            "temporal_film_gate", values(1, 2, 33, 65), *(values(1, 2, seed=i) for i in range(1, 5)), atol=2e-4
        ),
    ),
    "upsample_argmax": (("upsample_argmax.forward",), check_labels),
    "weighted_block_fusion": (
        ("weighted_block_fusion.forward", "weighted_block_fusion.backward"),
        check_fusion,
    ),
}


def test_every_launcher_with_choices_is_compared():
    found = {value.name for file in GPU_FILES for value in vars(file).values() if is_tunable(value)}
    assert found == {name for names, _ in CHECKS.values() for name in names}


@interpreted
@pytest.mark.parametrize("op", CHECKS)
def test_every_choice_matches_the_reference(op, monkeypatch):
    """All launchers of an operator take their first choice, then all their second, and so on."""
    launchers = tunables(op)
    taken = {launcher.name: [] for launcher in launchers}
    for launcher in launchers:

        def record(choice, *args, launcher=launcher, launch=launcher._launcher, **kwargs):
            taken[launcher.name].append(choice)
            return launch(choice, *args, **kwargs)

        monkeypatch.setattr(launcher, "_launcher", record)
    for n in range(max(len(launcher.choices) for launcher in launchers)):
        with ExitStack() as stack:
            for launcher in launchers:
                stack.enter_context(tuning.forced(launcher, launcher.choices[n % len(launcher.choices)]))
            stack.enter_context(backend("triton"))
            CHECKS[op][1]()
    for launcher in launchers:
        assert len(launcher.choices) > 1
        assert all(choice in taken[launcher.name] for choice in launcher.choices)
