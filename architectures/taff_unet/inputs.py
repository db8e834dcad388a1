"""The inputs of TAFF-UNet beside the image of a case: the AHA-17 prior, its ECG, and the days between the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from trifuse.architectures.data.ecg.median_beat import load_beat, network_ecg
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.lge_ecg import SCAR_CLASSES
from trifuse.architectures.data.layouts.read_case import load_image
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.evaluation.scoring import prediction_path, values_beyond
from trifuse.architectures.runs.recipes import RecipeError
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.lead_scaling import SCALING_WORDS
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS, ARTERY_SEGMENTS
from trifuse.architectures.storage.text import count, listed, read_table, repeated
from trifuse.blocks.temporal_aware_fusion import Projection
from trifuse.kernels import DataError, MissingExtra

from .aha17 import aha17_labels
from .config import TaffUNetConfig

ORACLE = "oracle prior"


@dataclass(frozen=True)
class PriorRecipe:
    """Where the AHA-17 prior comes from.

    The union of its channels is the myocardium. Taken from the reference annotation (``"gt"``), it tells the network
    exactly where the myocardium ends: an oracle, which every table and picture names. ``"predicted"`` takes it from
    the predictions of a first pass, those of training cases from networks that have not seen them.

    Attributes:
        source: ``"gt"`` or ``"predicted"``; there is no default: settings with a prior need a choice.
        labels: folder of label maps ``<case>.nii.gz`` to build it from; None trains a first pass (``"predicted"``) or
            takes the cohort's own labels (``"gt"``).
        folds: of the first pass over the training cases.
        first_pass_epochs: of each of its trainings; None takes the run's own number.
        reference: where angles start: ``"landmarks"`` of the cohort, or the image's ``"orientation"``, or a
            ``"fixed_angle"``; the same for all cases.
        angle_deg: direction of the anterior insertion of the right ventricle, for ``"fixed_angle"``.
        centre: of the angles: of each ``"slice"``, or one, ``"global"``.
        force_last: whether the most apical slice is the apex where no other is.
        arteries: table (CSV) with the columns ``case_id`` and ``artery``, one of LAD, RCA and LCX: where it is known
            which artery was occluded, the prior holds that one's segments alone. None keeps all.

    Raises:
        ValueError: fewer than two folds, no epoch of a first pass, or an angle that is not needed, or is needed and
            missing.
    """

    source: Literal["gt", "predicted"] | None = None
    labels: str | None = None
    folds: int = 5
    first_pass_epochs: int | None = None
    reference: Literal["landmarks", "orientation", "fixed_angle"] = "landmarks"
    angle_deg: float | None = None
    centre: Literal["slice", "global"] = "slice"
    force_last: bool = False
    arteries: str | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"prior.folds must be at least 2, got {self.folds}")
        if self.first_pass_epochs is not None and self.first_pass_epochs < 1:
            raise ValueError(f"prior.first_pass_epochs must be at least 1, or None, got {self.first_pass_epochs}")
        if (self.reference == "fixed_angle") != (self.angle_deg is not None):
            raise ValueError(
                f"prior.angle_deg is for prior.reference='fixed_angle', got {self.angle_deg} with {self.reference!r}"
            )

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: they knew of no arteries."""
        return {"arteries": None, **values}

    @property
    def word(self) -> str:
        """How titles name it."""
        word = ORACLE if self.source == "gt" else "predicted prior"
        return word if self.arteries is None else f"{word} of the given artery"


@dataclass(frozen=True)
class EcgInputRecipe:
    """How ECGs become inputs.

    Attributes:
        min_beats: fewest beats that make a median beat; paper prints of 2.5 s per lead need 1.
        unusable: what becomes of a case whose ECG gives no median beat: it counts as ``"absent"``, with a note, or is
            an ``"error"``.

    Raises:
        ValueError: no beat.
    """

    min_beats: int = 3
    unusable: Literal["absent", "error"] = "absent"

    def __post_init__(self) -> None:
        if self.min_beats < 1:
            raise ValueError(f"ecg.min_beats must be at least 1, got {self.min_beats}")


def case_side_inputs(
    cohort: Cohort,
    case_ids: Sequence[str],
    network: TaffUNetConfig,
    prior: PriorRecipe,
    ecg: EcgInputRecipe,
    *,
    labels: Path | None = None,
    broken: dict[str, DataError] | None = None,
) -> dict[str, SideInputs]:
    """Return the side inputs of each case that the network takes.

    Args:
        cohort: where the cases are.
        case_ids: the cases.
        network: says what is taken.
        prior: how the prior is built.
        ecg: how ECGs become inputs.
        labels: folder of the label maps that the prior is built from; None takes the cohort's own.
        broken: takes up what is wrong with cases, which are then left out, instead of an error.

    Raises:
        DataError: a reference label map cannot be divided into segments, landmarks are missing, or an ECG is unusable
            and must not be; all cases are looked at first.
    """
    side_inputs: dict[str, SideInputs] = {}
    problems: dict[str, DataError] = {}
    arteries = None if prior.arteries is None else read_arteries(Path(prior.arteries))
    for case_id in case_ids:
        case = cohort.case(case_id)
        notes: list[str] = []
        try:
            segments = _segments(case, prior, labels, notes) if network.takes_prior else None
            if segments is not None and arteries is not None:
                segments = supplied_by(arteries, case_id, segments)
            constants = _ecg_inputs(case, network, ecg, notes) if network.takes_ecg else {}
        except DataError as error:
            (problems if broken is None else broken)[case_id] = error
            continue
        if network.takes_segments and constants["has_ecg"] and segments is not None and not segments.any():
            notes.append("its ECG has no wall to say something about: it joins as the same at every position")
        side_inputs[case_id] = SideInputs(segments, constants, tuple(notes), network.takes_transform)
    if problems:
        raise DataError.merge([*problems.values()])
    return side_inputs


