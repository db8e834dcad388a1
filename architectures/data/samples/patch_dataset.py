"""Square patches of slices at one spacing: what networks are trained on that see a slice window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise, product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.read_case import load_image
from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.kernels.errors import DataError

from .preprocessing import Preprocessing, patches_and_spacing
from .resampled_cases import ResampledCases
from .slice_dataset import generator_of, refuse_absent_classes

IGNORED = -1  # target of pixels that a window shows, but does not answer for


class PatchAugment(Protocol):
    """An augmentation that looks at more than a patch: at a square of side S, with the patch in its middle."""

    def source_size(self, patch_size: int) -> int:
        """Return S; S - P is even."""

    def __call__(
        self, image: Tensor, target: Tensor, prior: Tensor | None, generator: torch.Generator, patch_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return image (1, P, P), target (P, P) and prior (P, P), if there is one, of those of side S.

        And how they were moved, (2, 3): where each position of the patch lay before, see `SideInputs`.
        """


def median_spacing_mm(cohort: Cohort, case_ids: Sequence[str], nonfinite: NonFinite = "error") -> tuple[float, float]:
    """Return the median, over the cases that can be read, of the distance between rows, and between columns."""
    spacings = []
    for case_id in case_ids:
        with suppress(DataError):  # whoever prepares the cases names all that are unusable
            spacings.append(load_image(cohort.case(case_id), nonfinite=nonfinite).spacing_mm[1:])
    rows, columns = np.median(spacings or [(1.0, 1.0)], axis=0).tolist()
    return rows, columns


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of some cases of a cohort, as samples for training a 2-D network.

    A sample is asked for by ``(seed, epoch, index)``, and these three numbers alone decide it: first a case is drawn,
    each as likely as any other, then a slice of it and a place on that. It is a dictionary of ``image``
    (channels, P, P) float32, ``target`` (P, P) int64, ``prior`` (17, P, P) float32 where the case has one, its
    constants, ``case_id``, ``slice`` (of the volume as it is shown) and ``index``. Where a slice is smaller than a
    patch, the patch is zero around it.

    Args:
        cohort: where the cases come from; all of them need labels.
        case_ids: the cases.
        preprocessing: has ``patches`` with a spacing, which say how patches are drawn; its ``image_size`` is P.
        augment: makes a patch of a larger square of the slice, from its scaled values, labels and segments.
        options: ``cache``, ``side_inputs`` and ``slices``, see `ResampledCases`.

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
        augment: PatchAugment | None = None,
        **options: Any,
    ) -> None:
        self._patches, self.spacing_mm = patches_and_spacing(preprocessing)
        self._cases = ResampledCases(cohort, case_ids, preprocessing, **options)
        self._patch_size, self._augment = preprocessing.image_size, augment
        self.case_ids, self.class_names = self._cases.case_ids, cohort.class_names
        self.digests = self._cases.digests
        self._with_slices = np.flatnonzero([len(kept) for kept in self._cases.kept])

    def __len__(self) -> int:
        """Return the number of patches in an epoch."""
        return self._patches.samples_per_epoch

    @property
    def len_slices(self) -> int:
        """The number of slices that patches are taken from."""
        return sum(map(len, self._cases.kept))

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """Return the sample of ``(seed, epoch, index)``."""
        generator = generator_of(*key)
        number, position, corner = self._place(generator)
        if self._augment is None:
            patch = self._cases.cut(number, position, corner, self._patch_size)
            return self._cases.sample(number, position, key[2], *patch)
        side = self._augment.source_size(self._patch_size)
        margin = (side - self._patch_size) // 2
        around = self._cases.cut(number, position, (corner[0] - margin, corner[1] - margin), side)
        return self._cases.sample(number, position, key[2], *self._augment(*around, generator, self._patch_size))

    def name_of(self, key: tuple[int, int, int]) -> str:
        """Say what a sample shows, without loading its patch."""
        number, *_ = self._place(generator_of(*key))
        return f"a patch of case {self.case_ids[number]}"

    def require_every_class(self) -> None:
        """Raise if a class is on none of the slices: a network cannot learn what it is never shown.

        Raises:
            DataError: naming the classes.
        """
        shown = [shows[kept].any(axis=0) for shows, kept in zip(self._cases.shows, self._cases.kept, strict=True)]
        refuse_absent_classes(self.class_names, np.any(shown, axis=0), self.len_slices, len(self.case_ids))

    def _place(self, generator: torch.Generator) -> tuple[int, int, tuple[int, int]]:
        """Draw a case, one of its slices, and where on that the patch begins."""
        number = _one_of(self._with_slices, generator)
        kept = self._cases.kept[number]
        shows = self._cases.shows[number][kept]
        classes = np.flatnonzero(shows.any(axis=0))
        side, size = self._patch_size, self._cases.sizes[number]
        if len(classes) and float(torch.rand((), generator=generator)) < self._patches.foreground:
            chosen = _one_of(classes, generator)
            position = _one_of(kept[shows[:, chosen]], generator)
            pixels = np.argwhere(self._cases.target(number, position) == chosen + 1)
            wanted = pixels[_drawn(len(pixels), generator)] - side // 2
        else:
            position = _one_of(kept, generator)
            wanted = np.array([_drawn(max(length - side, 0) + 1, generator) for length in size])
        rows, columns = (_within(int(at), length, side) for at, length in zip(wanted, size, strict=True))
        return number, position, (rows, columns)


