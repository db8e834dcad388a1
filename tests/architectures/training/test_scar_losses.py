"""The scar loss: reconstruction, entropy of the gate and its sign, warm-up, ECGs that are absent, ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from children import run_ranks
from torch import Tensor

from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.scar_losses import ScarLoss, gate_entropy, quadratic_warmup, reconstruction_loss


class Output(NamedTuple):
    logits: list[Tensor]
    gate: Tensor | None
    reconstruction: Tensor | None


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(batch: int = 4, steps: int = 16) -> tuple[Output, dict[str, Tensor]]:
    """Outputs at two sizes and what they should be; the ECGs of samples 1 and 3 are absent, and NaN."""
    has_ecg = torch.arange(batch) % 2 == 0
    logits = [random(batch, 3, 8, 8, seed=1), random(batch, 3, 4, 4, seed=2)]
    gate = torch.where(has_ecg[:, None], random(batch, 2, seed=3).softmax(1), 0.0)
    ecg = random(batch, 12, steps, seed=5)
    ecg[~has_ecg] = torch.nan
    target = torch.randint(0, 3, (batch, 8, 8), generator=torch.Generator().manual_seed(6))
    return Output(logits, gate, random(batch, 12, steps, seed=4)), {"target": target, "ecg": ecg, "has_ecg": has_ecg}


# ------------------------------------------------------------------------------------------------ reconstruction


def test_reconstruction_is_the_mean_square_over_samples_leads_and_time():
    a, b = random(3, 12, 16), random(3, 12, 16, seed=1)
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
    assert reconstruction_loss(a, b).item() == pytest.approx(expected)
    assert reconstruction_loss(a, b, torch.ones(3, 1, dtype=torch.bool)).item() == pytest.approx(expected)


def test_the_padding_is_left_out_where_asked():
    a, b = random(2, 12, 608), random(2, 12, 608, seed=1)
    assert reconstruction_loss(a, b, mask_padding=True).item() == pytest.approx(
        (a[..., 4:604] - b[..., 4:604]).square().mean().item()
    )
    a[..., :4] = a[..., 604:] = 1e6
    assert reconstruction_loss(a, b, mask_padding=True) < 10 < reconstruction_loss(a, b)


def test_b9_absent_ecgs_count_for_nothing_whatever_stands_there():
    output, batch = sample()
    a = output.reconstruction.requires_grad_()
    loss = reconstruction_loss(a, batch["ecg"], batch["has_ecg"])
    assert loss.item() == pytest.approx((a[::2] - batch["ecg"][::2]).square().mean().item())
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient.isfinite().all()
    assert not gradient[1::2].any()
    weights = torch.tensor([0.3, 0.7]).expand(4, 2).clone()
    weights[1::2] = 0.5
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert gate_entropy(weights, batch["has_ecg"]).item() == pytest.approx(entropy)
    assert gate_entropy(weights).item() == pytest.approx((entropy + math.log(2)) / 2)


def test_without_any_ecg_both_are_zero_and_train_nothing():
    output, batch = sample()
    for value, of in (
        (reconstruction_loss(output.reconstruction.requires_grad_(), batch["ecg"], torch.zeros(4).bool()), 1),
        (gate_entropy(output.gate.requires_grad_(), torch.zeros(4).bool()), 0),
    ):
        assert value == 0
        (gradient,) = torch.autograd.grad(value, (output.gate, output.reconstruction)[of])
        assert not gradient.any()


def test_a_sample_of_no_weight_counts_for_nothing():
    output, batch = sample()
    weight = torch.tensor([0.0, 1, 1, 1])
    loss = reconstruction_loss(output.reconstruction, batch["ecg"], batch["has_ecg"], sample_weight=weight)
    assert loss.item() == pytest.approx((output.reconstruction[2] - batch["ecg"][2]).square().mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    a = torch.full((2, 12, 16), 300.0, dtype=dtype)
    assert reconstruction_loss(a, torch.zeros_like(a)).dtype == torch.float32
    assert reconstruction_loss(a, torch.zeros_like(a)).item() == pytest.approx(float(a[0, 0, 0]) ** 2)
    assert gate_entropy(torch.full((2, 2), 0.5, dtype=dtype)).dtype == torch.float32


# --------------------------------------------------------------------------------------------- entropy of the gate


def test_entropy_of_the_gate():
    assert gate_entropy(torch.tensor([[0.5, 0.5]])).item() == pytest.approx(math.log(2))
    for certain in ([1.0, 0.0], [0.0, 1.0]):
        weights = torch.tensor([certain], requires_grad=True)
        entropy = gate_entropy(weights)
        assert entropy.item() == 0
        assert torch.autograd.grad(entropy, weights)[0].isfinite().all()


def test_gradient_of_the_entropy():
    """With respect to the gate's logits it is -w (log w + H)."""
    logits = random(5, 2).requires_grad_()
    w = logits.softmax(1)
    (gradient,) = torch.autograd.grad(gate_entropy(w) * 5, logits)
    entropy = -(w * w.log()).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, -w * (w.log() + entropy))


