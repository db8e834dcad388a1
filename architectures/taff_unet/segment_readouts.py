"""The scar's burden of each AHA segment, read off label maps of any origin: what ``trifuse evaluate`` adds by wish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.layouts.cohort import Case
from trifuse.architectures.data.layouts.lge_ecg import SCAR_CLASSES
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.evaluation.readouts import Readout, share_percent
from trifuse.architectures.evaluation.summary import SCAR
from trifuse.architectures.storage.text import listed
from trifuse.kernels import DataError

from .aha17 import scar_burden_ml, wall_volume_ml
from .inputs import PriorRecipe, divide

SegmentReference = Literal["landmarks", "orientation"]


def check_scar_classes(what: object, class_names: Sequence[str]) -> None:
    """Refuse classes among which blood pool, myocardium and scar are not told by their names.

    Raises:
        DataError: naming those that are missing.
    """
    if missing := [name for name in SCAR_CLASSES[1:] if name not in class_names]:
        hint = 'name them, such as targets="blood pool=1" targets=myocardium=2 targets=scar=3'
        raise DataError(what, "classes", got=listed(class_names[1:]), want=f"also {listed(missing)}", hint=hint)


def segment_burdens(
    case: Case,
    truth: Volume,
    prediction: NDArray[Any] | None,
    class_names: Sequence[str],
    reference: SegmentReference,
) -> list[Readout]:
    """Return what share of the wall is scar in each of the 17 segments, in %, in truth and by the prediction.

    Segments are those of the true wall, and so is the volume that shares are of.

    Args:
        case: whose heart; it has the landmarks.
        truth: true classes, on the grid of the case.
        prediction: predicted ones of the same shape; None where there are none.
        class_names: of both, the background first; see `check_scar_classes`.
        reference: where angles start.

    Raises:
        DataError: landmarks are missing.
        UndividedWall: there is no wall, or none that closes.
    """
    standard = [_standard(labels, class_names) for labels in (truth.voxels, prediction) if labels is not None]
    segments = divide(standard[0], case, truth, PriorRecipe(reference=reference))
    wall = wall_volume_ml(segments, truth.affine_mm)
    burdens = [scar_burden_ml(labels, segments, truth.affine_mm)[0] for labels in standard]
    shares = [[share_percent(scar, whole) for scar, whole in zip(burden, wall, strict=True)] for burden in burdens]
    nothing = [float("nan")] * len(wall)
    method = f"of the true wall of the segment, angles from {reference}"
    return [
        Readout(case.case_id, case.patient, "burden", SCAR, segment, "%", true, found, method)
        for segment, (true, found) in enumerate(zip(*[*shares, nothing][:2], strict=True), start=1)
    ]


def _standard(labels: NDArray[Any], class_names: Sequence[str]) -> NDArray[np.uint8]:
    """Return labels numbered as `SCAR_CLASSES`; all other classes are background."""
    standard = np.zeros(labels.shape, np.uint8)
    for number, name in enumerate(SCAR_CLASSES[1:], start=1):
        standard[labels == class_names.index(name)] = number
    return standard