class GridPatches(Dataset[dict[str, Any]]):
    """Patches that together show every slice of some cases: what a network on patches is validated on.

    They are samples as those of `PatchDataset`, by their number and without augmentation. Patches that overlap share
    out the pixels: the target is `IGNORED` where another one answers, and outside of the slice, so that every pixel
    of a slice counts once.

    Args:
        cohort, case_ids, preprocessing, options: see `PatchDataset`.

    Raises:
        DataError, MissingExtra: see `PatchDataset`.
    """

    def __init__(self, cohort: Cohort, case_ids: Sequence[str], preprocessing: Preprocessing, **options: Any) -> None:
        self._cases = ResampledCases(cohort, case_ids, preprocessing, **options)
        self._patch_size = preprocessing.image_size
        self.case_ids, self.class_names = self._cases.case_ids, cohort.class_names
        self.digests = self._cases.digests
        self._index = [
            (number, int(position), rows, columns)
            for number, kept in enumerate(self._cases.kept)
            for position in kept
            for rows, columns in product(*(_tiles(length, self._patch_size) for length in self._cases.sizes[number]))
        ]

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the patch of that number."""
        number, position, rows, columns = self._index[index]
        image, labels, segments = self._cases.cut(number, position, (rows.start, columns.start), self._patch_size)
        target = torch.full_like(labels, IGNORED)
        target[rows.own, columns.own] = labels[rows.own, columns.own]
        return self._cases.sample(number, position, index, image, target, segments)


class _Tile(NamedTuple):
    """One of the patches along an axis: where it starts, and the part of it that it answers for."""

    start: int
    own: slice


def window_starts(length: int, side: int, step: float) -> list[int]:
    """Return where windows along an axis begin that cover it evenly, at most ``step`` windows apart.

    An axis shorter than a window has one in its middle, which begins before it.
    """
    if length <= side:
        return [(length - side) // 2]
    gaps = math.ceil((length - side) / (side * step))
    return [round(index * (length - side) / gaps) for index in range(gaps + 1)]


def _tiles(length: int, side: int) -> list[_Tile]:
    starts = window_starts(length, side, step=1)
    borders = [0, *((left + side + right) // 2 for left, right in pairwise(starts)), length]
    return [_Tile(at, slice(a - at, b - at)) for at, (a, b) in zip(starts, pairwise(borders), strict=True)]


def _within(at: int, length: int, side: int) -> int:
    """Return the start of a patch that lies within an axis, as near as can be; about its middle if it is too short."""
    return min(max(at, 0), length - side) if length > side else (length - side) // 2


def _drawn(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


def _one_of(values: np.ndarray, generator: torch.Generator) -> int:
    return int(values[_drawn(len(values), generator)])
