"""The fill rule gives the numbers that stand in the data's README."""

from __future__ import annotations

import pytest
import torch
from golden_numbers import filled, filled_input, load_fixture, uniform


def test_uniform_numbers():
    expected = [-0.99999999976716936, -0.85946620465256274, 0.46224020351655781, 0.67687593982554972]
    assert uniform(0, 0, 4).tolist() == expected
    assert uniform("pos_embed", 2, 5).tolist() == uniform("pos_embed", 0, 5)[2:].tolist()


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("norm.weight", (5,), [1.0436455, 0.836708367, 0.888501525, 0.828374147, 1.09898233]),
        ("norm.bias", (5,), [0.05575528, -0.0100515103, -0.0317301229, -0.0236427709, -0.0810789168]),
        ("pos_embed", (1, 3, 2), [0.138999522, -0.0550101548, 0.182734206, 0.324264348, 0.16417487]),
        (
            "blocks.0.attn.qkv.weight",
            (6, 4),
            [-0.838365376, 0.775299788, 0.777602196, 0.0979168713, -0.513167322],
        ),
        ("bn.running_var", (3,), [0.789888501, 0.838250399, 0.786093771]),
    ],
)
def test_filled_tensors(key, shape, expected):
    result = filled(key, shape)
    assert result.shape == shape
    torch.testing.assert_close(result.flatten()[: len(expected)], torch.tensor(expected), rtol=1e-7, atol=1e-10)


def test_filled_input():
    image = filled_input(load_fixture("dinov2/vits14_448").facts)
    expected = torch.tensor([-0.0596234202, -1.70986485, 0.992129922, 0.899657607, 0.353044003])
    assert image.shape == (1, 3, 448, 448)
    torch.testing.assert_close(image.flatten()[:5], expected, rtol=1e-7, atol=1e-10)
