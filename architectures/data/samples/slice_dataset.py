"""Cases become normalised 2-D slices of one size; see `case_cache` for how they are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_raw_case, map_labels
from trifuse.architectures.data.volumes.files import NonFinite
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import DataError

from .case_cache import CaseCache
from .preprocessing import Preprocessing, network_input, resized_labels, scaled_slices

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Keep = Literal["all", "foreground", "labelled"]

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
        image_size: S, in pixels.
        cache: folder of the cache entries; without it they live in a temporary folder as long as the data set does.
        augment: called with image, target and generator.
        keep: ``"all"`` slices; ``"foreground"``, those that show a target; ``"labelled"``, those on which anything
            is drawn at all, whether target or not (cine cohorts are often contoured in part).
        nonfinite: what to do with NaN and infinite voxels, see ``read_image``.
        preprocessing: how slices are scaled and resized; by default as the ImageNet encoders expect them.

    Raises:
        DataError: a case is unusable or has no labels, or no slice is left. All cases are looked at first.
    """

    def __init__(
        self,
        cohort: Cohort,
        case_ids: Sequence[str],
        image_size: int = 448,
        cache: Path | None = None,
        augment: Augment | None = None,
        keep: Keep = "all",
        *,
        nonfinite: NonFinite = "error",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        check_choice("keep", keep, Keep)
        self.augment = augment
        self.preprocessing = preprocessing or Preprocessing()
        self.case_ids = tuple(case_ids)
        self.class_names = cohort.class_names
        transform = _Transform(image_size, self.preprocessing, nonfinite)
        self._entries = CaseCache(cohort, self.case_ids, cache, transform.names(), partial(_build, transform))
        self._index = [
            (number, int(position))
            for number in range(len(self._entries))
            for position in np.flatnonzero(kept_slices(self._entries[number], keep))
        ]
        if not self._index:
            hint = 'keep="all" keeps slices without labels'
            raise DataError(cohort.root, "slices", got=f"none with keep={keep!r}", want="at least one", hint=hint)

    def __len__(self) -> int:
        """Return the number of slices that are kept."""
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


def kept_slices(entry: np.ndarray, keep: Keep) -> np.ndarray:
    """Say which of a case's records are kept."""
    kept: dict[str, Any] = {
        "all": np.ones(len(entry), bool),
        "foreground": entry["shows"].any(axis=1),
        "labelled": entry["labelled"],
    }
    return kept[keep]


def _record(image_size: int, classes: int) -> np.dtype:
    """Describe a slice: image, target, which classes it shows beside the background, whether anything is drawn."""
    plane = (image_size, image_size)
    return np.dtype(
        [("image", "<f4", plane), ("target", "u1", plane), ("shows", "?", (classes - 1,)), ("labelled", "?")]
    )


class _Transform(NamedTuple):
    """What makes a slice of a volume."""

    image_size: int
    preprocessing: Preprocessing
    nonfinite: NonFinite

    def names(self) -> list[Any]:
        """Name everything that the bytes of an entry depend on, beside the case."""
        scaling = [self.preprocessing.intensity, self.preprocessing.window, self.preprocessing.resize]
        return [_TRANSFORM_VERSION, self.image_size, scaling, self.nonfinite]


def _build(transform: _Transform, cohort: Cohort, case: Case) -> np.ndarray:
    image_size, preprocessing, nonfinite = transform
    image, raw = load_raw_case(case, nonfinite=nonfinite)
    assert raw is not None
    labels = map_labels(cohort, raw)
    entry = np.zeros(len(image.voxels), _record(image_size, len(cohort.class_names)))
    entry["image"] = scaled_slices(image, image_size, preprocessing).numpy()
    entry["target"] = resized_labels(labels.voxels, (image_size, image_size), preprocessing)
    for index in range(1, len(cohort.class_names)):
        entry["shows"][:, index - 1] = (labels.voxels == index).any(axis=(1, 2))
    entry["labelled"] = raw.voxels.any(axis=(1, 2))
    return entry
