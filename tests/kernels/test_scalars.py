"""Numbers that are none: refused in our words, on every backend alike."""

from __future__ import annotations

import pytest
import torch

from trifuse import blocks, kernels
from trifuse.blocks.normalization import RunningNorm

HALF = torch.tensor(0.5)
MAP = torch.zeros(1, 4, 4, 12)
SEQUENCE = torch.zeros(1, 4, 2, 8)
HEAD, LABELS = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)


def attend(**options):
    return kernels.dilated_attention(MAP, MAP, MAP, **{"num_heads": 3, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend(dilations=(1, 2.0, 3)), "dilations: expected whole numbers, got 2.0; pass int(2.0)"),
        (lambda: attend(kernel_size=3.0), "kernel_size and dilations: expected whole numbers, got 3.0"),
        (lambda: blocks.DilatedAttention(12, 3, dilations=(1.5, 2, 3)), "expected whole numbers, got 1.5"),
        (lambda: attend(scale=HALF), "dilated_attention: scale: expected a number, got a tensor of shape ()"),
        (
            lambda: kernels.memory_efficient_attention(SEQUENCE, SEQUENCE, SEQUENCE, scale=HALF),
            "memory_efficient_attention: scale: expected a number, got a tensor of shape (); pass a float, such as",
        ),
        (
            lambda: kernels.mutation_loss([HEAD], LABELS, gamma=HALF),
            "mutation_loss: gamma: expected a number, got a tensor of shape ()",
        ),
        (
            lambda: kernels.batch_norm_activation(HEAD, torch.zeros(2), torch.ones(2), training=True, momentum=None),
            "batch_norm_activation: momentum: expected a number, got None",
        ),
        (lambda: RunningNorm(3, momentum=None), "RunningNorm: momentum: expected a number, got None"),
        (lambda: kernels.upsample_argmax([HEAD], (8.0, 8)), "upsample_argmax: size: expected whole numbers, got 8.0"),
    ],
)
def test_l2_numbers_that_are_none(call, message):
    for backend in ("torch", "reference"):
        with kernels.backend(backend), pytest.raises(TypeError) as caught:
            call()
        assert message in str(caught.value)


def test_l2_one_number_for_two_sides():
    with pytest.raises(kernels.ShapeError, match=r"size is \(8,\); expected \(height, width\)"):
        kernels.upsample_argmax([HEAD], 8)
