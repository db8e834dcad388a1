"""How an ECG becomes a map: by segment, on a grid, everywhere alike; what a norm leaves of it, a gate of its age."""

from __future__ import annotations

import pytest
import torch
from fusion_equations import SEGMENTS, gradients, labels_of, random_arguments, random_block, run
from torch.nn import functional as F

from trifuse.blocks import TemporalAwareFusion
from trifuse.blocks.segment_masks import pooled_masks, segment_labels
from trifuse.kernels import ShapeError

LABELS = torch.zeros(3, 5, 3, dtype=torch.uint8)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("projection", "number"),
    [("broadcast", 16_640), ("segments", 18_001), ("segments_full", 17 * 16_640), ("grid", 64 * 16_640)],
)
def test_parameters_of_the_projections(projection, number):
    with torch.device("meta"):
        block = TemporalAwareFusion(256, projection=projection, gate_time="unseen")
    direction = 0 if block.direction is None else block.direction.numel()
    assert direction + sum(parameters(part) for part in (block.projection, block.scores) if part is not None) == number
    assert parameters(block) == number + 20_674 + 33_408  # whatever is projected, gate and film are the published ones


@pytest.mark.parametrize("projection", ["segments", "segments_full"])
def test_soft_masks_are_shares_of_the_labels_maps(projection):
    """Masks of nothing but 0 and 1 are the labels; a mean of two such masks gives the mean of the two ECG's maps."""
    block, (features, code, days) = random_block(projection=projection), random_arguments()
    labels = labels_of(features)
    other = labels.flip(1)
    one_hot = [F.one_hot(each.long(), SEGMENTS + 1).permute(0, 3, 1, 2)[:, 1:] for each in (labels, other)]
    leaves = [features, code, *block.parameters()]
    hard, masked = (block(features, code, days, segments=each) for each in (labels, one_hot[0]))
    torch.testing.assert_close(masked, hard)
    torch.testing.assert_close(*(gradients(each, leaves) for each in (masked, hard)))
    mixed = block(features, code, days, segments=(one_hot[0] + one_hot[1]) / 2)[0]
    torch.testing.assert_close(mixed, (hard[0] + block(features, code, days, segments=other)[0]) / 2)


def test_the_scores_of_segments_are_those_in_the_map():
    block, (features, code, days) = random_block(), random_arguments()
    scores = block.segment_scores(code, torch.tensor([True, False, True]))
    assert not scores[1].any()
    z = F.layer_norm(code, (6,))
    torch.testing.assert_close(scores[::2], F.linear(z, block.scores.weight, block.scores.bias)[::2])
    nothing, everywhere = (torch.full((3, 5, 3), label, dtype=torch.uint8) for label in (0, 2))
    step = block(features, code, days, segments=everywhere)[0] - block(features, code, days, segments=nothing)[0]
    _, weights = block(features, code, days, segments=nothing)
    gamma, _ = block.film.modulation(block.film.scaled(days, features))
    expected = block.segment_scores(code)[:, 1:2] * block.direction * weights[:, 1:] * (1 + gamma)
    torch.testing.assert_close(step, expected[:, :, None, None].expand_as(step))
    assert random_block(projection="segments_full").segment_scores(code) is None


@pytest.mark.parametrize("axes", [(), (2,), (3,), (2, 3)])
def test_a_grid_is_mirrored_with_the_image(axes):
    block, (features, code, days) = random_block(projection="grid", grid_side=3), random_arguments()
    signs = [-1.0 if axis in axes else 1.0 for axis in (3, 2)]
    transform = torch.tensor([[signs[0], 0.0, 0.0], [0.0, signs[1], 0.0]]).expand(3, 2, 3)
    expected = block(features, code, days)[0].flip(axes)
    torch.testing.assert_close(block(features.flip(axes), code, days, transform=transform)[0], expected)


def test_a_grid_is_turned_with_the_image():
    block, (features, code, days) = random_block(projection="grid", grid_side=3), random_arguments(size=(5, 5))
    turned = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).expand(3, 2, 3)  # x' = -y, y' = x: where it lay before
    expected = torch.rot90(block(features, code, days)[0], -1, (2, 3))
    found = [block(torch.rot90(features, -1, (2, 3)), code, days, transform=matrix)[0] for matrix in (turned, -turned)]
    assert sum(torch.allclose(each, expected) for each in found) == 1


@pytest.mark.parametrize("projection", ["segments", "segments_full", "grid", "broadcast"])
def test_zero_init_projection_leaves_the_ecg_out_at_first(projection):
    block = TemporalAwareFusion(4, 6, zero_init_proj=True, projection=projection, num_segments=SEGMENTS).double()
    features, code, days = random_arguments()
    torch.testing.assert_close(run(block, features, code, days)[0], 1.5 * features)
    leaves = [block.direction if projection == "segments" else block.projection.weight]
    assert all(grad.any() for grad in gradients(run(block, features, code, days), leaves))  # it does not stay there


def test_a_grid_of_one_is_the_even_spread():
    even, grid = random_block(projection="broadcast"), random_block(projection="grid", grid_side=1)
    grid.load_state_dict(even.state_dict(), strict=True)
    arguments = random_arguments()
    torch.testing.assert_close(grid(*arguments), even(*arguments))


