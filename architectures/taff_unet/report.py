"""The figures of a TAFF-UNet's report beside scores: bull's-eyes, the ECG's attention, the gate, and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trifuse.architectures.data.layouts.cohort import Case
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.samples.patch_dataset import GridPatches
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.evaluation.bullseye import draw_bullseyes, draw_ecg_bullseye
from trifuse.architectures.evaluation.ecg_attention_figures import draw_lead_attention, draw_temporal_attention
from trifuse.architectures.evaluation.interval_figures import draw_gate_weights, draw_interval_bars, interval_days
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.readouts import share_percent
from trifuse.architectures.evaluation.report import Evaluation
from trifuse.architectures.evaluation.scoring import Row, prediction_path
from trifuse.architectures.evaluation.summary import SCAR
from trifuse.architectures.evaluation.tables import number, write_csv
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS
from trifuse.architectures.storage.text import count
from trifuse.architectures.training.batches import on_device
from trifuse.architectures.training.step import side_inputs_of
from trifuse.kernels import DataError

from .aha17 import scar_burden_ml, wall_volume_ml
from .first_pass import first_pass_labels
from .inputs import ORACLE, PriorRecipe, divide
from .mechanisms import exchange_test
from .model import TaffUNet

BURDEN_TABLE = "scar_burden.csv"
SCORES_TABLE = "ecg_segment_scores.csv"
Burdens = dict[str, dict[str, tuple[NDArray, float]]]  # by case and source: mL in each segment, and in none
Walls = dict[str, NDArray]  # by case: mL of each segment, scarred or not
_SLICES_AT_ONCE = 16


@dataclass(frozen=True)
class Heard:
    """What a network makes of the ECGs of some cases.

    Attributes:
        gate: the gate's weight of each case's ECG, mean over its slices.
        scores: the score that each ECG gives to the 17 segments, where the network gives any.
    """

    gate: dict[str, float]
    scores: dict[str, NDArray[np.float32]]


def draw_pictures(
    run: Path,
    model: TaffUNet,
    data: PreparedData,
    prior: PriorRecipe,
    scored: Evaluation,
    figures: Path,
    heard: Heard | None = None,
) -> list[Picture]:
    """Draw the figures of a finished run for the cases that it scored, those that its setting and cohort allow.

    Args:
        run: the run's folder, with ``predictions/<part>``.
        model: the network.
        data: what it was trained and tested on.
        prior: where its prior comes from, and where angles start.
        scored: the scores of a part of the split.
        figures: folder to draw into.
        heard: what is known already of the ECGs of these cases.
    """
    case_ids = list(dict.fromkeys(row.case_id for row in scored.rows))
    exchanged = exchange_test(model, data, case_ids, figures)
    pictures = [] if exchanged is None else [exchanged]
    if SCAR not in data.cohort.class_names:
        return pictures
    side_inputs = data.side_inputs or {}
    cases = [data.cohort.case(case_id) for case_id in case_ids]
    this = f"this network, {ORACLE}" if model.config.takes_prior and prior.source == "gt" else "this network"
    sources = {"first pass": first_pass_labels(run, prior), this: run / "predictions" / scored.name}
    burdens, walls = _burdens(sources, data, cases, prior)
    pictures += _bullseyes(burdens, walls, figures)
    with_ecg = cases_with_ecg(model, data, case_ids)
    if with_ecg:
        days = interval_days(data.cohort, with_ecg)
        beats = {case_id: side_inputs[case_id].constants["ecg"] for case_id in with_ecg}
        if heard is None or not heard.gate.keys() >= set(with_ecg):
            heard = hear(model, data, with_ecg)
        pictures += _ecg_bullseye(burdens, heard, figures)
        pictures += _attention(model, beats, figures)
        pictures.append(draw_gate_weights(days, {case_id: heard.gate[case_id] for case_id in days}, figures))
        pictures.append(draw_interval_bars(days, {this: scar_dsc(scored.rows)}, figures))
    return pictures


def scar_dsc(rows: Iterable[Row]) -> dict[str, float]:
    """Return the DSC of the scar of each case, the mean over runs where several have scored it."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.class_name == SCAR:
            scores.setdefault(row.case_id, []).append(row.scores["dsc"])
    return {case_id: sum(values) / len(values) for case_id, values in scores.items()}


def cases_with_ecg(model: TaffUNet, data: PreparedData, case_ids: Iterable[str]) -> list[str]:
    """Return those of the cases that bring an ECG to a network that takes it."""
    side_inputs = data.side_inputs or {}
    return [name for name in case_ids if model.config.takes_ecg and side_inputs[name].constants["has_ecg"]]


def describe_gate(model: TaffUNet, heard: Heard) -> dict[str, str]:
    """Return the fact on how much the gate's weights differ between cases, for networks with a gate."""
    if not model.config.takes_ecg:
        return {}
    weights = np.array(list(heard.gate.values()))
    if not len(weights):
        return {"Gate": "no case to be scored has an ECG"}
    spread = f"SD {weights.std(ddof=1):.4f} over" if len(weights) > 1 else "of"
    limits = f"from {weights.min():.4f} to {weights.max():.4f}"
    return {"Gate": f"weight of the ECG {weights.mean():.4f}, {spread} {count(len(weights), 'case')}, {limits}"}


