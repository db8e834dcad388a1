"""What operators are compared with is complete, and computes what the operators compute: values and gradients."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from types import FunctionType, ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

from trifuse import kernels
from trifuse.benchmarks.baselines import dice_ce_loss, dilated_attention
from trifuse.kernels.testing.comparing import Comparison, judge

FILES = {
    name: import_module(f"trifuse.benchmarks.bench_{name}")
    for name in sorted({*kernels.OPERATORS.values(), "context_aware_fusion"})
}
COMPARISONS = {
    value.name: value for file in FILES.values() for value in vars(file).values() if isinstance(value, Comparison)
}
CPU, FLOAT = torch.device("cpu"), torch.float32
dilated, pools, fusions = (FILES[f] for f in ("dilated_attention", "monte_carlo_pool", "weighted_block_fusion"))
losses, gates = FILES["dice_ce_loss"], FILES["gates"]

NARROW = dilated.attention_case("tiny", (1, 6, 7, 72), FLOAT, device="cpu")
ONE_MAP = losses.loss_case("tiny", 2, 3, 6, device="cpu")
TINY = {
    "batch_norm_activation": FILES["batch_norm_activation"].case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "channel_gate": gates.channel_case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "context_aware_fusion": FILES["context_aware_fusion"].fusion_case(3, 4, 2, "cpu"),
    "depthwise_multi_kernel": FILES["depthwise_multi_kernel"].case(
        (1, 3, 6, 5), FLOAT, device="cpu", channels_last=True
    ),
    "dice_ce_loss": ONE_MAP,
    "dice_ce_loss_nnunet": ONE_MAP,
    "dilated_attention": NARROW,
    "dilated_attention_head_dim_32": dilated.attention_case("tiny", (1, 6, 7, 96), FLOAT, device="cpu"),
    "dilated_attention_stage_2": dilated.attention_case("tiny", (1, 6, 7, 144), FLOAT, device="cpu"),
    "dilated_attention_weights": NARROW,
    "instance_norm_leaky_relu": FILES["instance_norm_leaky_relu"].case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "memory_efficient_attention": FILES["memory_efficient_attention"].attention_case("tiny", 1, 5, 2, FLOAT, "cpu"),
    "monte_carlo_pool": pools.pool_case("tiny", (2, 3, 5, 4), 2, FLOAT, "cpu"),
    "mutation_loss": FILES["mutation_loss"].loss_case("tiny", 2, (2, 4, 8), 8, FLOAT, device="cpu"),
    "residual_layer_norm": FILES["residual_layer_norm"].case("tiny", (2, 3, 8), FLOAT, "cpu"),
    "segment_film_gate": FILES["segment_film_gate"].case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "spatial_gate": gates.position_case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "temporal_film_gate": FILES["temporal_film_gate"].case("tiny", (2, 3, 4, 5), FLOAT, "cpu"),
    "upsample_argmax": FILES["upsample_argmax"].case("tiny", 1, 3, (2, 4), 9, FLOAT, "cpu"),
    "weighted_block_fusion": fusions.fusion_case("tiny", 3, (1, 5, 8), FLOAT, device="cpu"),
    "weighted_block_fusion_liger": fusions.fusion_case("tiny", 3, (1, 5, 8), FLOAT, device="cpu", equal=True),
}


def names_used(function) -> set[str]:
    """Return the names that a function's code, and the functions that it was made of, mention."""
    if isinstance(function, partial):
        return names_used(function.func)
    if not isinstance(function, FunctionType):
        return set()
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return {function.__name__, *function.__code__.co_names}.union(*map(names_used, held))


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_operator_is_compared_under_its_own_name(operator):
    assert operator in names_used(COMPARISONS[operator].providers["trifuse"])


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_complete(name):
    comparison = COMPARISONS[name]
    compiled = [provider for provider in comparison.providers if provider.startswith("torch.compile of ")]
    assert comparison.baseline not in ("trifuse", *compiled)
    assert "torch.compile of trifuse" in compiled
    assert len(compiled) > 1
    assert {kind for case in comparison.cases for kind in case.devices} == {"cpu", "cuda", "tiny"}
    assert all(timed.least_bytes for timed in comparison.passes)
    assert comparison.missing.keys() <= comparison.providers.keys()
    assert all(comparison.missing.values())