# --------------------------------------------------------------------------------------------------- the prior


def _segments(case: Case, prior: PriorRecipe, folder: Path | None, notes: list[str]) -> NDArray[np.uint8]:
    """Divide a case's wall into the segments: none, and a note, where a first pass found no wall to divide."""
    image = load_image(case)
    path = case.label if folder is None else prediction_path(folder, case.case_id)
    if path is None:
        raise DataError(case.case_id, "prior", got="no label map", want="one, or prior.labels with one for the case")
    labels = read_labels(path, like=image).voxels
    if folder is not None and (beyond := values_beyond(labels, len(SCAR_CLASSES))):
        want = f"class ids: {', '.join(f'{index} {name}' for index, name in enumerate(SCAR_CLASSES))}"
        raise DataError(path, "values", got=listed(beyond), want=want)
    try:
        voxels = labels if prior.source == "gt" else _largest_heart(labels)
        return divide(voxels, case, image, prior, note=notes.append)
    except UndividedWall as error:
        if prior.source == "gt":
            raise
        notes.append(f"no prior, because its predicted wall cannot be divided: {error}")
        return np.zeros(labels.shape, np.uint8)


def read_arteries(table: Path) -> dict[str, str]:
    """Return the artery of each case that a table (CSV) with the columns ``case_id`` and ``artery`` names.

    Raises:
        DataError: it cannot be read, lacks a column, or names another artery than LAD, RCA or LCX.
    """
    try:
        columns, lines = read_table(table)
        if not {"case_id", "artery"} <= {*columns}:
            raise ValueError(f"columns {listed(columns) or 'of no name'}")
        found = {composed(line["case_id"]): line["artery"] for line in lines}
    except (OSError, ValueError) as error:
        want = "a CSV file with the columns case_id and artery"
        raise DataError(table, "arteries", got=getattr(error, "strerror", None) or error, want=want) from error
    if twice := repeated(composed(line["case_id"]) for line in lines):
        raise DataError(table, "case_id", got=f"{listed(twice)} more than once", want="each case once")
    for case_id, artery in found.items():
        if artery not in ARTERY_SEGMENTS:
            raise DataError(table, f"artery of {case_id}", got=artery or "nothing", want=listed([*ARTERY_SEGMENTS]))
    return found


def supplied_by(arteries: Mapping[str, str], case_id: str, segments: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep those of a case's segments (D, H, W) that its artery supplies, and set the others to 0.

    Raises:
        DataError: the case's artery is not told.
    """
    if case_id not in arteries:
        hint = "add its line to the table of prior.arteries"
        raise DataError(case_id, "artery", got="none", want=f"one of {listed([*ARTERY_SEGMENTS])}", hint=hint)
    return np.where(np.isin(segments, ARTERY_SEGMENTS[arteries[case_id]]), segments, 0).astype(np.uint8)


def divide(
    labels: NDArray[np.uint8],
    case: Case,
    image: Volume,
    prior: PriorRecipe,
    note: Callable[[str], object] = lambda text: None,
) -> NDArray[np.uint8]:
    """Return the AHA segment of every voxel of a label map on the grid of its case's image, uint8 (D, H, W).

    Raises:
        DataError: landmarks are missing.
        UndividedWall: the label map has no wall, or none that closes.
    """
    landmarks = _landmarks(case, image) if prior.reference == "landmarks" else {}
    try:
        return aha17_labels(
            labels,
            image.affine_mm,
            reference=prior.reference,
            angle_deg=prior.angle_deg,
            centre=prior.centre,
            force_last=prior.force_last,
            note=note,
            **landmarks,
        )
    except DataError as error:
        raise UndividedWall(case.case_id, "wall", got=error) from error


class UndividedWall(DataError):
    """A label map whose wall cannot be divided into segments."""


def _landmarks(case: Case, image: Volume) -> dict[str, Any]:
    clinical = case.clinical
    if clinical is None or clinical.rv_anterior is None or clinical.rv_inferior is None:
        want = "rv_ant_x, rv_ant_y, rv_inf_x and rv_inf_y in cases.csv"
        hint = "take the reference from the image's orientation: --reference orientation"
        raise DataError(case.case_id, "insertions of the right ventricle", got="none", want=want, hint=hint)
    return {
        "rv_anterior": image.geometry.display_point(clinical.rv_anterior),
        "rv_inferior": image.geometry.display_point(clinical.rv_inferior),
    }


def _largest_heart(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the largest connected body of cavity and wall: a first pass may see further ones elsewhere."""
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "med", "building a prior") from None
    bodies, number = ndimage.label(labels > 0)
    if number < 2:
        return labels
    return np.where(bodies == np.bincount(bodies.flat)[1:].argmax() + 1, labels, 0).astype(labels.dtype)


