"""Square patches of slices at one spacing: what networks are trained on that see a slice window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.kernels.errors import DataError

from .case_cache import CaseCache
from .extras import PRIOR_CHANNELS, CaseExtras, extras_of
from .preparation import Preparation, network_input
from .resampling import PlaneGrid
from .slices import Keep, generator_of, kept_slices, refuse_absent_classes
from .study import Case, Study, load_image, load_raw_case, map_labels
from .voxel_values import NonFinite

PatchAugment = Callable[[Tensor, Tensor, Tensor | None, torch.Generator], tuple[Tensor, Tensor, Tensor | None]]
IGNORED = -1  # target of pixels that a window shows, but does not answer for

_TRANSFORM_VERSION = 1  # raise it whenever the bytes of an entry would change


@dataclass(frozen=True)
class Patches:
    """How networks are trained on patches of slices, and predict slices window by window.

    Attributes:
        spacing_mm: rows and columns of all slices are resampled to it; None takes the median of the training cases,
            which is fixed and written down when a run is prepared.
        step: from one window of a prediction to the next, at most, in patches.
        mirror: whether a prediction is the mean over the four mirrorings of a patch.
        foreground: share of the training patches that are centred on a class, each class as often as the others.
        samples_per_epoch: patches in an epoch.

    Raises:
        ValueError: a value out of range.
    """

    spacing_mm: tuple[float, float] | None = None
    step: float = 0.5
    mirror: bool = True
    foreground: float = 1 / 3
    samples_per_epoch: int = 3000

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(0 < step < math.inf for step in self.spacing_mm):
            raise ValueError(f"patches.spacing_mm must be two positive lengths in mm, got {self.spacing_mm}")
        if not 0 < self.step <= 1:
            raise ValueError(f"patches.step must be in (0, 1], got {self.step}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"patches.foreground must be in [0, 1], got {self.foreground}")
        if self.samples_per_epoch < 1:
            raise ValueError(f"patches.samples_per_epoch must be at least 1, got {self.samples_per_epoch}")


def median_spacing_mm(study: Study, case_ids: Sequence[str], nonfinite: NonFinite = "error") -> tuple[float, float]:
    """Return the median over the cases of the distance between rows, and between columns."""
    spacings = [load_image(study.case(case_id), nonfinite=nonfinite).spacing_mm[1:] for case_id in case_ids]
    rows, columns = np.median(spacings, axis=0).tolist()
    return rows, columns


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of some cases of a study, as samples for training a 2-D network.

    A sample is asked for by ``(seed, epoch, index)``, and these three numbers alone decide it: first a case is drawn,
    each as likely as any other, then a slice of it and a place on that. It is a dictionary of ``image``
    (channels, P, P) float32, ``target`` (P, P) int64, ``prior`` (17, P, P) float32 where the case has one, its
    constants, ``case_id``, ``slice`` (of the volume as it is shown) and ``index``. Where a slice is smaller than a
    patch, the patch is zero around it.

    Args:
        study: where the cases come from; all of them need labels.
        case_ids: the cases.
        patch_size: P, in pixels.
        patches: how patches are drawn; with a spacing.
        preparation: how values are scaled, and how many channels they become.
        augment: called with image (1, P, P), target (P, P), prior (P, P) uint8 or None, and a generator.
        cache: folder of the cache entries; without it they live in a temporary folder as long as the data set does.
        extras: what the cases bring beside their images.
        keep: the slices that patches are taken from, see `SliceDataset`.
        nonfinite: what to do with NaN and infinite voxels, see ``read_image``.

    Raises:
        DataError: a case is unusable, has no labels or no extras, or no slice is left.
        MissingExtra: scipy is not installed.
    """

    def __init__(
        self,
        study: Study,
        case_ids: Sequence[str],
        patch_size: int,
        *,
        patches: Patches,
        preparation: Preparation,
        augment: PatchAugment | None = None,
        cache: Path | None = None,
        extras: Mapping[str, CaseExtras] | None = None,
        keep: Keep = "all",
        nonfinite: NonFinite = "error",
    ) -> None:
        self._cases = _ResampledCases(study, case_ids, patches, preparation, cache, extras, nonfinite)
        self._patch_size, self._patches, self._augment = patch_size, patches, augment
        self.case_ids, self.class_names = self._cases.case_ids, study.class_names
        self._kept = [np.flatnonzero(kept_slices(entry, keep)) for entry in self._cases.entries()]
        self._shows = [entry["shows"][kept] for entry, kept in zip(self._cases.entries(), self._kept, strict=True)]
        self._with_slices = np.flatnonzero([len(kept) for kept in self._kept])
        if not len(self._with_slices):
            hint = 'keep="all" keeps slices without labels'
            raise DataError(study.root, "slices", got=f"none with keep={keep!r}", want="at least one", hint=hint)

    def __len__(self) -> int:
        """Return the number of patches in an epoch."""
        return self._patches.samples_per_epoch

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """The spacing of the resampled slices."""
        assert self._patches.spacing_mm is not None  # the resampled cases have asked for it
        return self._patches.spacing_mm

    @property
    def len_slices(self) -> int:
        """The number of slices that patches are taken from."""
        return sum(map(len, self._kept))

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """Return the sample of ``(seed, epoch, index)``."""
        generator = generator_of(*key)
        number, position, corner = self._place(generator)
        image, target, prior = self._cases.cut(number, position, corner, self._patch_size)
        if self._augment is not None:
            image, target, prior = self._augment(image, target, prior, generator)
        return self._cases.sample(number, position, key[2], image, target, prior)

    def require_every_class(self) -> None:
        """Raise if a class is on none of the slices: a network cannot learn what it is never shown.

        Raises:
            DataError: naming the classes.
        """
        shown = np.any(np.concatenate(self._shows), axis=0)
        refuse_absent_classes(self.class_names, shown, self.len_slices, len(self.case_ids))

    def _place(self, generator: torch.Generator) -> tuple[int, int, tuple[int, int]]:
        """Draw a case, one of its slices, and where on that the patch begins."""
        number = _one_of(self._with_slices, generator)
        kept, shows = self._kept[number], self._shows[number]
        classes = np.flatnonzero(shows.any(axis=0))
        if len(classes) and float(torch.rand((), generator=generator)) < self._patches.foreground:
            chosen = _one_of(classes, generator)
            position = _one_of(kept[shows[:, chosen]], generator)
            target = self._cases.entry(number)[position]["target"]
            voxel = np.unravel_index(_one_of(np.flatnonzero(target == chosen + 1), generator), target.shape)
            wanted = [int(index) - self._patch_size // 2 for index in voxel]
        else:
            position = _one_of(kept, generator)
            wanted = None
        size = self._cases.entry(number).dtype["image"].shape
        corner = [
            _drawn(max(length - self._patch_size, 0) + 1, generator) if wanted is None else wanted[axis]
            for axis, length in enumerate(size)
        ]
        rows, columns = (_inside(at, length, self._patch_size) for at, length in zip(corner, size, strict=True))
        return number, position, (rows, columns)


class CoveringPatches(Dataset[dict[str, Any]]):
    """Patches that together show every slice of some cases: what a network on patches is validated on.

    They are samples as those of `PatchDataset`, by their number and without augmentation. Patches that overlap share
    out the pixels: the target is `IGNORED` where another one answers, and outside of the slice, so that every pixel
    of a slice counts once.

    Args:
        study, case_ids, patch_size, patches, preparation, cache, extras, keep, nonfinite: see `PatchDataset`.

    Raises:
        DataError, MissingExtra: see `PatchDataset`.
    """

    def __init__(
        self,
        study: Study,
        case_ids: Sequence[str],
        patch_size: int,
        *,
        patches: Patches,
        preparation: Preparation,
        cache: Path | None = None,
        extras: Mapping[str, CaseExtras] | None = None,
        keep: Keep = "all",
        nonfinite: NonFinite = "error",
    ) -> None:
        self._cases = _ResampledCases(study, case_ids, patches, preparation, cache, extras, nonfinite)
        self._patch_size = patch_size
        self.case_ids, self.class_names = self._cases.case_ids, study.class_names
        self._index = [
            (number, int(position), rows, columns)
            for number, entry in enumerate(self._cases.entries())
            for position in np.flatnonzero(kept_slices(entry, keep))
            for rows, columns in product(*(_tiles(length, patch_size) for length in entry.dtype["image"].shape))
        ]

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the patch of that number."""
        number, position, rows, columns = self._index[index]
        image, target, prior = self._cases.cut(number, position, (rows.start, columns.start), self._patch_size)
        answered = torch.full_like(target, IGNORED)
        own = rows.own, columns.own
        answered[own] = target[own]
        return self._cases.sample(number, position, index, image, answered, prior)


class _Tile(NamedTuple):
    """One of the patches along an axis: where it starts, and the part of it that it answers for."""

    start: int
    own: slice


def window_starts(length: int, patch_size: int, step: float) -> list[int]:
    """Return where evenly spaced windows along an axis begin: they cover it, at most ``step`` windows apart.

    An axis shorter than a window has one, which stands out on either side, by one more at the end if need be.
    """
    if length <= patch_size:
        return [(length - patch_size) // 2]
    gaps = math.ceil((length - patch_size) / (patch_size * step))
    return [round(index * (length - patch_size) / gaps) for index in range(gaps + 1)]


def _tiles(length: int, patch_size: int) -> list[_Tile]:
    starts = window_starts(length, patch_size, step=1)
    borders = [0, *((left + patch_size + right) // 2 for left, right in pairwise(starts)), length]
    return [_Tile(at, slice(a - at, b - at)) for at, (a, b) in zip(starts, pairwise(borders), strict=True)]


def _inside(at: int, length: int, patch_size: int) -> int:
    """Return the start of a patch that lies within an axis, as near as can be; in its middle if it is too short."""
    if length <= patch_size:
        return window_starts(length, patch_size, step=1)[0]
    return min(max(at, 0), length - patch_size)


def one_hot_prior(segments: Tensor) -> Tensor:
    """Turn segments (..., H, W), 0 to 17, into the channels (..., 17, H, W) that a network gets, float32."""
    numbers = torch.arange(1, PRIOR_CHANNELS + 1, dtype=segments.dtype, device=segments.device)
    return (segments.unsqueeze(-3) == numbers[:, None, None]).float()


def cut_patch(plane: np.ndarray, corner: tuple[int, int], patch_size: int) -> np.ndarray:
    """Return a square (P, P) of a plane from a corner on that may lie outside of it; zero where the plane ends."""
    patch = np.zeros((patch_size, patch_size), plane.dtype)
    into, out_of = [], []
    for at, length in zip(corner, plane.shape, strict=True):
        first, last = max(at, 0), min(at + patch_size, length)
        into.append(slice(first - at, last - at))
        out_of.append(slice(first, last))
    patch[tuple(into)] = plane[tuple(out_of)]
    return patch


def _drawn(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


def _one_of(values: np.ndarray, generator: torch.Generator) -> int:
    return int(values[_drawn(len(values), generator)])


# -------------------------------------------------------------------------------------------- resampled cases


class _ResampledCases:
    """The resampled slices of some cases, with the prior and the constants that they bring."""

    def __init__(
        self,
        study: Study,
        case_ids: Sequence[str],
        patches: Patches,
        preparation: Preparation,
        cache: Path | None,
        extras: Mapping[str, CaseExtras] | None,
        nonfinite: NonFinite,
    ) -> None:
        if patches.spacing_mm is None:
            raise ValueError("patches.spacing_mm: expected a spacing, got None; median_spacing_mm finds one")
        self.case_ids, self._preparation = tuple(case_ids), preparation
        transform = _Transform(patches.spacing_mm, preparation, nonfinite)
        self._cache = CaseCache(study, self.case_ids, cache, transform.names(), partial(_build, transform))
        self._extras = [CaseExtras() if extras is None else extras_of(extras, name) for name in self.case_ids]
        self._priors = [
            None if one.prior is None else _grid_of(entry).nearest(one.prior)
            for one, entry in zip(self._extras, self.entries(), strict=True)
        ]

    def entries(self) -> Iterator[np.ndarray]:
        """Yield the records of every case."""
        return (self._cache[number] for number in range(len(self._cache)))

    def entry(self, number: int) -> np.ndarray:
        """Return the records of one case."""
        return self._cache[number]

    def cut(
        self, number: int, position: int, corner: tuple[int, int], patch_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return image (1, P, P), target (P, P) and, if there is one, prior (P, P) of a slice, from a corner on."""
        record, prior = self._cache[number][position], self._priors[number]
        image, target = (cut_patch(record[name], corner, patch_size) for name in ("image", "target"))
        segments = None if prior is None else torch.from_numpy(cut_patch(prior[position], corner, patch_size))
        return torch.from_numpy(image)[None], torch.from_numpy(target.astype(np.int64)), segments

    def sample(
        self, number: int, position: int, index: int, image: Tensor, target: Tensor, prior: Tensor | None
    ) -> dict[str, Any]:
        """Put together what a network is given."""
        return {
            "image": network_input(image[0], self._preparation),
            "target": target,
            **({} if prior is None else {"prior": one_hot_prior(prior)}),
            **self._extras[number].constants,
            "case_id": self.case_ids[number],
            "slice": int(self._cache[number][position]["slice"]),
            "index": index,
        }


class _Transform(NamedTuple):
    """What makes resampled slices of a volume."""

    spacing_mm: tuple[float, float]
    preparation: Preparation
    nonfinite: NonFinite

    def names(self) -> list[Any]:
        """Name everything that the bytes of an entry depend on, beside the case."""
        scaling = [self.preparation.intensity, self.preparation.window]
        return ["patches", _TRANSFORM_VERSION, self.spacing_mm, scaling, self.nonfinite]


def _record(size: tuple[int, int], classes: int) -> np.dtype:
    """Describe a slice: as for `SliceDataset`, and where it lies in the volume."""
    plane = [("image", "<f4", size), ("target", "u1", size), ("shows", "?", (classes - 1,)), ("labelled", "?")]
    return np.dtype([*plane, ("slice", "<i4"), ("rows", "<i4", (2,)), ("columns", "<i4", (2,))])


def _grid_of(entry: np.ndarray) -> PlaneGrid:
    first = entry[0]
    depth = slice(int(first["slice"]), int(entry[-1]["slice"]) + 1)
    rows, columns = (slice(*first[name].tolist()) for name in ("rows", "columns"))
    return PlaneGrid((depth, rows, columns), first["image"].shape)


def _build(transform: _Transform, study: Study, case: Case) -> np.ndarray:
    image, raw = load_raw_case(case, nonfinite=transform.nonfinite)
    assert raw is not None
    grid = PlaneGrid.of(image, transform.spacing_mm)
    depth, rows, columns = grid.box
    entry = np.zeros(depth.stop - depth.start, _record(grid.size, len(study.class_names)))
    entry["image"] = grid.image(image.voxels, transform.preparation)
    entry["target"] = grid.labels(map_labels(study, raw).voxels)
    for index in range(1, len(study.class_names)):
        entry["shows"][:, index - 1] = (entry["target"] == index).any(axis=(1, 2))
    entry["labelled"] = raw.voxels[depth].any(axis=(1, 2))
    entry["slice"] = np.arange(depth.start, depth.stop)
    entry["rows"], entry["columns"] = (rows.start, rows.stop), (columns.start, columns.stop)
    return entry
