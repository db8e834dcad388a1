"""What calls of the operators may take at most to issue, in how many launches, and what they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ISSUE, LAUNCHES = "us", "launches"
LOSS = ("segmentation_sums_loss",)
LOSS_BACKWARD = ("segmentation_sums_backward",)
DEEP_SUPERVISION = ("segmentation_sums_deep_supervision", "segmentation_sums_deep_supervision_backward")
DEPTHWISE = tuple(f"depthwise_multi_kernel{part}" for part in ("", "_input_gradient", "_weight_gradients"))


@dataclass(frozen=True)
class Goal:
    """The most that some calls of a step may take together, each counted once.

    Args:
        what: the calls in words.
        most: microseconds to issue, or launches.
        step: the name of their step, as in `network_calls.STEPS`.
        operators: their names.
        of: how the description of their largest map begins.
        unit: `ISSUE` or `LAUNCHES`.
    """

    what: str
    most: float
    step: str
    operators: tuple[str, ...]
    of: str = ""
    unit: str = ISSUE


FULL_MAPS, COARSE_MAPS = "subset loss, maps of 224 x 224", "classes of 224 x 224 from coarse maps"
GOALS = (
    Goal("dilated attention, 64 x 64, forward", 19, "FIAS", ("dilated_attention",), "(32, 64, 64,"),
    Goal("dilated attention, 64 x 64, backward", 50, "FIAS", ("dilated_attention_backward",), "(32, 64, 64,"),
    Goal("depthwise kernels, FIAS' four levels, both passes", 140, "FIAS", DEPTHWISE),
    Goal("subset loss, maps of 224 x 224, forward", 60, FULL_MAPS, LOSS),
    Goal("subset loss, maps of 224 x 224, backward", 75, FULL_MAPS, LOSS_BACKWARD),
    Goal("subset loss, FIAS' coarse maps, forward", 80, "FIAS", LOSS),
    Goal("subset loss, FIAS' coarse maps, backward", 100, "FIAS", LOSS_BACKWARD),
    Goal("subset loss, maps of 224 x 224, both passes", 6, FULL_MAPS, LOSS + LOSS_BACKWARD, unit=LAUNCHES),
    Goal("subset loss, FIAS' coarse maps, both passes", 6, "FIAS", LOSS + LOSS_BACKWARD, unit=LAUNCHES),
    Goal("Dice and cross-entropy, both passes", 6, "DINO-UNet base", LOSS + LOSS_BACKWARD, unit=LAUNCHES),
    Goal("deep supervision of five maps, both passes", 6, "TAFF-UNet", DEEP_SUPERVISION, unit=LAUNCHES),
    Goal("channel gate, 72 channels, forward", 9, "FIAS", ("channel_gate",), "(32, 72,"),
    Goal("channel gate, 72 channels, backward", 14, "FIAS", ("channel_gate_backward",), "(32, 72,"),
    Goal("spatial gate, 72 channels, forward", 9, "FIAS", ("spatial_gate",), "(32, 72,"),
    Goal("spatial gate, 8 x 8, backward", 4, "FIAS", ("spatial_gate_backward",), "(32, 576, 8, 8)"),
    Goal("Monte Carlo pool, 72 channels, backward", 6, "FIAS", ("monte_carlo_pool_backward",), "(32, 72)"),
    Goal("upsampling and argmax, 224 x 224", 15, COARSE_MAPS, ("upsample_argmax",)),
)


def goal_rows(networks: Sequence[Mapping[str, Any]], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """Return what the calls of each goal take.

    Args:
        networks: the steps with their calls, as in ``issue_time.json``.
        goals: what to look for.

    Raises:
        ValueError: a goal is of no call.
    """
    steps = {network["network"]: network["calls"] for network in networks}
    rows = []
    for goal in goals:
        calls = [c for c in steps[goal.step] if c["operator"] in goal.operators and c["map"].startswith(goal.of)]
        if not calls:
            raise ValueError(f"expected calls for the goal {goal.what!r}, got none in {goal.step}; correct the goal")
        found = sum(len(call["launches"]) if goal.unit == LAUNCHES else call["issue_us"] for call in calls)
        rows.append({"what": goal.what, "unit": goal.unit, "most": goal.most, "found": round(found, 2)})
    return rows


def goal_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of goals."""
    yield "| calls | at most | now | |"
    yield "|---|---:|---:|---|"
    for row in rows:
        met = "met" if row["found"] <= row["most"] else "**missed**"
        yield f"| {row['what']} | {row['most']:g} {row['unit']} | {_rounded_up(row['found'], row['most'])} | {met} |"


def _rounded_up(found: float, most: float) -> str:
    """Write a count as it is, and a figure with one decimal, that of a missed goal never as the goal."""
    text = f"{found:.1f}" if isinstance(found, float) else str(found)
    return text if found <= most or float(text) > most else f"{found:.2f}"