# ----------------------------------------------------------------------------------------------------- the ECG


def _ecg_inputs(
    case: Case, network: TaffUNetConfig, recipe: EcgInputRecipe, notes: list[str]
) -> Mapping[str, torch.Tensor]:
    """Return ``ecg``, ``interval`` and ``has_ecg`` of a case; zeros and False for one without a usable ECG."""
    clinical = case.clinical
    signal, interval = None, 0.0
    if clinical is not None and clinical.ecg is not None and clinical.interval_days is not None:
        try:
            beat = load_beat(clinical.ecg, rate_hz=clinical.ecg_rate_hz, min_beats=recipe.min_beats)
            signal, interval = network_ecg(beat, network.ecg.lead_scaling), clinical.interval_days
        except DataError as error:
            if recipe.unusable == "error":
                raise
            notes.append(f"its ECG counts as absent: {error}")
    if signal is None:
        signal = torch.zeros(12, network.ecg.time_steps)
        return {"ecg": signal, "interval": torch.tensor(0.0), "has_ecg": torch.tensor(False)}
    return {"ecg": signal, "interval": torch.tensor(float(interval)), "has_ecg": torch.tensor(True)}


def describe_inputs(
    side_inputs: Mapping[str, SideInputs], network: TaffUNetConfig, prior: PriorRecipe
) -> dict[str, str]:
    """Return the facts that a report states about the side inputs of the cases."""
    facts = {}
    if network.takes_prior:
        angles = "" if prior.angle_deg is None else f" of {prior.angle_deg:g} degrees"
        where = {"gt": "the reference annotation (an oracle)", "predicted": "a first pass"}[prior.source or ""]
        alone = "" if prior.arteries is None else f", of the artery in {Path(prior.arteries).name} alone"
        facts["Prior"] = f"{prior.word}: AHA-17 of {where}{alone}, angles from {prior.reference}{angles}"
    if network.takes_ecg:
        without = [case_id for case_id, extra in side_inputs.items() if not extra.constants["has_ecg"]]
        names = f"; without: {listed(without)}" if without else ""
        facts["ECG"] = f"{count(len(side_inputs) - len(without), 'case')} of {len(side_inputs)} with one{names}"
        facts["ECG's leads"] = SCALING_WORDS[network.ecg.lead_scaling]
        facts["ECG's map"] = f"{_MAPS[network.fusion_projection]}{', rectified' if network.rectifies else ''}"
    odd: dict[str, list[str]] = {}
    for case_id, extra in side_inputs.items():
        for note in extra.notes:
            odd.setdefault(note, []).append(case_id)
    if odd:
        said = (f"{note} ({count(len(of), 'case') if len(of) > 3 else ', '.join(of)})" for note, of in odd.items())
        facts["Odd about the inputs"] = listed(said, most=6)
    return facts


_MAPS: dict[Projection, str] = {
    "segments": "per segment of the prior, of rank one (segments)",
    "segments_full": "per segment of the prior (segments_full)",
    "grid": "on a coarse grid (grid)",
    "broadcast": "the same at every position (broadcast)",
}


def side_input_shapes(network: TaffUNetConfig, side: int) -> dict[str, tuple[int, ...]]:
    """Return the shape, without a batch, of what the network takes beside images of ``side`` pixels."""
    shapes: dict[str, tuple[int, ...]] = {}
    if network.takes_prior:
        shapes["prior"] = (AHA_SEGMENTS, side, side)
    if network.takes_ecg:
        shapes |= {"ecg": (len(LEADS), network.ecg.time_steps), "interval": ()}
    if network.takes_transform:
        shapes["transform"] = (2, 3)
    return shapes


def require_choice(network: TaffUNetConfig, prior: PriorRecipe, *, strict: bool) -> None:
    """Refuse a network with a prior whose source nobody chose, and an oracle where none is wanted.

    Raises:
        RecipeError: naming what to say.
    """
    if network.takes_prior and prior.source is None:
        raise RecipeError(
            f"prior.source: setting {network.setting!r} takes the AHA-17 prior, and where that comes from has no "
            "default: 'predicted' (--prior predicted) builds it from a first pass, 'gt' (--prior gt) from the "
            "reference annotation, which tells the network where the myocardium ends: an oracle"
        )
    if strict and network.takes_prior and prior.source == "gt":
        raise RecipeError("prior.source: 'gt' is an oracle prior, refused because of --strict; use 'predicted'")
