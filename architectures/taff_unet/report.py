"""The figures of a TAFF-UNet's report beside scores: bull's-eyes, the ECG's attention, the gate, and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from trifuse.architectures.evaluation.bullseye import draw_bullseyes
from trifuse.architectures.evaluation.ecg_attention_figures import draw_lead_attention, draw_temporal_attention
from trifuse.architectures.evaluation.interval_figures import draw_gate_weights, draw_interval_bars, interval_days
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import Evaluation
from trifuse.architectures.evaluation.scoring import Row, prediction_path
from trifuse.architectures.evaluation.tables import number, write_csv
from trifuse.architectures.runs.folder import FIRST_PASS_FOLDER
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.training.batches import on_device
from trifuse.architectures.training.loop import side_inputs_of
from trifuse.kernels import DataError

from .aha17 import scar_burden_ml
from .first_pass import LABELS
from .inputs import ORACLE, PriorRecipe, divide
from .model import TaffUNet

SCAR = "scar"
BURDEN_TABLE = "scar_burden.csv"
_SLICES_AT_ONCE = 16


def draw_pictures(
    run: Path, model: TaffUNet, data: PreparedData, prior: PriorRecipe, scored: Evaluation, figures: Path
) -> list[Picture]:
    """Draw the figures of a finished run for the cases that it scored, those that its setting and cohort allow.

    Args:
        run: the run's folder, with ``predictions/<part>``.
        model: the network.
        data: what it was trained and tested on.
        prior: where its prior comes from, and where angles start.
        scored: the scores of a part of the split.
        figures: folder to draw into.
    """
    if SCAR not in data.cohort.class_names:
        return []
    side_inputs = data.side_inputs or {}
    cases = [data.cohort.case(case_id) for case_id in dict.fromkeys(row.case_id for row in scored.rows)]
    this = f"this network, {ORACLE}" if model.config.takes_prior and prior.source == "gt" else "this network"
    sources = {"first pass": first_pass_labels(run, prior), this: run / "predictions" / scored.name}
    pictures = _bullseyes(sources, data, cases, prior, figures)
    with_ecg = [case for case in cases if model.config.takes_ecg and side_inputs[case.case_id].constants["has_ecg"]]
    if with_ecg:
        days = interval_days(data.cohort, [case.case_id for case in with_ecg])
        beats = {case.case_id: side_inputs[case.case_id].constants["ecg"] for case in with_ecg}
        pictures += _attention(model, beats, figures)
        pictures.append(draw_gate_weights(days, gate_weights(model, data, list(days)), figures))
        pictures.append(draw_interval_bars(days, {this: scar_dsc(scored.rows)}, figures))
    return pictures


def scar_dsc(rows: Iterable[Row]) -> dict[str, float]:
    """Return the DSC of the scar of each case, the mean over runs where several have scored it."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.class_name == SCAR:
            scores.setdefault(row.case_id, []).append(row.scores["dsc"])
    return {case_id: sum(values) / len(values) for case_id, values in scores.items()}


def first_pass_labels(run: Path, prior: PriorRecipe) -> Path:
    """Return the folder of the label maps that a predicted prior was built from."""
    return run / FIRST_PASS_FOLDER / LABELS if prior.labels is None else Path(prior.labels)


def gate_weights(model: TaffUNet, data: PreparedData, case_ids: Sequence[str]) -> dict[str, float]:
    """Return the weight that the gate gives to the ECG of each case, mean over its slices."""
    slices = GridPatches(data.cohort, case_ids, data.recipe.preprocessing, side_inputs=data.side_inputs)
    device = next(model.parameters()).device
    found: dict[str, list[float]] = {case_id: [] for case_id in case_ids}
    loader = torch.utils.data.DataLoader(slices, batch_size=_SLICES_AT_ONCE)
    with torch.inference_mode():
        for batch in loader:
            batch = on_device(batch, device)
            gate: Tensor | None = model.run(batch["image"], **side_inputs_of(batch)).gate
            assert gate is not None  # the network takes an ECG
            for case_id, weight in zip(batch["case_id"], gate[:, 1].tolist(), strict=True):
                found[case_id].append(weight)
    return {case_id: float(np.mean(weights)) for case_id, weights in found.items()}


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


def _bullseyes(
    sources: Mapping[str, Path], data: PreparedData, cases: Sequence[Case], prior: PriorRecipe, figures: Path
) -> list[Picture]:
    """Draw the scar of the case that has most of it: in truth, by the first pass, by this network; tabulate all cases.

    The segments are those of the reference annotation. Without landmarks, where they are the reference of angles,
    nothing is drawn.
    """
    burdens: dict[str, dict[str, tuple[NDArray, float]]] = {}
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
    if not burdens:
        return []
    _write_burdens(figures / BURDEN_TABLE, burdens)
    shown = max(burdens, key=lambda case_id: burdens[case_id]["truth"][0].sum())
    return [
        draw_bullseyes(
            {name: volumes for name, (volumes, _) in burdens[shown].items()},
            figures,
            title=f"Scar in the 17 segments, {shown}",
            unassigned={name: unassigned for name, (_, unassigned) in burdens[shown].items()},
        )
    ]


def _write_burdens(path: Path, burdens: Mapping[str, Mapping[str, tuple[NDArray, float]]]) -> None:
    """Write a line for each case and source: mL in segments 1 to 17, and outside of all of them."""
    header = ["case_id", "source", *(f"segment_{number}_ml" for number in range(1, 18)), "unassigned_ml"]
    lines: list[list[Any]] = [
        [case_id, name, *map(number, ml), number(unassigned)]
        for case_id, by_source in burdens.items()
        for name, (ml, unassigned) in by_source.items()
    ]
    write_csv(path, header, lines)