def hear(model: TaffUNet, data: PreparedData, case_ids: Sequence[str]) -> Heard:
    """Run a network on the slices of cases that have an ECG, and return what its fusion makes of their ECGs."""
    slices = GridPatches(data.cohort, case_ids, data.recipe.preprocessing, side_inputs=data.side_inputs)
    device = next(model.parameters()).device
    found: dict[str, list[float]] = {case_id: [] for case_id in case_ids}
    scores: dict[str, NDArray[np.float32]] = {}
    loader = torch.utils.data.DataLoader(slices, batch_size=_SLICES_AT_ONCE)
    with torch.inference_mode():
        for batch in loader:
            batch = on_device(batch, device)
            output = model.run(batch["image"], **side_inputs_of(batch))
            assert output.gate is not None  # the network takes an ECG
            for case_id, weight in zip(batch["case_id"], output.gate[:, 1].tolist(), strict=True):
                found[case_id].append(weight)
            if output.segment_scores is not None:
                scores |= zip(batch["case_id"], output.segment_scores.float().cpu().numpy(), strict=True)
    return Heard({case_id: float(np.mean(weights)) for case_id, weights in found.items()}, scores)


def _attention(model: TaffUNet, beats: Mapping[str, Tensor], figures: Path) -> list[Picture]:
    """Draw the attention between leads, over all beats (12, T) by case, and that over time, for the first beat."""
    ecg = torch.stack([*beats.values()])
    with torch.inference_mode():
        attention = model.attention(ecg.to(next(model.parameters()).device))
    lead, temporal = (weights.cpu().numpy() for weights in (attention.lead, attention.temporal))
    title = f"Attention along the beat of {next(iter(beats))}"
    return [
        draw_lead_attention({"scored cases": lead.mean(0)}, figures),
        draw_temporal_attention(ecg[0].numpy(), temporal[0], figures, title=title),
    ]


def _burdens(
    sources: Mapping[str, Path], data: PreparedData, cases: Sequence[Case], prior: PriorRecipe
) -> tuple[Burdens, Walls]:
    """Return the scar of each case, in truth, by the first pass, by this network, and the wall that it lies in.

    The segments are those of the reference annotation. A case without landmarks, where they are the reference of
    angles, is left out.
    """
    burdens: Burdens = {}
    walls: Walls = {}
    for case in cases:
        image, truth = load_case(data.cohort, case)
        assert truth is not None  # a case without a label has no scores
        try:
            segments = divide(truth.voxels, case, image, prior)
        except DataError:
            continue
        found = {"truth": truth.voxels}
        for name, folder in sources.items():
            path = prediction_path(folder, case.case_id)
            if path.exists():
                found[name] = read_labels(path, like=truth).voxels
        affine = image.affine_mm
        burdens[case.case_id] = {name: scar_burden_ml(labels, segments, affine) for name, labels in found.items()}
        walls[case.case_id] = wall_volume_ml(segments, affine)
    return burdens, walls


def _case_of_most_scar(burdens: Burdens) -> str:
    return max(burdens, key=lambda case_id: burdens[case_id]["truth"][0].sum())


def _ecg_bullseye(burdens: Burdens, heard: Heard, figures: Path) -> list[Picture]:
    """Draw what an ECG says of the segments beside the scar, of the case that has most; tabulate all cases."""
    if not heard.scores:
        return []
    header = ["case_id", *(f"segment_{number}" for number in range(1, AHA_SEGMENTS + 1))]
    write_csv(figures / SCORES_TABLE, header, [[name, *map(number, of)] for name, of in heard.scores.items()])
    both = {case_id: of for case_id, of in burdens.items() if case_id in heard.scores}
    if not both:
        return []
    shown = _case_of_most_scar(both)
    volumes = {name: ml for name, (ml, _) in both[shown].items()}
    title = f"Scar in the 17 segments, and what the ECG says of them, {shown}"
    return [draw_ecg_bullseye(volumes, heard.scores[shown], figures, title=title)]


def _bullseyes(burdens: Burdens, walls: Walls, figures: Path) -> list[Picture]:
    """Draw the scar of the case that has most of it; tabulate all cases."""
    if not burdens:
        return []
    _write_burdens(figures / BURDEN_TABLE, burdens, walls)
    shown = _case_of_most_scar(burdens)
    return [
        draw_bullseyes(
            {name: volumes for name, (volumes, _) in burdens[shown].items()},
            figures,
            title=f"Scar in the 17 segments, {shown}",
            unassigned={name: unassigned for name, (_, unassigned) in burdens[shown].items()},
        )
    ]


def _write_burdens(path: Path, burdens: Burdens, walls: Walls) -> None:
    """Write a line for each case and source: scar in segments 1 to 17 in mL, outside of all, and in % of the wall."""
    segments = range(1, AHA_SEGMENTS + 1)
    header = ["case_id", "source", *(f"segment_{segment}_ml" for segment in segments), "unassigned_ml"]
    header += [f"segment_{segment}_percent" for segment in segments]
    lines: list[list[Any]] = [
        [case_id, name, *map(number, ml), number(unassigned), *map(number, map(share_percent, ml, walls[case_id]))]
        for case_id, by_source in burdens.items()
        for name, (ml, unassigned) in by_source.items()
    ]
    write_csv(path, header, lines)
