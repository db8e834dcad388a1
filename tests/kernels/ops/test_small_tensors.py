"""Small tensors on a CPU, left to PyTorch's own gradients: values and gradients are those of the definition."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from operator_calls import calls_of

from trifuse.kernels import (
    channel_gate,
    channel_gate_reference,
    dice_ce_loss,
    dice_ce_loss_reference,
    segment_film_gate,
    segment_film_gate_reference,
    spatial_gate,
    spatial_gate_reference,
)
from trifuse.kernels.testing import assert_op_matches

SHAPE = (2, 3, 5, 7)
LAYOUTS = {
    "planes": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns of a wider map": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
FORMS = {
    "channel_gate": (channel_gate, channel_gate_reference),
    "spatial_gate": (spatial_gate, spatial_gate_reference),
    "segment_film_gate": (segment_film_gate, segment_film_gate_reference),
}


@pytest.fixture(autouse=True)
def _some_are_too_small(_nothing_is_too_small, monkeypatch):
    for module in ("kernels.cpu.segmentation_sums", "kernels.ops.gates", "kernels.ops.segment_film_gate"):
        monkeypatch.setattr(import_module(f"trifuse.{module}"), "FEWEST_ELEMENTS", 1 << 16)


def arguments_of(op, layout, dtype):
    (call,) = calls_of(op, SHAPE)
    x, *others = (value.detach() for value in call.arguments)
    others = [value.to(dtype) if value.is_floating_point() else value for value in others]
    return [value.requires_grad_(value.is_floating_point()) for value in (LAYOUTS[layout](x.to(dtype)), *others)]


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", FORMS)
def test_gates(op, layout, dtype):
    arguments = arguments_of(op, layout, dtype)
    out = FORMS[op][0](*arguments)
    assert out.stride() == torch.empty_like(arguments[0]).stride()
    assert not hasattr(out.grad_fn, "saved_tensors"), "a function of ours"
    assert_op_matches(*FORMS[op], *arguments, atol=1e-5)


@pytest.mark.parametrize("op", FORMS)
def test_gates_have_second_derivatives(op):
    assert torch.autograd.gradgradcheck(FORMS[op][0], arguments_of(op, "planes", torch.float64))


@pytest.mark.parametrize("op", FORMS)
def test_narrow_maps_are_kept_as_they_are(op):
    arguments = arguments_of(op, "planes", torch.float32)
    arguments[0] = arguments[0].detach().bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)), lambda _: None):
        FORMS[op][0](*arguments)
    assert [dtype for shape, dtype in saved if shape == SHAPE] == [torch.bfloat16]


@every_layout
@pytest.mark.parametrize("ignore_index", [None, 1, 255])
@pytest.mark.parametrize("flavour", ["nnunet", "transunet"])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_loss_of_one_map(batch_dice, flavour, ignore_index, layout):
    generator = torch.Generator().manual_seed(0)
    logits = LAYOUTS[layout](torch.randn(SHAPE, generator=generator)).requires_grad_()
    target = torch.randint(0, 3, (2, 5, 7), generator=generator)
    target[:, 2:] = target[:, 2:] if ignore_index is None else ignore_index
    options = {"flavour": flavour, "batch_dice": batch_dice, "ignore_index": ignore_index}
    assert_op_matches(dice_ce_loss, dice_ce_loss_reference, logits, target, **options)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_loss_of_one_map_has_second_derivatives(batch_dice):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(0, 3, (1, 2, 3), generator=generator)
    assert torch.autograd.gradgradcheck(lambda x: dice_ce_loss(x, target, batch_dice=batch_dice), (logits,))


def test_loss_of_one_map_keeps_what_autograd_keeps():
    (call, *_) = calls_of("segmentation_sums", SHAPE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda _: None):
        call()
    assert saved.count((2, 3, 35)) > 1


def test_loss_of_classes_ruled_out():
    """A class whose logit is minus infinity everywhere counts for nothing, unless it is the target's."""
    logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = -torch.inf
    target = torch.randint(0, 2, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    assert_op_matches(dice_ce_loss, dice_ce_loss_reference, logits.requires_grad_(), target)
    assert torch.isfinite(dice_ce_loss(logits, target))
    assert dice_ce_loss(logits, target.fill_(2)) == torch.inf


def test_loss_of_nan_at_an_ignored_pixel():
    logits, target = torch.zeros(SHAPE), torch.zeros((2, 5, 7), dtype=torch.int64)
    logits[1, 0, 2, 3], target[1, 2, 3] = torch.nan, 255
    assert dice_ce_loss(logits, target, ignore_index=255).isnan()


def test_loss_under_autocast():
    (call, *_) = calls_of("segmentation_sums", SHAPE)
    plain = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), plain)
