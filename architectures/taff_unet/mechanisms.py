"""What TAFF-UNet is made of beside a U-Net: the prior, the ECG, the gate between them, and the days between.

All that is asked of the fusion stands in the last section: the results of its layer ``gate``, two logits, and of
``film.mlp``, gamma and beta, the weights that it returns, and what its gate makes of the days, ``gate.time``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.evaluation.audit import audit_network
from trifuse.architectures.evaluation.audit_report import draw_audit, verdict
from trifuse.architectures.evaluation.mechanisms import (
    Context,
    Inputs,
    Means,
    Mechanism,
    Watch,
    answering,
    cut,
    exchanged,
    together,
    with_constants,
    zeroed,
)
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.runs.folder import run_section
from trifuse.architectures.runs.prepared_data import PreparedData

from .first_pass import first_pass_labels
from .inputs import EcgInputRecipe, PriorRecipe, case_side_inputs
from .model import TaffUNet

OTHER_ECG, OTHER_INTERVAL = "ECG of another case", "interval of another case"
EXCHANGE_TEST = "Exchange test"
GATE = "gate weight of the ECG"


def mechanisms(model: TaffUNet) -> list[Mechanism]:
    """Return the table of a network's mechanisms; those that its setting lacks say so."""
    config = model.config
    parts = ((config.takes_prior, _PRIOR), (config.takes_ecg, (*_ECG, *_GATE_ROWS)), (config.takes_time, _TIME))
    lacking = f"setting {config.setting!r} has none"
    return [
        row if taken else Mechanism(row.name, row.change, unmeasured=lacking) for taken, rows in parts for row in rows
    ]


def run_inputs(model: TaffUNet, run: Path, cohort: Cohort, case_ids: Sequence[str]) -> Mapping[str, SideInputs]:
    """Return what cases of a finished run bring beside their images, as in its training.

    Args:
        model: the network.
        run: its folder, which says how inputs are made and holds what the first pass predicted.
        cohort: where the cases are.
        case_ids: the cases.

    Raises:
        CheckpointError: the run does not say how inputs are made.
        DataError: a label map of the first pass is gone, or an input is unusable.
    """
    prior, ecg = run_section(run, "prior", PriorRecipe), run_section(run, "ecg", EcgInputRecipe)
    own = prior.source == "gt" and prior.labels is None
    labels = None if own or not model.config.takes_prior else first_pass_labels(run, prior)
    return case_side_inputs(cohort, case_ids, model.config, prior, ecg, labels=labels)


def exchange_test(model: TaffUNet, data: PreparedData, case_ids: Sequence[str], figures: Path) -> Picture | None:
    """Draw what the ECG and the interval of another case change, or None where no two cases have one that differs.

    Args:
        model: the network.
        data: what it was trained and tested on.
        case_ids: the cases to predict, and to exchange between.
        figures: folder to draw into.
    """
    rows = [row for row in mechanisms(model) if row.name in (OTHER_ECG, OTHER_INTERVAL) and not row.unmeasured]
    if not rows:
        return None
    inputs = data.side_inputs
    audit = audit_network(model, data.cohort, case_ids, data.recipe.preprocessing, rows, side_inputs=inputs)
    found = [finding for finding in audit.findings if finding.moved]
    if not found:
        return None
    return draw_audit(audit, figures, name="exchange_test", title=f"{EXCHANGE_TEST}: {'; '.join(map(verdict, found))}")


# --------------------------------------------------------------------------------------------------- the inputs


def _with_ecg(inputs: Inputs) -> list[str]:
    return [case_id for case_id, each in inputs.items() if each.constants["has_ecg"]]


def _without_prior(inputs: Inputs) -> Inputs:
    return {
        case_id: replace(each, prior=np.zeros_like(each.prior))
        for case_id, each in inputs.items()
        if each.prior is not None and each.prior.any()
    }


