"""Losses against nnU-Net's own numbers and against loops that spell the definition out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trifuse.architectures.training.losses import (
    MutationLoss,
    SegmentationLoss,
    deep_supervision_weights,
    dice_ce_nnunet,
    dice_nnunet,
)
from trifuse.kernels import mutation_loss
from trifuse.kernels.errors import ShapeError

GOLDEN = Path(__file__).parents[2] / "golden" / "losses"
RELATIVE = 2e-7  # nnU-Net's stored values carry the noise of its float32 sums; gradients relative to their largest


def assert_near(actual: Tensor, expected: Tensor, what: str, relative: float = RELATIVE) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=relative * scale, msg=lambda text: f"{what}: {text}", check_dtype=False
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("nnunet_dc_ce_*.json")))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_nnunet(name, dtype):
    constructor = json.loads((GOLDEN / f"{name}.json").read_text())["constructor"]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    logits = tensors["logits"].to(dtype).requires_grad_()
    loss = dice_ce_nnunet(
        logits,
        tensors["target"].squeeze(1),
        batch_dice=constructor["soft_dice_kwargs"]["batch_dice"],
        ignore_index=constructor.get("ignore_label"),
    )
    loss.backward()
    relative = 1e-6 if dtype == torch.float32 else RELATIVE
    assert_near(loss, tensors["loss"].squeeze(), "loss", relative)
    assert_near(logits.grad, tensors["dlogits"], "gradient of the logits", 10 * relative)


def test_golden_deep_supervision():
    tensors = load_file(GOLDEN / "nnunet_deep_supervision_4.safetensors")
    logits = [tensors[f"logits{i}"].double().requires_grad_() for i in range(4)]
    targets = [tensors[f"target{i}"].squeeze(1) for i in range(4)]
    weights = deep_supervision_weights(4)
    loss = sum(w * dice_ce_nnunet(x, t) for w, x, t in zip(weights, logits, targets, strict=True))
    assert_near(loss, tensors["loss"].squeeze(), "loss of the given targets")
    loss.backward()
    for i in range(3):
        assert_near(logits[i].grad, tensors[f"dlogits{i}"], f"gradient of output {i}", 10 * RELATIVE)


def test_deep_supervision_resizes_the_target_and_leaves_the_last_output_alone():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 8, 8), generator=generator)
    outputs = [torch.randn(2, 3, s, s, generator=generator, requires_grad=True) for s in (8, 4, 2)]
    loss = SegmentationLoss()(outputs, {"target": target}, None)
    expected = 2 / 3 * dice_ce_nnunet(outputs[0], target) + 1 / 3 * dice_ce_nnunet(outputs[1], target[:, ::2, ::2])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert outputs[2].grad is None
    assert deep_supervision_weights(6) == [w / 1.9375 for w in (1, 0.5, 0.25, 0.125, 0.0625, 0)]


def loop_dice_ce(logits, target, batch_dice, ignore_index=None):
    """The definition, pixel by pixel, in Python floats."""
    samples, classes, height, width = logits.shape
    sums, surprise, pixels = {}, 0.0, 0
    for b in range(samples):
        for y in range(height):
            for x in range(width):
                truth = int(target[b, y, x])
                if truth == ignore_index:
                    continue
                values = [float(v) for v in logits[b, :, y, x]]
                if classes == 1:
                    p = [0.0, 1 / (1 + math.exp(-values[0]))]
                    p[0] = 1 - p[1]
                else:
                    total = sum(math.exp(v) for v in values)
                    p = [math.exp(v) / total for v in values]
                surprise -= math.log(p[truth])
                pixels += 1
                for c in range(1, len(p)):
                    part = sums.setdefault((0 if batch_dice else b, c), [0.0, 0.0, 0.0])
                    part[0] += p[c] * (truth == c)
                    part[1] += p[c]
                    part[2] += truth == c
    dice = [(2 * tp + 1e-5) / max(p + g + 1e-5, 1e-8) for tp, p, g in sums.values()]
    return surprise / pixels, sum(dice) / len(dice)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize(("classes", "ignore_index"), [(1, None), (2, None), (3, None), (3, 7), (3, 0)])
def test_reference_is_the_definition(classes, ignore_index, batch_dice):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, classes, 5, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(0, max(classes, 2), (3, 5, 4), generator=generator)
    if ignore_index == 7:
        target[:, 0] = 7
    ce, dice = loop_dice_ce(logits, target, batch_dice, ignore_index)
    options = {"batch_dice": batch_dice, "ignore_index": ignore_index}
    assert float(dice_ce_nnunet(logits, target, w_ce=0.3, w_dice=0.7, **options)) == pytest.approx(
        0.3 * ce - 0.7 * dice, rel=1e-12
    )
    assert float(dice_nnunet(logits, target, **options)) == pytest.approx(-dice, rel=1e-12)


def test_absent_class_is_perfect_if_not_predicted_and_worthless_if_predicted():
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 50
    assert float(dice_nnunet(logits, target)) == pytest.approx(-1, abs=1e-5)
    assert float(dice_nnunet(-logits, target)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("classes", [1, 3])
def test_sample_of_weight_zero_counts_for_nothing(classes, batch_dice):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, classes, 4, 4, generator=generator, requires_grad=True)
    target = torch.randint(0, max(classes, 2), (3, 4, 4), generator=generator)
    with_stand_in = dice_ce_nnunet(logits, target, batch_dice=batch_dice, sample_weight=torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(with_stand_in, dice_ce_nnunet(logits[:2], target[:2], batch_dice=batch_dice))
    with_stand_in.backward()
    assert bool((logits.grad[2] == 0).all())
    assert bool((logits.grad[:2] != 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    logits = (8 * torch.randn(2, 2, 256, 256, generator=generator)).to(dtype)  # sums far above 65504
    target = torch.randint(0, 2, (2, 256, 256), generator=generator)
    loss = dice_ce_nnunet(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dice_ce_nnunet(logits.double(), target), rtol=1e-5, atol=0)


def test_gradcheck():
    generator = torch.Generator().manual_seed(4)
    for classes, batch_dice in [(1, True), (3, True), (3, False)]:
        logits = torch.randn(2, classes, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(0, max(classes, 2), (2, 3, 3), generator=generator)
        assert torch.autograd.gradcheck(lambda x: dice_ce_nnunet(x, target, batch_dice=batch_dice), logits)  # noqa: B023


def test_rejects():
    logits, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"got \(2, 3, 4, 4\) and \(2, 4, 5\)"):
        dice_ce_nnunet(logits, torch.zeros(2, 4, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"torch.int64, got torch.uint8"):
        dice_ce_nnunet(logits, target.byte())
    for wrong in (3, -1, 255):
        with pytest.raises(ValueError, match=rf"classes 0 to 2 in the target, got \[{wrong}\]"):
            dice_ce_nnunet(logits, torch.full_like(target, wrong))
    with pytest.raises(ValueError, match=r"classes 0 to 1 in the target, got \[2\]"):
        dice_ce_nnunet(logits[:, :1], torch.full_like(target, 2))
    ignored = target.index_fill(2, torch.tensor([0]), 255)
    assert dice_ce_nnunet(logits, ignored, ignore_index=255).isfinite()


def test_any_number_of_spatial_axes():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    target = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    expected = dice_ce_nnunet(logits.flatten(2, 3), target.flatten(1, 2))
    torch.testing.assert_close(dice_ce_nnunet(logits, target), expected)
    torch.testing.assert_close(dice_ce_nnunet(logits.flatten(2), target.flatten(1)), expected)


def in_two_halves(loss, outputs, batch):
    """The loss as either of two ranks sees it; each rank has half of the samples, and reduce adds up their sums."""
    halves = [slice(0, 2), slice(2, None)]
    sums = []

    def record(values):
        sums.append(values)
        return values

    for half in halves:
        loss([x[half] for x in outputs], {key: value[half] for key, value in batch.items()}, record)
    calls = len(sums) // 2
    others = iter(sums[calls:])
    return loss(
        [x[halves[0]] for x in outputs],
        {key: value[halves[0]] for key, value in batch.items()},
        lambda values: values + next(others),
    )


@pytest.mark.parametrize("subsets", ["mutation", "deep_supervision", "last"])
def test_mutation_loss_of_two_ranks_is_that_of_the_whole_batch(subsets):
    generator = torch.Generator().manual_seed(6)
    outputs = [torch.randn(5, 3, s, s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (2, 4)]
    batch = {"target": torch.randint(0, 3, (5, 8, 8), generator=generator)}
    loss = MutationLoss(subsets=subsets, ignore_index=1)
    whole = loss(outputs, batch, None)
    torch.testing.assert_close(whole, mutation_loss(outputs, batch["target"], subsets=subsets, ignore_index=1))
    split = in_two_halves(loss, outputs, batch)
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(
        torch.autograd.grad(split, outputs[-1]), torch.autograd.grad(whole, outputs[-1]), rtol=1e-10, atol=0
    )


def test_mutation_loss_of_one_output_and_of_silenced_samples():
    generator = torch.Generator().manual_seed(7)
    outputs = torch.randn(3, 3, 4, 4, generator=generator, requires_grad=True)
    target = torch.randint(0, 3, (3, 8, 8), generator=generator)
    batch = {"target": target, "sample_weight": torch.tensor([1.0, 1.0, 0.0])}
    loss = MutationLoss(reduction="mean")(outputs, batch, None)
    torch.testing.assert_close(loss, mutation_loss([outputs[:2]], target[:2]))
    loss.backward()
    assert bool((outputs.grad[2] == 0).all())
    assert bool((outputs.grad[:2] != 0).any())
