"""Clinical read-outs of label maps: the volume of each class in mL, masses in g, the scar's share of the wall in %.

They come from the rows of scores, so that what is reported of a heart is of the very voxels that were scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .scoring import OK, Row
from .summary import SCAR
from .tables import number, write_csv

DENSITY_G_PER_ML = 1.05
"""Of myocardium, scarred or not: the value that cardiac MR takes for the mass of the left ventricle.

Source: Schulz-Menger et al. (2020), "Standardized image interpretation and post-processing in cardiovascular magnetic
resonance - 2020 update", J Cardiovasc Magn Reson 22.
"""
MYOCARDIUM = "myocardium"
TISSUES = (MYOCARDIUM, SCAR)  # classes that have a mass: the others are cavities, or organs of another density


@dataclass(frozen=True)
class Readout:
    """One number that is read off a heart, in truth and by the prediction.

    Attributes:
        case_id, patient: whose heart.
        quantity: ``"volume"``, ``"mass"`` or ``"burden"``, the scar's share of the wall.
        class_name: of what.
        segment: of the left ventricle, 1 to 17; None for all of it.
        unit: ``"ml"``, ``"g"`` or ``"%"``.
        truth, prediction: the number; NaN where there is none.
        method: what it rests on beside the voxels, such as a density.
    """

    case_id: str
    patient: str
    quantity: str
    class_name: str
    segment: int | None
    unit: str
    truth: float
    prediction: float
    method: str = ""


def readouts_of(rows: Sequence[Row]) -> list[Readout]:
    """Return what can be read off each scored volume: nothing of slices, and nothing where volumes are not known.

    Every class has a volume; `TISSUES` have a mass, of the density `DENSITY_G_PER_ML`; and where there are both
    myocardium and scar, the burden is the scar's share of the two together.
    """
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.slice is None and row.volumes is not None:
            by_case.setdefault(row.case_id, []).append(row)
    return [readout for of_case in by_case.values() for readout in _of_case(of_case)]


def write_readouts(path: Path, readouts: Sequence[Readout]) -> None:
    """Write read-outs as CSV, atomically, at full precision: a line for each number, with the difference."""
    header = ["case_id", "patient", "quantity", "class_name", "segment", "unit", "truth", "prediction", "difference"]
    lines = (
        [
            *(each.case_id, each.patient, each.quantity, each.class_name),
            *("" if each.segment is None else each.segment, each.unit),
            *map(number, (each.truth, each.prediction, each.prediction - each.truth)),
            each.method,
        ]
        for each in readouts
    )
    write_csv(path, [*header, "method"], lines)


def share_percent(part: float, whole: float) -> float:
    """Return what share of a whole a part is, in %; NaN of nothing."""
    return 100 * part / whole if whole else math.nan


def _of_case(rows: Sequence[Row]) -> list[Readout]:
    first = rows[0]
    volumes = {row.class_name: row.volumes for row in rows if row.volumes is not None}
    status = "" if first.status == OK else first.status
    density = "; ".join(filter(None, (f"density {DENSITY_G_PER_ML:g} g/ml", status)))

    def readout(quantity: str, name: str, unit: str, numbers: Iterable[float], method: str) -> Readout:
        truth, prediction = numbers
        return Readout(first.case_id, first.patient, quantity, name, None, unit, truth, prediction, method)

    found = [readout("volume", name, "ml", of_class, status) for name, of_class in volumes.items()]
    found += [
        readout("mass", name, "g", (DENSITY_G_PER_ML * ml for ml in volumes[name]), density)
        for name in TISSUES
        if name in volumes
    ]
    if volumes.keys() >= {*TISSUES}:
        wall = [sum(both) for both in zip(*(volumes[name] for name in TISSUES), strict=True)]
        burden = [share_percent(scar, whole) for scar, whole in zip(volumes[SCAR], wall, strict=True)]
        method = "; ".join(filter(None, ("scar / (myocardium + scar)", status)))
        found.append(readout("burden", SCAR, "%", burden, method))
    return found