def _other_prior(inputs: Inputs) -> Inputs:
    def take(own: SideInputs, other: SideInputs) -> SideInputs | None:
        assert own.prior is not None  # as of all that is exchanged, see below
        assert other.prior is not None
        prior = fitted(other.prior, own.prior.shape)
        return None if np.array_equal(prior, own.prior) else replace(own, prior=prior)

    return exchanged(inputs, [name for name, each in inputs.items() if each.prior is not None], take)


def fitted(labels: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return labels (D, H, W) on a grid of another shape, each voxel that of the nearest one, the ends on the ends."""
    places = [((np.arange(to) + 0.5) * of / to).astype(int) for of, to in zip(labels.shape, shape, strict=True)]
    return labels[np.ix_(*places)]


def _without_ecg(inputs: Inputs) -> Inputs:
    return {name: with_constants(inputs[name], has_ecg=torch.tensor(False)) for name in _with_ecg(inputs)}


def _other_ecg(inputs: Inputs) -> Inputs:
    def take(own: SideInputs, other: SideInputs) -> SideInputs | None:
        ecg = other.constants["ecg"]
        return None if torch.equal(ecg, own.constants["ecg"]) else with_constants(own, ecg=ecg)

    return exchanged(inputs, _with_ecg(inputs), take)


def _other_interval(inputs: Inputs) -> Inputs:
    def take(own: SideInputs, other: SideInputs) -> SideInputs | None:
        days = other.constants["interval"]
        return None if torch.equal(days, own.constants["interval"]) else with_constants(own, interval=days)

    return exchanged(
        inputs, sorted(_with_ecg(inputs), key=lambda name: float(inputs[name].constants["interval"])), take
    )


# --------------------------------------------------------------------------------------------------- the fusion


def _fusion(model: TaffUNet) -> Any:
    assert model.fusion is not None  # the setting has an ECG
    return model.fusion


def _gate_at(model: TaffUNet, weight: Tensor) -> Context:
    """Let the gate give the ECG this weight, and the image the rest."""
    logits = torch.stack([1 - weight, weight]).log()
    return answering([_fusion(model).gate], lambda given, own: logits.to(own).expand_as(own))


def _watch_gate(model: TaffUNet, keep: Callable[[Tensor], object]) -> Context:
    def look(given: Tensor, result: tuple[Tensor, Tensor]) -> None:
        _, weights = result
        keep(weights[weights.sum(dim=1) > 0, 1])  # (0, 0) stands for no ECG

    return answering([_fusion(model)], look)


def _without_time(model: TaffUNet, means: Means) -> Context:
    fusion = _fusion(model)
    film = zeroed([fusion.film.mlp])  # gamma = beta = 0
    gates: Mapping[str, Callable[[], Context]] = {
        "apart": lambda: zeroed([fusion.gate.time]),  # both logits
        "joined": lambda: cut([fusion.gate], slice(-1, None)),  # the last number that it sees
    }
    return together([film, gates[fusion.gate_time]()] if fusion.gate_time in gates else [film])


_PRIOR = (
    Mechanism("prior", "its 17 channels are empty", exchange=_without_prior),
    Mechanism("prior of another case", "another case's segments, brought to the grid", exchange=_other_prior),
)
_ECG = (
    Mechanism("ECG", "the case counts as one without an ECG", exchange=_without_ecg),
    Mechanism(OTHER_ECG, "another case's beat, its own interval", exchange=_other_ecg),
)
_GATE_ROWS = (
    Mechanism(
        "gate at 1/2",
        "image and ECG weigh the same, in every case",
        lambda model, means: _gate_at(model, torch.tensor(0.5)),
    ),
    Mechanism(
        "gate fixed",
        "the weights are their mean over images, in every case",
        lambda model, means: _gate_at(model, means[GATE]),
        watches=(Watch(GATE, _watch_gate),),
    ),
)
_TIME = (
    Mechanism("time", "the days neither modulate the fused map nor weigh the ECG", _without_time),
    Mechanism(OTHER_INTERVAL, "another case's days, its own ECG", exchange=_other_interval),
)