def test_every_comparison_has_a_tiny_case():
    assert TINY.keys() == COMPARISONS.keys()


def test_least_bytes_count_what_has_to_be_moved():
    """One number for each operator, by hand, for the tiny case's last pass."""
    four = 4  # bytes of a float32
    by_hand = {
        "batch_norm_activation": 5 * 120,
        "channel_gate": 5 * 120,  # x; gated; grad, x, x's gradient
        "context_aware_fusion": 8 * 96,  # two maps, one; grad, two maps, two gradients
        "depthwise_multi_kernel": 5 * 90,
        "dice_ce_loss": 3 * 216 + 2 * 72 * 2,  # logits; logits, their gradient; and the int64 target twice
        "dilated_attention": 11 * 42 * 72,  # q, k, v, out; grad, q, k, v, three gradients
        "dilated_attention_weights": 6 * 42 * 72 + 2 * 42 * 27,  # q, k; q, k, both gradients; weights, their gradient
        "instance_norm_leaky_relu": 5 * 120,
        "memory_efficient_attention": 11 * 5 * 128,
        "monte_carlo_pool": 120 // 4 + 120,  # a cell of four; the gradient of the whole
        "mutation_loss": 3 * 18 * (4 + 16 + 64) + 2 * 128 * 2,
        "residual_layer_norm": 8 * 48,  # x, branch, sum, normalised; two gradients and the sum, one gradient
        "segment_film_gate": 5 * 120 + 2 * 40 // 4,  # and a byte per position, each way
        "spatial_gate": 5 * 120,
        "temporal_film_gate": 5 * 120,
        "weighted_block_fusion": 11 * 40,  # 3 maps, 1; grad, 3 maps, 3 gradients
    }
    for name, elements in by_hand.items():
        assert COMPARISONS[name].passes[-1].least_bytes(*TINY[name].arguments(CPU)) == four * elements, name


def as_run(function, arguments, timed):
    """Return the result and the gradients of the pass's leaves, for one incoming gradient."""
    leaves = list(timed.leaves(*arguments))
    for leaf in leaves:
        leaf.requires_grad_()
    result = function(*arguments)
    results = [result] if isinstance(result, torch.Tensor) else [*result]
    if not leaves:
        return results
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(one.shape, generator=generator).to(one) for one in results]
    return [*(one.detach() for one in results), *torch.autograd.grad(results, leaves, incoming)]


def in_float64(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(in_float64, value)) if isinstance(value, (list, tuple)) else value


def hold_against_the_reference(name, provider, timed=-1):
    """Judge a provider's pass as the harness does, on a tiny case, against the reference backend in float64."""
    comparison = COMPARISONS[name]
    timed = comparison.passes[timed]
    with kernels.backend("reference"):
        truth = as_run(comparison.providers["trifuse"], in_float64(TINY[name].arguments(CPU)), timed)
    function = comparison.truth if provider == "the truth" else comparison.providers[provider]
    judge(provider, as_run(function, TINY[name].arguments(CPU), timed), truth)


HERE = [
    (name, provider)
    for name, comparison in COMPARISONS.items()
    for provider in (*comparison.providers, "the truth")
    if provider not in comparison.missing and not provider.startswith("torch.compile")
]


@pytest.mark.parametrize(("name", "provider"), HERE, ids=[", ".join(pair) for pair in HERE])
def test_a_form_computes_what_the_operator_is_defined_to(name, provider):
    hold_against_the_reference(name, provider)