def test_one_segment_everywhere_is_the_even_spread():
    even, full = random_block(projection="broadcast"), random_block(projection="segments_full")
    state = dict(even.state_dict())
    for name in ("projection.weight", "projection.bias"):
        state[name] = torch.cat(
            [
                state[name] if segment == 2 else full.state_dict()[name][4 * segment : 4 * segment + 4]
                for segment in range(SEGMENTS)
            ]
        )
    full.load_state_dict(state, strict=True)
    arguments = random_arguments()
    torch.testing.assert_close(full(*arguments, segments=torch.full((3, 5, 3), 3, dtype=torch.uint8)), even(*arguments))


def test_projections_share_the_other_parts_first_weights():
    states = []
    for projection in ("broadcast", "segments"):
        block = TemporalAwareFusion(4, projection=projection)
        block.reset_parameters(torch.Generator().manual_seed(3))
        states.append(block.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_largest_label_is_the_last_segment():
    block = TemporalAwareFusion(4, 6)
    arguments = random_arguments(dtype=torch.float32)
    assert block(*arguments, segments=LABELS + 17)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "is_seen"),
    [
        ({"projection": "broadcast"}, False),
        ({"projection": "broadcast", "rectify": True}, True),
        ({"projection": "grid", "grid_side": 2}, True),
        ({"projection": "segments"}, True),
        ({"projection": "segments_full"}, True),
    ],
    ids=str,
)
def test_an_instance_norm_takes_away_what_is_the_same_at_every_position(options, is_seen):
    """Without padding, a convolution and its norm give the same for any code; not so for one spread unevenly."""
    torch.manual_seed(0)
    fusion = TemporalAwareFusion(6, ecg_dim=5, time=False, **options).double()
    convolve = torch.nn.Conv2d(6, 4, 3).double()
    features, codes = torch.randn(1, 6, 32, 32, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    wall = torch.zeros(1, 32, 32, dtype=torch.uint8)
    wall[:, 8:16, 8:16], wall[:, 16:24, 16:24] = 3, 12
    first, second = (
        torch.nn.functional.instance_norm(convolve(fusion(features, code[None], segments=wall)[0]), eps=1e-12)
        for code in codes
    )
    difference = (first - second).abs().max().item()
    assert (difference > 0.1) if is_seen else (difference < 1e-6)


def test_labels_are_those_of_most_of_a_position():
    """A quarter of a position is enough; what lies beside the wall takes none from it."""
    masks = torch.zeros(2, SEGMENTS, 4, 8, dtype=torch.uint8)
    masks[0, 2, 0, :2] = 1  # a quarter of a position of 2 x 4 pixels,
    masks[0, 3, 0, 4:6], masks[0, 1, 1, 4:7] = 1, 1  # two segments, of which one has more,
    masks[0, 4, 2, 0] = 1  # and an eighth
    masks[1, 0] = 1
    expected = torch.tensor([[[3, 2], [0, 0]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    assert torch.equal(segment_labels(masks, (2, 2)), expected)
    assert torch.equal(segment_labels(masks.double(), (2, 2)), expected)
    assert torch.equal(pooled_masks(masks, (2, 2))[0, :4, 0, 1], torch.tensor([0.0, 0.375, 0.0, 0.25]))
    numbers = torch.arange(1, SEGMENTS + 1)[:, None, None]
    assert torch.equal(segment_labels(masks, (4, 8)), (masks * numbers).sum(1).to(torch.uint8))
    with pytest.raises(ShapeError, match=r"masks has shape \(5, 4, 8\); expected \(B, S, H, W\)"):
        segment_labels(masks[0], (2, 2))


@pytest.mark.parametrize(("gate_time", "learns"), [("apart", True), ("joined", False)])
def test_an_old_ecg_can_weigh_less_after_a_few_steps(gate_time, learns):
    """Where that is all that is asked of it; among the other numbers the days hardly count."""
    generator = torch.Generator().manual_seed(0)
    block = TemporalAwareFusion(16, gate_time=gate_time)
    block.reset_parameters(generator)
    optimiser = torch.optim.Adam(block.gate.parameters(), lr=4e-3)

    def weigh(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        maps, codes = (torch.randn(batch, *shape, generator=generator) for shape in ((16, 4, 4), (64,)))
        days = 90 * torch.rand(batch, generator=generator)
        segments = torch.zeros(batch, 4, 4, dtype=torch.uint8)
        return block(maps, codes, days, segments=segments)[1][:, 1], days

    for _ in range(60):
        optimiser.zero_grad()
        weights, days = weigh(16)
        (weights * (days - 45) / 45).mean().backward()
        optimiser.step()
    with torch.no_grad():
        correlation = torch.corrcoef(torch.stack(weigh(256)))[0, 1]
    assert (correlation < -0.9) == learns


def test_soft_masks_are_not_rounded_to_the_type_of_the_maps():
    """A share of 0.501 is 0.5 in bfloat16: here the difference is all that the ECG has to say."""
    block = TemporalAwareFusion(4, 6, num_segments=SEGMENTS)
    with torch.no_grad():
        for parameter, value in (
            (block.projection.weight, 0.0),
            (block.projection.bias, -500.0),
            (block.scores.weight, 0.0),
            (block.scores.bias, 1000.0),
            (block.direction, 1.0),
        ):
            parameter.fill_(value)
    masks = torch.zeros(1, SEGMENTS, 2, 2)
    masks[:, 1] = 0.501
    maps = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    fused, weights = block(maps, torch.randn(1, 6), 0.0, segments=masks)
    assert weights.tolist() == [[0.5, 0.5]]
    torch.testing.assert_close(fused, torch.full_like(maps, 0.5 * (0.501 * 1000 - 500)))
