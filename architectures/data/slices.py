"""Cases become normalised 2-D slices, kept on disk so that an epoch costs no decoding.

Every case has one cache entry: a NumPy file with one record per slice, mapped into memory, so that a sample costs one
slice's bytes and processes share them. An entry is found by what it was made of (digests of the case's files, the
labels' meaning, the preparation, size and version of the transform) and carries a digest of itself: older,
half-written or damaged entries are never read but rebuilt, and two processes that build the same one both end up with
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.files import TEMPORARY_PREFIX, atomic_write, sha256_of
from trifuse.kernels.errors import DataError

from .preparation import Preparation, network_input, resized_labels, scaled_slices
from .study import Case, Study, load_raw_case, map_labels
from .voxel_values import NonFinite

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Keep = Literal["all", "foreground", "labelled"]

_TRANSFORM_VERSION = 1  # raise it whenever the bytes of an entry would change
_DIGEST_BYTES = 32
_LEFTOVER_SECONDS = 3600


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of some cases of a study, as samples for training a 2-D network.

    A sample is asked for by its index, or by ``(seed, epoch, index)``: then ``augment`` is applied, with a generator
    that these three numbers alone decide, so that a run can be resumed or spread over processes without changing a
    sample. It is a dictionary of ``image`` (channels, S, S) float32, ``target`` (S, S) int64, ``case_id``, ``slice``
    and ``index``.

    Args:
        study: where the cases come from; all of them need labels.
        case_ids: the cases, in the order of their slices.
        image_size: S, in pixels.
        cache: folder of the cache entries; without it they live in a temporary folder as long as the data set does.
        augment: called with image, target and generator.
        keep: ``"all"`` slices; ``"foreground"``, those that show a target; ``"labelled"``, those on which anything
            is drawn at all, whether target or not (cine studies are often contoured in part).
        nonfinite: what to do with NaN and infinite voxels, see ``read_image``.
        preparation: how slices are scaled and resized; by default as the ImageNet encoders expect them.

    Raises:
        DataError: a case is unusable or has no labels, or no slice is left. All cases are looked at first.
    """

    def __init__(
        self,
        study: Study,
        case_ids: Sequence[str],
        image_size: int = 448,
        cache: Path | None = None,
        augment: Augment | None = None,
        keep: Keep = "all",
        *,
        nonfinite: NonFinite = "error",
        preparation: Preparation | None = None,
    ) -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"keep: expected one of {', '.join(get_args(Keep))}, got {keep!r}")
        self._temporary = tempfile.TemporaryDirectory(prefix="trifuse-slices-") if cache is None else None
        folder = Path(self._temporary.name) if self._temporary else Path(cache or "")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_leftovers(folder)
        self.augment = augment
        self.preparation = preparation or Preparation()
        transform = _Transform(image_size, self.preparation, nonfinite)
        self.case_ids = tuple(case_ids)
        self.class_names = study.class_names
        self._paths: list[Path] = []
        self._entries: dict[int, np.ndarray] = {}
        self._index: list[tuple[int, int]] = []
        problems: list[DataError] = []
        for number, case_id in enumerate(self.case_ids):
            try:
                path, entry = _cached(study, study.case(case_id), transform, folder)
            except DataError as error:
                problems.append(error)
                continue
            self._paths.append(path)
            self._entries[number] = entry
            self._index += [(number, int(position)) for position in np.flatnonzero(_kept(entry, keep))]
        if problems:
            raise DataError.merge(problems)
        if not self._index:
            hint = 'keep="all" keeps slices without labels'
            raise DataError(study.root, "slices", got=f"none with keep={keep!r}", want="at least one", hint=hint)

    def __len__(self) -> int:
        """Return the number of slices that are kept."""
        return len(self._index)

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict[str, Any]:
        """Return the sample of that index; with ``(seed, epoch, index)`` augmented."""
        index = key[2] if isinstance(key, tuple) else key
        case_number, position = self._index[index]
        record = self._entry(case_number)[position]
        image = network_input(torch.from_numpy(record["image"].copy()), self.preparation)
        target = torch.from_numpy(record["target"].astype(np.int64))
        if self.augment is not None and isinstance(key, tuple):
            image, target = self.augment(image, target, _generator(*key))
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
        shown = np.any([self._entry(case_number)[position]["shows"] for case_number, position in self._index], axis=0)
        absent = [name for name, seen in zip(self.class_names[1:], shown, strict=True) if not seen]
        if absent:
            got = f"{', '.join(absent)} on none of {len(self)} slices of {len(self.case_ids)} cases"
            raise DataError("training set", "classes", got=got, want="every class on at least one slice")

    def __getstate__(self) -> dict[str, Any]:
        """Hand over the paths, not the mapped files: a worker process maps them itself."""
        return {**self.__dict__, "_entries": {}, "_temporary": None}

    def _entry(self, number: int) -> np.ndarray:
        if number not in self._entries:
            self._entries[number] = _map(self._paths[number])
        return self._entries[number]