def sliding_attention(q, k, v, kernel_size, dilation):
    """Attend as NATTEN does, pixel by pixel: the window slides along the pixels in reach until it is inside."""

    def window(place, length):
        reach = range(place % dilation, length, dilation)
        first = min(max(reach.index(place) - kernel_size // 2, 0), len(reach) - kernel_size)
        return torch.tensor(reach[first : first + kernel_size])

    height, width, d = q.shape[1], q.shape[2], q.shape[-1]
    rows = []
    for y in range(height):
        pixels = []
        for x in range(width):
            seen = window(y, height)[:, None], window(x, width)
            keys, values = (m[:, *seen].flatten(1, 2) for m in (k, v))
            weights = (torch.einsum("bhd,bthd->bth", q[:, y, x], keys) * d**-0.5).softmax(dim=1)
            pixels.append(torch.einsum("bth,bthd->bhd", weights, values))
        rows.append(torch.stack(pixels, dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", ["dilated_attention", "dilated_attention_head_dim_32"])
def test_natten_padded_and_cropped_sees_zeros_outside(name, monkeypatch):
    functional = ModuleType("natten.functional")
    functional.na2d = sliding_attention
    monkeypatch.setitem(sys.modules, "natten", ModuleType("natten"))
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    hold_against_the_reference(name, "NATTEN, padded and cropped")


def masked_attention(q, k, v, block_mask, return_aux):
    """Do what FlexAttention does, with the whole score matrix, so that there are gradients on a CPU."""
    head, query, key = (torch.arange(n) for n in (q.shape[1], q.shape[2], k.shape[2]))
    seen = block_mask.mask_mod(None, head[:, None, None], query[:, None], key)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, AuxOutput(lse=scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["dilated_attention", "dilated_attention_head_dim_32"])
def test_flex_attention_is_diluted_by_the_taps_outside(name, monkeypatch):
    monkeypatch.setattr(dilated_attention, "compiled_flex_attention", masked_attention)
    hold_against_the_reference(name, "FlexAttention")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_itself_without_gradients(monkeypatch):
    monkeypatch.setattr(dilated_attention, "compiled_flex_attention", flex_attention)
    hold_against_the_reference("dilated_attention", "FlexAttention", timed=0)


class FakeDice(nn.Module):
    """nnU-Net's soft Dice of label maps, as much of it as its trainer asks for."""

    def __init__(self, apply_nonlin, batch_dice, smooth, do_bg, ddp):
        super().__init__()
        assert (batch_dice, do_bg, ddp) == (True, False, False)
        self.apply_nonlin, self.smooth = apply_nonlin, smooth

    def forward(self, x, y):
        p = self.apply_nonlin(x)[:, 1:]
        truth = torch.zeros_like(x).scatter_(1, y, 1)[:, 1:]
        intersection, sizes = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
        return -((2 * intersection + self.smooth) / (sizes + self.smooth).clip(1e-8)).mean()


class FakeLoss(nn.Module):
    """nnU-Net's compound loss: weighted cross-entropy plus a Dice of the class that it is given."""

    def __init__(self, soft_dice_kwargs, ce_kwargs, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=None):
        super().__init__()
        self.weights, self.ce = (weight_ce, weight_dice), nn.CrossEntropyLoss(**ce_kwargs)
        self.dice = dice_class(apply_nonlin=partial(torch.softmax, dim=1), **soft_dice_kwargs)

    def forward(self, logits, target):
        return self.weights[0] * self.ce(logits, target[:, 0]) + self.weights[1] * self.dice(logits, target)


def test_nnunets_loss_is_called_as_its_trainer_calls_it(monkeypatch):
    path = ["nnunetv2", "training", "loss"]
    for depth in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(path[:depth]), ModuleType("part"))
    for file, name, value in (
        ("compound_losses", "DC_and_CE_loss", FakeLoss),
        ("dice", "MemoryEfficientSoftDiceLoss", FakeDice),
    ):
        module = ModuleType(file)
        setattr(module, name, value)
        monkeypatch.setitem(sys.modules, ".".join([*path, file]), module)
    dice_ce_loss._nnunet_loss.cache_clear()
    hold_against_the_reference("dice_ce_loss_nnunet", "nnU-Net DC_and_CE_loss")
    dice_ce_loss._nnunet_loss.cache_clear()


def test_taps_outside_are_counted():
    counted = dilated_attention.taps_outside(5, 4, 2, CPU).view(5, 4)
    assert counted[0, 0] == counted[4, 3] == 5
    assert counted[2, 1] == 3
    assert F.relu(counted).sum() == sum(
        not (0 <= y + dy < 5 and 0 <= x + dx < 4)
        for y in range(5)
        for x in range(4)
        for dy in (-2, 0, 2)
        for dx in (-2, 0, 2)
    )
