"""The picture behind ``trifuse plot bullseye``: label maps of one heart, its scar or wall in each of 17 segments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.evaluation.bullseye import draw_bullseyes
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.storage.text import listed

from .aha17 import aha17_labels, scar_burden_ml
from .aha17_angles import Reference


def plot_scar_bullseyes(
    labels: Sequence[Path],
    out: Path,
    *,
    reference: Reference,
    rv_anterior: tuple[float, float] | None = None,
    rv_inferior: tuple[float, float] | None = None,
    rv_class: int | None = None,
    cavity: Sequence[int] = (1,),
    wall: Sequence[int] = (2, 3),
    scar: int = 3,
    of: Literal["scar", "wall"] = "scar",
    **options: Any,
) -> tuple[Picture, list[str]]:
    """Draw a bull's-eye for every label map of one heart into ``out/bullseye.png``, all in the segments of the first.

    Args:
        labels: NIfTI files on one grid; the truth first, predictions after it.
        out: folder to write into.
        reference: where angles start, see ``aha17_labels``.
        rv_anterior: the anterior insertion of the right ventricle, for ``"landmarks"``: indices (x, y) on the in-plane
            axes of the first file, in its own axis order.
        rv_inferior: the inferior insertion, likewise.
        rv_class: class of the right ventricle in the first file, for ``"rv_mask"``.
        cavity: classes of the blood pool.
        wall: classes of the wall.
        scar: class of the scar.
        of: what is measured, the scar or the wall.
        options: further ones of ``aha17_labels``: ``angle_deg``, ``base_first``, ``centre`` and ``force_last``.

    Returns:
        the picture, and what had to be decided, in sentences.

    Raises:
        DataError: a file is unusable, the grids differ, or the first map cannot be divided.
    """
    first = read_labels(labels[0])
    others = [read_labels(path, like=first) for path in labels[1:]]
    affine = first.affine_mm
    notes: list[str] = []
    segments = aha17_labels(
        first.voxels,
        affine,
        reference=reference,
        rv_anterior=None if rv_anterior is None else first.geometry.display_point(rv_anterior),
        rv_inferior=None if rv_inferior is None else first.geometry.display_point(rv_inferior),
        rv_mask=None if rv_class is None else first.voxels == rv_class,
        cavity=cavity,
        wall=wall,
        note=notes.append,
        **options,
    )
    measured = [scar] if of == "scar" else list(wall)
    burdens, unassigned = {}, {}
    names = _names(labels)
    known = {0, *cavity, *wall, scar} | ({rv_class} - {None})
    for name, volume in zip(names, (first, *others), strict=True):
        if strange := sorted(set(np.unique(volume.voxels).tolist()) - known):
            notes.append(f"{name}: values {listed(strange)} are neither blood pool, wall nor scar")
        if of == "scar" and scar not in volume.voxels:
            notes.append(f"{name}: no voxel has the value {scar} of the scar")
        found = np.isin(volume.voxels, measured)
        burdens[name], unassigned[name] = scar_burden_ml(found, segments, affine, scar=1)
    quantity = f"{of} volume"
    title = f"{quantity.capitalize()}, AHA-17 segments of {names[0]} by {reference}"
    return draw_bullseyes(burdens, out, title=title, quantity=quantity, unassigned=unassigned), notes


def _names(paths: Sequence[Path]) -> list[str]:
    """Return what each map is called: its file's name, with its folder's where names repeat, or else the whole path."""
    stems = [path.name.removesuffix(".gz").removesuffix(".nii") for path in paths]
    folders = [f"{path.parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    for names in (stems, folders):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
