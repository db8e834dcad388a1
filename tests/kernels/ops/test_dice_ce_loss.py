"""Dice and cross-entropy of one map: worked examples, published numbers, both flavours, all three backends."""

from __future__ import annotations

import math

import pytest
import torch
from golden_numbers import fixture_names, load_fixture, relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.kernels import ShapeError, backend, dice_ce_loss, dice_ce_loss_reference
from trifuse.kernels.ops._segmentation_sums import segmentation_sums
from trifuse.kernels.testing import assert_op_matches, tensors

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine test_on_gpu.py runs the kernels")
BACKENDS = (pytest.param("triton", marks=interpreted), "torch", "reference")
FLAVOURS = ("nnunet", "transunet")


def random_arguments(samples, classes, size, full=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *size, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(0, max(2, classes), (samples, *(full or size)), generator=generator)


@pytest.mark.parametrize("name", BACKENDS)
def test_both_flavours_of_a_2_by_2_image_by_hand(name):
    """p of class 1 is 3/4, 3/4, 1/4, 1/4; truth is 1, 0, 1, 0."""
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1] = math.log(3) * torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    target = torch.tensor([[[1, 0], [1, 0]]])
    cross_entropy = -2 * (math.log(3 / 4) + math.log(1 / 4)) / 4
    with backend(name):
        nnunet = dice_ce_loss(logits, target).item()
        transunet = dice_ce_loss(logits, target, flavour="transunet", w_ce=0.6, w_dice=0.4).item()
    # intersection 3/4 + 1/4; sizes 2 and 2; squares 2 (9 + 1) / 16 and 2; both classes look alike
    assert nnunet == pytest.approx(cross_entropy - (2 + 1e-5) / (4 + 1e-5), rel=1e-6)
    assert transunet == pytest.approx(0.6 * cross_entropy + 0.4 * (1 - (2 + 1e-5) / (3.25 + 1e-5)), rel=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_batch_dice_pools_and_sample_dice_averages(name):
    """Class 1 is all of the first sample and predicted there; it is absent from the second, but predicted."""
    logits = torch.full((2, 2, 1, 2), 0.0)
    logits[:, 1] = 50
    target = torch.tensor([[[1, 1]], [[0, 0]]])
    with backend(name):
        pooled = dice_ce_loss(logits, target, w_ce=0.0).item()
        apart = dice_ce_loss(logits, target, w_ce=0.0, batch_dice=False).item()
    assert pooled == pytest.approx(-4 / 6, rel=1e-5)
    assert apart == pytest.approx(-(1 + 1e-5 / 2) / 2, rel=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("fixture", [name for name in fixture_names("losses") if "nnunet_dc_ce" in name])
def test_golden_nnunet(name, fixture):
    fixture = load_fixture(fixture)
    constructor = fixture.facts["constructor"]
    dtypes = (torch.float32,) if name == "triton" else (torch.float32, torch.float64)
    for dtype in dtypes:
        logits = fixture.tensors["logits"].to(dtype, copy=True).requires_grad_()
        with backend(name):
            loss = dice_ce_loss(
                logits,
                fixture.tensors["target"].squeeze(1),
                batch_dice=constructor["soft_dice_kwargs"]["batch_dice"],
                ignore_index=constructor.get("ignore_label"),
            )
        loss.backward()
        # Upstream sums in float32 even here: its stored values carry that noise.
        assert relative_l2(loss, fixture.tensors["loss"].squeeze()) < 2e-6
        assert relative_l2(logits.grad, fixture.tensors["dlogits"]) < 2e-6


def monai_loss(logits, target, constructor):
    """MONAI's DiceCELoss from our sums: its Dice is neither of our flavours, but is made of the same sums."""
    sums = segmentation_sums([logits], target, squared=constructor.get("squared_pred", False))
    first = 0 if constructor.get("include_background", True) else 1
    parts = [sums.intersection[:, 0], sums.predicted[:, 0], sums.true]
    intersection, predicted, true = (x[:, first:].sum(0) if constructor.get("batch") else x[:, first:] for x in parts)
    dice = (2 * intersection + 1e-5) / (predicted + true + 1e-5)
    nll = sums.nll.sum() / target.numel()
    return constructor.get("lambda_ce", 1) * nll + constructor.get("lambda_dice", 1) * (1 - dice).mean()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("fixture", [name for name in fixture_names("losses") if "monai" in name])
def test_golden_monai(name, fixture):
    fixture = load_fixture(fixture)
    for dtype in (torch.float32,) if name == "triton" else (torch.float32, torch.float64):
        logits = fixture.tensors["logits"].to(dtype, copy=True).requires_grad_()
        with backend(name):
            loss = monai_loss(logits, fixture.tensors["target"].squeeze(1), fixture.facts["constructor"])
        loss.backward()
        # Upstream mixes float32 into float64 here: in the README's own comparison it is off by 6e-9.
        bound = 3e-8 if dtype == torch.float64 else 2e-6
        assert relative_l2(loss, fixture.tensors["loss"].squeeze()) < bound
        assert relative_l2(logits.grad, fixture.tensors["dlogits"]) < bound


@pytest.mark.parametrize("name", BACKENDS)
def test_golden_definitions_compared(name):
    fixture = load_fixture("losses/dice_definitions_compared")
    logits, target = fixture.tensors["logits"], fixture.tensors["target"].squeeze(1)
    dice_only = {"w_ce": 0.0}
    with backend(name):
        ours = {
            "merit_dice(incl. background, squared denominators, over batch)": dice_ce_loss(
                logits, target, flavour="transunet", **dice_only
            ),
            "monai_dice(incl. background, per sample, smooth 1e-5)": monai_loss(logits, target, {"lambda_ce": 0}),
            "monai_dice(no background)": monai_loss(logits, target, {"lambda_ce": 0, "include_background": False}),
            "monai_dice(batch=True,squared_pred=True)": dice_ce_loss(logits, target, flavour="transunet", **dice_only),
            "nnunet 1+loss (no background, per sample)": 1
            + dice_ce_loss(logits, target, batch_dice=False, **dice_only),
            "nnunet 1+loss (no background, batch)": 1 + dice_ce_loss(logits, target, **dice_only),
            "cross entropy": dice_ce_loss(logits, target, w_dice=0.0),
        }
    assert {key: float(value) for key, value in ours.items()} == pytest.approx(fixture.facts["values"], rel=1e-6)


@pytest.mark.parametrize("name", BACKENDS[:2])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("shape", "full", "ignore_index"),
    [((2, 3, 5, 4), None, None), ((2, 1, 3, 4), (5, 6), None), ((1, 2, 2, 3), (3, 3), 1), ((1, 32, 2, 1), None, 255)],
    ids=str,
)
def test_values_and_gradient(name, flavour, shape, full, ignore_index):
    logits, target = random_arguments(*shape[:2], shape[2:], full)
    with backend(name):
        for batch_dice in (True, False):
            assert_op_matches(
                dice_ce_loss,
                dice_ce_loss_reference,
                logits,
                target,
                flavour=flavour,
                batch_dice=batch_dice,
                ignore_index=ignore_index,
                atol=2e-6,
            )


@pytest.mark.parametrize("name", BACKENDS[:2])
@settings(max_examples=8)
@given(data=st.data())
def test_property_any_shape_layout_type_and_gradients(name, data):
    samples, classes = data.draw(st.integers(0, 2), label="B"), data.draw(st.integers(1, 3), label="K")
    size = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 5)), label="(H, W)")
    coarse = tuple(data.draw(st.integers(1, side)) for side in size) if all(size) else size
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    logits = data.draw(tensors((samples, classes, *coarse), dtypes=dtypes, expanded=True), label="logits")
    flavour = data.draw(st.sampled_from(FLAVOURS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    target = torch.randint(0, max(2, classes), (samples, *size), generator=generator)
    options = {"flavour": flavour, "ignore_index": data.draw(st.sampled_from([None, 0, 1]))}
    # A gradient may be stored in bfloat16, whose last bits the interpreter cuts off instead of rounding.
    atol = 4e-6 if logits.dtype == torch.float32 else 4e-2
    with backend(name):
        assert_op_matches(dice_ce_loss, dice_ce_loss_reference, logits, target, atol=atol, **options)


def test_gradcheck_reference_and_cpu_path():
    logits, target = random_arguments(2, 3, (2, 3), (3, 4), dtype=torch.float64)
    for op in (dice_ce_loss, dice_ce_loss_reference):
        for flavour in FLAVOURS:
            assert torch.autograd.gradcheck(lambda x, op=op, f=flavour: op(x, target, flavour=f), logits)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_saves_the_arguments_and_small_sums(name):
    logits, target = random_arguments(2, 3, (8, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None), backend(name):
        with torch.no_grad():
            dice_ce_loss(logits, target)
        assert saved == []
        dice_ce_loss(logits, target)
    large = {t.data_ptr() for t in saved if t.numel() > 50}
    assert large == {logits.data_ptr(), target.data_ptr()}


def test_rejects():
    logits, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"flavour: expected one of .*nnunet.*, got 'monai'"):
        dice_ce_loss(logits, target, flavour="monai")
    with pytest.raises(ShapeError, match=r"logits has shape \(3, 4, 4\); expected \(B, K, h, w\)"):
        dice_ce_loss(logits[0], target)
    with pytest.raises(ShapeError, match=r"logits is \(4, 4\); expected at most the target's size \(4, 3\)"):
        dice_ce_loss(logits, target[:, :, :3])
    with pytest.raises(ShapeError, match=r"expected a target \(B, H, W\) for logits .* got \(1, 4, 4\)"):
        dice_ce_loss(logits, target[:1])
    with pytest.raises(TypeError, match=r"target of type torch.int64, got torch.uint8"):
        dice_ce_loss(logits, target.byte())
    with pytest.raises(TypeError, match=r"logits is torch.int64; expected one of float32"):
        dice_ce_loss(logits.long(), target)
    with pytest.raises(TypeError, match=r"target is a builtins.list"):
        dice_ce_loss(logits, target.tolist())
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"classes 0 to 2 in the target, got \[{wrong}\]"):
            dice_ce_loss(logits, torch.full_like(target, wrong))


@pytest.mark.parametrize("name", BACKENDS[:2])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_k20_a_class_is_ruled_out_of_a_coarse_map_by_a_large_negative_number(name, flavour):
    logits, target = random_arguments(2, 3, (4, 4), (8, 8))
    target, without = target.clamp(max=1), logits.detach()[:, :2]
    with torch.no_grad(), backend(name):
        logits[:, 2] = -1e4
        ruled_out = dice_ce_loss(logits, target, flavour=flavour, w_dice=0)
        torch.testing.assert_close(ruled_out, dice_ce_loss(without, target, flavour=flavour, w_dice=0))
        logits[:, 2] = -torch.inf
        assert dice_ce_loss(logits, target, flavour=flavour).isnan()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize(("flavour", "least"), [("nnunet", -0.5), ("transunet", 0.0)])
@pytest.mark.parametrize("name", BACKENDS)
def test_k12_where_no_pixel_counts_the_loss_is_the_least_possible(name, flavour, least, batch_dice):
    logits, target = random_arguments(2, 3, (4, 4))
    options = {"flavour": flavour, "batch_dice": batch_dice, "w_dice": 0.5, "ignore_index": 0}
    with backend(name):
        loss = dice_ce_loss(logits, torch.zeros_like(target), **options)
        assert loss.item() == pytest.approx(least, abs=1e-6)
        assert not torch.autograd.grad(loss, logits)[0].any()
        if batch_dice or name != "reference":  # the definition's mean of no samples is NaN
            empty = dice_ce_loss(logits[:0], target[:0], **options).item()
            assert empty == pytest.approx(least if batch_dice else least + 0.5, abs=1e-6)