def _generator(*key: int) -> torch.Generator:
    """Make a generator that the key alone decides."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _kept(entry: np.ndarray, keep: Keep) -> np.ndarray:
    kept: dict[str, Any] = {
        "all": np.ones(len(entry), bool),
        "foreground": entry["shows"].any(axis=1),
        "labelled": entry["labelled"],
    }
    return kept[keep]


# ------------------------------------------------------------------------------------------------ cache


def _record(image_size: int, classes: int) -> np.dtype:
    """Describe a slice: image, target, which classes it shows beside the background, whether anything is drawn."""
    plane = (image_size, image_size)
    return np.dtype(
        [("image", "<f4", plane), ("target", "u1", plane), ("shows", "?", (classes - 1,)), ("labelled", "?")]
    )


class _Transform(NamedTuple):
    """What makes a slice of a volume."""

    image_size: int
    preparation: Preparation
    nonfinite: NonFinite


def _cached(study: Study, case: Case, transform: _Transform, folder: Path) -> tuple[Path, np.ndarray]:
    """Map the case's cache entry, building it first if there is no sound one."""
    if case.label is None:
        raise DataError(case.image, "label", got="none", want="a label map to train on")
    path = folder / f"{_key(study, case, transform)}.npy"
    if not _is_sound(path):
        _build(study, case, transform, path)
    return path, _map(path)


def _key(study: Study, case: Case, transform: _Transform) -> str:
    """Name an entry after everything that its bytes depend on."""
    try:
        digests = [sha256_of(path) for path in case.files]
    except OSError as error:
        raise DataError(error.filename, "file", got=error.strerror, want=f"a file of case {case.case_id}") from error
    meaning: Any = None if study.label_map is None else sorted(study.label_map.items())
    size, preparation, nonfinite = transform
    scaling = [preparation.intensity, preparation.window, preparation.resize]
    parts = [_TRANSFORM_VERSION, *digests, meaning, study.others_are_background, study.largest_label]
    return hashlib.sha256(json.dumps([*parts, size, scaling, nonfinite]).encode()).hexdigest()[:40]


def _is_sound(path: Path) -> bool:
    """Say whether the last bytes of an entry are the digest of all bytes before them."""
    try:
        size = path.stat().st_size - _DIGEST_BYTES
        if size <= 0:
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while size and (chunk := stream.read(min(size, 1 << 20))):
                digest.update(chunk)
                size -= len(chunk)
            return stream.read() == digest.digest()
    except FileNotFoundError:
        return False


def _remove_old_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written, but nothing that may still be being written."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


def _build(study: Study, case: Case, transform: _Transform, path: Path) -> None:
    image_size, preparation, nonfinite = transform
    image, raw = load_raw_case(case, nonfinite=nonfinite)
    assert raw is not None
    labels = map_labels(study, raw)
    entry = np.zeros(len(image.voxels), _record(image_size, len(study.class_names)))
    entry["image"] = scaled_slices(image, image_size, preparation).numpy()
    entry["target"] = resized_labels(labels.voxels, (image_size, image_size), preparation)
    for index in range(1, len(study.class_names)):
        entry["shows"][:, index - 1] = (labels.voxels == index).any(axis=(1, 2))
    entry["labelled"] = raw.voxels.any(axis=(1, 2))
    with atomic_write(path) as stream:
        writer = _Digesting(stream)
        np.lib.format.write_array(writer, entry, allow_pickle=False)
        stream.write(writer.digest.digest())


class _Digesting:
    """A binary stream that digests what is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.stream.write(data)


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