@pytest.mark.parametrize(("sign", "towards_equal"), [("maximise", True), ("literal", False)])
@pytest.mark.parametrize("start", [(0.8, -0.3), (-1.0, 1.5)])
def test_the_sign_of_the_entropy(sign, towards_equal, start):
    """A step against the gradient takes the weights towards (0.5, 0.5) where it is maximised, and away where not."""
    output, batch = sample()
    logits = torch.tensor([start] * 4, dtype=torch.float64, requires_grad=True)
    gate = torch.where(batch["has_ecg"][:, None], logits.softmax(1), 0.0)
    loss = ScarLoss(entropy_sign=sign)(output._replace(gate=gate), batch, None)
    (gradient,) = torch.autograd.grad(loss, logits)
    stepped = (logits - gradient).softmax(1)
    distance = (logits.softmax(1)[:, 0] - 0.5).abs() - (stepped[:, 0] - 0.5).abs()
    assert ((distance[::2] > 0) == towards_equal).all()
    assert (distance[::2] != 0).all()
    assert not gradient[1::2].any()


# -------------------------------------------------------------------------------------------------------- warm-up


def test_warm_up_of_the_reconstruction():
    assert quadratic_warmup(0) == 0
    assert quadratic_warmup(5) == 0.25
    assert quadratic_warmup(2.5) == 0.0625
    assert [quadratic_warmup(epoch) for epoch in (10, 11, 999)] == [1, 1, 1]
    assert quadratic_warmup(1, lambda_max=4.0, warmup_epochs=2) == 1
    assert [quadratic_warmup(epoch, 0.7, 0) for epoch in (0, 1)] == [0.7, 0.7]


# ------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("epoch", [0, 5, 20])
def test_the_whole_loss_is_the_sum_of_its_terms(epoch):
    output, batch = sample()
    loss = ScarLoss(lambda_ecg=0.5, warmup_epochs=10, lambda_entropy=0.01)
    loss.start_epoch(epoch)
    expected = (
        SegmentationLoss()(output.logits, batch, None)
        + {0: 0.0, 5: 0.125, 20: 0.5}[epoch]
        * reconstruction_loss(output.reconstruction, batch["ecg"], batch["has_ecg"])
        - 0.01 * gate_entropy(output.gate, batch["has_ecg"])
    )
    torch.testing.assert_close(loss(output, batch, None), expected)


def test_at_epoch_0_only_the_segmentation_teaches_the_ecg():
    output, batch = sample()
    reconstruction = output.reconstruction.requires_grad_()
    (gradient,) = torch.autograd.grad(ScarLoss()(output, batch, None), reconstruction)
    assert not gradient.any()


def test_a_network_without_an_ecg_has_the_segmentation_alone():
    output, batch = sample()
    alone = ScarLoss()(Output(output.logits, None, None), {"target": batch["target"]}, None)
    torch.testing.assert_close(alone, SegmentationLoss()(output.logits, batch, None))


def test_deep_supervision_weighs_the_full_resolution_most():
    output, batch = sample()
    first = ScarLoss(lambda_entropy=0)(output._replace(logits=output.logits[:1]), batch, None)
    torch.testing.assert_close(ScarLoss(lambda_entropy=0)(output, batch, None), first)


def test_the_loss_of_two_ranks_is_that_of_one(tmp_path):
    """Three samples with an ECG on one rank, one on the other: means of means would not do."""
    output, batch = sample(6)
    batch["has_ecg"] = torch.tensor([True, True, True, False, True, False])
    batch["ecg"] = batch["ecg"].nan_to_num(0.5)
    loss = ScarLoss(warmup_epochs=0)
    whole = loss(output, batch, None)

    def work():
        with open_world("cpu") as world:
            own = slice(3 * world.rank, 3 * world.rank + 3)
            part = Output([x[own] for x in output.logits], output.gate[own], output.reconstruction[own])
            mine = loss(part, {name: x[own] for name, x in batch.items()}, world.sum)
            torch.testing.assert_close(mine, whole)

    assert run_ranks(work) == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_ecg": -1.0}, r"lambda_ecg must be finite, and must not be negative, got -1\.0"),
        ({"lambda_ecg": float("inf")}, "lambda_ecg must be finite, and must not be negative, got inf"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be finite, and must not be negative"),
        ({"lambda_entropy": float("nan")}, "lambda_entropy must be finite, and must not be negative, got nan"),
        ({"entropy_sign": "minimise"}, "entropy_sign: expected one of 'maximise', 'literal', got 'minimise'"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        ScarLoss(**options)
