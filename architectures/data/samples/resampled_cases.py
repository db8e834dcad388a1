"""Cases as slices of one spacing, with what they bring beside their images: what patches are cut out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_raw_case, map_labels
from trifuse.architectures.storage.segment_maps import AHA_SEGMENTS

from .case_cache import CaseCache
from .preprocessing import Preprocessing, Slices, names_of_scaling, patches_and_spacing
from .resampling import PlaneGrid
from .side_inputs import SideInputs, side_inputs_of
from .slice_dataset import no_slice, slices_that_count
from .volume_to_slices import network_input

_TRANSFORM_VERSION = 1  # raise it whenever the bytes of an entry would change


class ResampledCases:
    """The slices of some cases, cropped to what is not zero, scaled, and resampled in plane; kept on disk.

    Args:
        cohort: where the cases come from; all of them need labels.
        case_ids: the cases, in the order of their numbers.
        preprocessing: how values are scaled, how many channels they become, and the spacing of ``patches``.
        cache: folder of the cache entries, see `CaseCache`.
        side_inputs: what cases bring beside their images; priors are resampled by the nearest pixel and kept in memory.
        slices: which slices count, see `Slices`.

    Raises:
        DataError: a case is unusable, has no labels or no side inputs, or no slice is left.
        MissingExtra: scipy is not installed.
    """

    def __init__(
        self,
        cohort: Cohort,
        case_ids: Sequence[str],
        preprocessing: Preprocessing,
        *,
        cache: Path | None = None,
        side_inputs: Mapping[str, SideInputs] | None = None,
        slices: Slices = "all",
    ) -> None:
        self.case_ids, self._preprocessing = tuple(case_ids), preprocessing
        self._side_inputs = [
            SideInputs() if side_inputs is None else side_inputs_of(side_inputs, name) for name in self.case_ids
        ]
        build = partial(_build, preprocessing)
        self._cache = CaseCache(cohort, self.case_ids, cache, _transform_names(preprocessing), build)
        self.digests = self._cache.digests
        entries = [self._cache[number] for number in range(len(self._cache))]
        self._priors = [
            None if one.prior is None else _grid_of(entry).nearest(one.prior)
            for one, entry in zip(self._side_inputs, entries, strict=True)
        ]
        self.kept = [np.flatnonzero(slices_that_count(entry, slices)) for entry in entries]
        self.sizes = [entry["image"].shape[1:] for entry in entries]
        self.shows = [np.array(entry["shows"]) for entry in entries]
        if not any(map(len, self.kept)):
            raise no_slice(cohort, slices)

    def target(self, number: int, position: int) -> np.ndarray:
        """Return the labels (h, w) of a slice."""
        return self._cache[number][position]["target"]

    def cut(
        self, number: int, position: int, corner: tuple[int, int], side: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cut a square out of a slice, from a corner on that may lie outside of it.

        Returns:
            Scaled values (1, side, side) float32, labels (side, side) int64, and segments (side, side) uint8 where
            the case has a prior.
        """
        record, prior = self._cache[number][position], self._priors[number]
        image, labels = (cut_square(record[name], corner, side) for name in ("image", "target"))
        segments = None if prior is None else torch.from_numpy(cut_square(prior[position], corner, side))
        return torch.from_numpy(image)[None], torch.from_numpy(labels.astype(np.int64)), segments

    def sample(
        self,
        number: int,
        position: int,
        index: int,
        image: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        transform: Tensor | None = None,
    ) -> dict[str, Any]:
        """Put together what a network is given of a patch (1, P, P), its labels and its segments (P, P).

        How the patch was moved, (2, 3), joins them where the case's `SideInputs` ask for it; None says that it was not.
        """
        moved = {"transform": torch.eye(2, 3) if transform is None else transform}
        return {
            "image": network_input(image[0], self._preprocessing),
            "target": labels,
            **({} if segments is None else {"prior": one_hot_prior(segments)}),
            **(moved if self._side_inputs[number].transform else {}),
            **self._side_inputs[number].constants,
            "case_id": self.case_ids[number],
            "slice": int(self._cache[number][position]["slice"]),
            "index": index,
        }


def one_hot_prior(segments: Tensor) -> Tensor:
    """Turn segments (..., H, W), 0 to 17, into the channels (..., 17, H, W) that a network gets, float32."""
    numbers = torch.arange(1, AHA_SEGMENTS + 1, dtype=segments.dtype, device=segments.device)
    return (segments.unsqueeze(-3) == numbers[:, None, None]).float()


def cut_square(plane: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
    """Copy a square out of a plane, from a corner on that may lie outside of it; zero where the plane ends."""
    square = np.zeros((side, side), plane.dtype)
    within, of_plane = [], []
    for at, length in zip(corner, plane.shape, strict=True):
        first, last = max(at, 0), min(at + side, length)
        within.append(slice(first - at, last - at))
        of_plane.append(slice(first, last))
    square[tuple(within)] = plane[tuple(of_plane)]
    return square


def _transform_names(preprocessing: Preprocessing) -> list[Any]:
    """Name everything that the bytes of an entry depend on, beside the case."""
    _, spacing_mm = patches_and_spacing(preprocessing)
    scaling = names_of_scaling(preprocessing)
    return ["resampled", _TRANSFORM_VERSION, spacing_mm, scaling, preprocessing.nonfinite]


def _record(size: tuple[int, int], classes: int) -> np.dtype:
    """Describe a slice: as for `SliceDataset`, and which slice, rows and columns of the volume it is made of."""
    plane = [("image", "<f4", size), ("target", "u1", size), ("shows", "?", (classes - 1,)), ("labelled", "?")]
    return np.dtype([*plane, ("slice", "<i4"), ("rows", "<i4", (2,)), ("columns", "<i4", (2,))])


def _build(preprocessing: Preprocessing, cohort: Cohort, case: Case) -> np.ndarray:
    image, raw = load_raw_case(case, nonfinite=preprocessing.nonfinite)
    assert raw is not None
    grid = PlaneGrid.of(image, patches_and_spacing(preprocessing)[1])
    depth, rows, columns = grid.box
    entry = np.zeros(depth.stop - depth.start, _record(grid.size, len(cohort.class_names)))
    entry["image"] = grid.image(image.voxels, preprocessing)
    entry["target"] = grid.labels(map_labels(cohort, raw).voxels)
    for index in range(1, len(cohort.class_names)):
        entry["shows"][:, index - 1] = (entry["target"] == index).any(axis=(1, 2))
    entry["labelled"] = raw.voxels[depth].any(axis=(1, 2))
    entry["slice"] = np.arange(depth.start, depth.stop)
    entry["rows"], entry["columns"] = (rows.start, rows.stop), (columns.start, columns.stop)
    return entry


def _grid_of(entry: np.ndarray) -> PlaneGrid:
    depth = slice(int(entry[0]["slice"]), int(entry[-1]["slice"]) + 1)
    rows, columns = (slice(*entry[0][name].tolist()) for name in ("rows", "columns"))
    return PlaneGrid((depth, rows, columns), entry.dtype["image"].shape)
