"""Cases become normalised 2-D slices of one size; see `case_cache` for how they are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_raw_case, map_labels
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import DataError

from .case_cache import CaseCache
from .preprocessing import Preprocessing, Slices, names_of_scaling
from .volume_to_slices import network_input, resized_labels, scaled_slices

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

_TRANSFORM_VERSION = 1  # raise it whenever the bytes of an entry would change


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of some cases of a cohort, as samples for training a 2-D network.

    A sample is asked for by its index, or by ``(seed, epoch, index)``: then ``augment`` is applied, with a generator
    that these three numbers alone decide, so that a run can be resumed or spread over processes without changing a
    sample. It is a dictionary of ``image`` (channels, S, S) float32, ``target`` (S, S) int64, ``case_id``, ``slice``
    and ``index``.

    Args:
        cohort: where the cases come from; all of them need labels.
        case_ids: the cases, in the order of their slices.
        preprocessing: how slices are scaled and resized; its ``image_size`` is S.
        cache: folder of the cache entries; without it they live in a temporary folder as long as the data set does.
        augment: called with image, target and generator.
        slices: which slices count, see `Slices`.

    Raises:
        DataError: a case is unusable or has no labels, or no slice is left. All cases are looked at first.
    """

    def __init__(
        self,
        cohort: Cohort,
        case_ids: Sequence[str],
        preprocessing: Preprocessing,
        *,
        cache: Path | None = None,
        augment: Augment | None = None,
        slices: Slices = "all",
    ) -> None:
        check_choice("slices", slices, Slices)
        self.augment = augment
        self.preprocessing = preprocessing
        self.case_ids = tuple(case_ids)
        self.class_names = cohort.class_names
        build = partial(_build, preprocessing)
        self._entries = CaseCache(cohort, self.case_ids, cache, _transform_names(preprocessing), build)
        self.digests = self._entries.digests
        self._index = [
            (number, int(position))
            for number in range(len(self._entries))
            for position in np.flatnonzero(slices_that_count(self._entries[number], slices))
        ]
        if not self._index:
            raise no_slice(cohort, slices)

    def __len__(self) -> int:
        """Return the number of slices that count."""
        return len(self._index)

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict[str, Any]:
        """Return the sample of that index; with ``(seed, epoch, index)`` augmented."""
        index = key[2] if isinstance(key, tuple) else key
        case_number, position = self._index[index]
        record = self._entries[case_number][position]
        image = network_input(torch.from_numpy(record["image"].copy()), self.preprocessing)
        target = torch.from_numpy(record["target"].astype(np.int64))
        if self.augment is not None and isinstance(key, tuple):
            image, target = self.augment(image, target, generator_of(*key))
        return {
            "image": image,
            "target": target,
            "case_id": self.case_ids[case_number],
            "slice": position,
            "index": index,
        }

    def name_of(self, key: tuple[int, int, int]) -> str:
        """Say what a sample shows, without loading it."""
        case_number, position = self._index[key[2]]
        return f"slice {position} of case {self.case_ids[case_number]}"

    def require_every_class(self) -> None:
        """Raise if a class is on none of the slices: a network cannot learn what it is never shown.

        Raises:
            DataError: naming the classes.
        """
        shown = np.any([self._entries[case_number][position]["shows"] for case_number, position in self._index], axis=0)
        refuse_absent_classes(self.class_names, shown, len(self), len(self.case_ids))


def refuse_absent_classes(class_names: Sequence[str], shown: np.ndarray, slices: int, cases: int) -> None:
    """Raise `DataError` if a class beside the background is not among those that are shown."""
    absent = [name for name, seen in zip(class_names[1:], shown, strict=True) if not seen]
    if absent:
        got = f"{', '.join(absent)} on none of {slices} slices of {cases} cases"
        raise DataError("training set", "classes", got=got, want="every class on at least one slice")


def generator_of(*key: int) -> torch.Generator:
    """Make a generator that the key alone decides."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def no_slice(cohort: Cohort, slices: Slices) -> DataError:
    """Return the error that says that not a single slice counts."""
    hint = 'slices="all" also counts slices without labels'
    return DataError(cohort.root, "slices", got=f"none with slices={slices!r}", want="at least one", hint=hint)


def slices_that_count(entry: np.ndarray, slices: Slices) -> np.ndarray:
    """Say which of a case's records count."""
    counting: dict[str, Any] = {
        "all": np.ones(len(entry), bool),
        "foreground": entry["shows"].any(axis=1),
        "labelled": entry["labelled"],
    }
    return counting[slices]


def _record(image_size: int, classes: int) -> np.dtype:
    """Describe a slice: image, target, which classes it shows beside the background, whether anything is drawn."""
    plane = (image_size, image_size)
    return np.dtype(
        [("image", "<f4", plane), ("target", "u1", plane), ("shows", "?", (classes - 1,)), ("labelled", "?")]
    )


def _transform_names(preprocessing: Preprocessing) -> list[Any]:
    """Name everything that the bytes of an entry depend on, beside the case."""
    scaling = names_of_scaling(preprocessing, preprocessing.resize)
    return [_TRANSFORM_VERSION, preprocessing.image_size, scaling, preprocessing.nonfinite]


def _build(preprocessing: Preprocessing, cohort: Cohort, case: Case) -> np.ndarray:
    side = preprocessing.image_size
    image, raw = load_raw_case(case, nonfinite=preprocessing.nonfinite)
    assert raw is not None
    labels = map_labels(cohort, raw)
    entry = np.zeros(len(image.voxels), _record(side, len(cohort.class_names)))
    entry["image"] = scaled_slices(image, preprocessing).numpy()
    entry["target"] = resized_labels(labels.voxels, (side, side), preprocessing)
    for index in range(1, len(cohort.class_names)):
        entry["shows"][:, index - 1] = (labels.voxels == index).any(axis=(1, 2))
    entry["labelled"] = raw.voxels.any(axis=(1, 2))
    return entry
