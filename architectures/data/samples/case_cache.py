"""What cases were turned into, kept on disk so that an epoch costs no decoding.

Every case has one cache entry: a NumPy file with one record per slice, mapped into memory, so that a sample costs one
slice's bytes and processes share them. An entry is found by what it was made of (digests of the case's files, the
labels' meaning, the transform and its version) and carries a digest of itself: older, half-written or damaged entries
are never read but rebuilt, and two processes that build the same one both end up with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.storage.atomic_files import atomic_write, remove_leftovers
from trifuse.kernels.errors import DataError

_DIGEST_BYTES = 32


class CaseCache:
    """The entries of some cases, by number; each is mapped when it is first asked for.

    Args:
        cohort: where the cases come from; all of them need labels.
        case_ids: the cases, in the order of their numbers.
        folder: of the entries; without it they live in a temporary folder as long as the cache does.
        transform: JSON values that name what ``build`` does beside reading the case, its version among them.
        build: returns the records of a case.

    Attributes:
        digests: of the files of each case, by its id.

    Raises:
        DataError: a case is unusable or has no labels. All cases are looked at first.
    """

    def __init__(
        self,
        cohort: Cohort,
        case_ids: Sequence[str],
        folder: Path | None,
        transform: Sequence[Any],
        build: Callable[[Cohort, Case], np.ndarray],
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="trifuse-slices-") if folder is None else None
        folder = Path(self._temporary.name) if self._temporary else Path(folder or "")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._paths: list[Path] = []
        self.digests: dict[str, str] = {}
        self._entries: dict[int, np.ndarray] = {}
        problems: list[DataError] = []
        for case_id in case_ids:
            try:
                path, self.digests[case_id] = _cached(cohort, cohort.case(case_id), transform, build, folder)
                self._paths.append(path)
            except DataError as error:
                problems.append(error)
        if problems:
            raise DataError.merge(problems)

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self._paths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the records of a case, one per slice.

        Raises:
            DataError: the entry has been cut since it was built: what is mapped and gone ends a process without a word.
        """
        path = self._paths[number]
        if number not in self._entries:
            self._entries[number] = np.load(path, mmap_mode="r", allow_pickle=False)
        entry = self._entries[number]
        with suppress(FileNotFoundError):  # what is mapped stays where it is when its name goes
            least, size = entry.nbytes + _DIGEST_BYTES, path.stat().st_size
            if size < least:
                hint = "something else writes there; start again, and the entry is built anew"
                raise DataError(path, "cache entry", got=f"{size} bytes", want=f"at least {least}", hint=hint)
        return entry

    def __getstate__(self) -> dict[str, Any]:
        """Hand over the paths, not the mapped files: a worker process maps them itself."""
        return {**self.__dict__, "_entries": {}, "_temporary": None}


def _cached(
    cohort: Cohort, case: Case, transform: Sequence[Any], build: Callable[[Cohort, Case], np.ndarray], folder: Path
) -> tuple[Path, str]:
    """Return the path of the case's entry, after building it if there is no sound one, and a digest of its files."""
    if case.label is None:
        raise DataError(case.image, "label", got="none", want="a label map to train on")
    digests = case.file_digests()
    path = folder / f"{_key(digests, cohort, transform)}.npy"
    if not _is_sound(path):
        _write(path, build(cohort, case))
    return path, hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def _key(digests: Sequence[str], cohort: Cohort, transform: Sequence[Any]) -> str:
    """Name an entry after everything that its bytes depend on."""
    meaning: Any = None if cohort.label_map is None else sorted(cohort.label_map.items())
    parts = [*digests, meaning, cohort.others_are_background, cohort.largest_label, *transform]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


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


def _write(path: Path, entry: np.ndarray) -> None:
    with atomic_write(path) as stream:
        writer = _HashingWriter(stream)
        np.lib.format.write_array(writer, entry, allow_pickle=False)
        stream.write(writer.digest.digest())


class _HashingWriter:
    """A binary stream that digests what is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.stream.write(data)
