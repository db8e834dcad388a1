"""A folder of predicted label maps, and its manifest: what each was made of, and that it still is what was written."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.storage.atomic_files import remove_leftovers, sha256_of
from trifuse.architectures.storage.config_json import config_from_json, config_to_json
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.storage.text import count, listed
from trifuse.kernels import CheckpointError, DataError

from .scoring import prediction_path

MANIFEST = "predictions.json"
_EXTRAS, _IMAGES, _LABELS = "extras_sha256", "images_sha256", "labels_sha256"  # of each case, in the manifest


@dataclass(frozen=True)
class MadeBy:
    """What a folder's predictions were made with, as its manifest has it.

    What was done with voxels that are no numbers does not count: it is chosen for images, not for a network.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "preparation": "preprocessing",
        "image_size": "preprocessing.image_size",
        "patches": "preprocessing.patches",
    }

    weights_sha256: str
    preprocessing: Preprocessing

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's values."""
        values = config_to_json(self)
        del values["preprocessing"]["nonfinite"]
        return values


def image_of(case: Case, preprocessing: Preprocessing) -> str:
    """Name what a case's label map is made of: the digest of its image, and what became of voxels without a number.

    Of an image whose voxels are all numbers that says nothing, and such it is where others are refused.
    """
    digest = _digest_of_image(case)
    return digest if not digest or preprocessing.nonfinite == "error" else f"{digest} {preprocessing.nonfinite}"


def _digest_of_image(case: Case) -> str:
    try:
        return case.image_digest()
    except OSError:
        return ""  # reading it will say why


def made_of_these_images(
    out: Path, copies: Path, cohort: Cohort, case_ids: Sequence[str], preprocessing: Preprocessing
) -> bool:
    """Tell whether copies of a folder's label maps are what it records, made of the images that there are now.

    Older versions recorded no images, or no digests of label maps: theirs are believed.

    Raises:
        DataError: the record is damaged.
    """
    manifest = Path(out) / MANIFEST
    if not manifest.exists():
        return True
    _, _, recorded, written = _read_manifest(manifest)
    cases = [case for case in cohort.cases if case.case_id in case_ids]
    return (
        recorded is None or all(_is_of(image_of(case, preprocessing), recorded.get(case.case_id)) for case in cases)
    ) and (
        written is None
        or all(sha256_of(prediction_path(copies, case_id)) == written.get(case_id) for case_id in case_ids)
    )


def made_of_other_images(out: Path, cases: Sequence[Case]) -> list[str]:
    """Name the cases whose label maps in a folder were made of other files than their images, by the folder's manifest.

    Of images that cannot be read, and without a manifest of trifuse, nothing is known.
    """
    manifest = Path(out) / MANIFEST
    try:
        recorded = (_read_manifest(manifest)[2] if manifest.exists() else None) or {}
    except DataError:
        return []
    return [
        case.case_id
        for case in cases
        if case.case_id in recorded and _digest_of_image(case) not in ("", recorded[case.case_id].partition(" ")[0])
    ]


def _is_of(image: str, made_of: str | None) -> bool:
    """Tell whether what a label map was made of is this image; both see `image_of`."""
    return bool(image) and made_of in (image, image.partition(" ")[0])


class PredictionFolder:
    """A folder of label maps, and the manifest that says what each was made of, and has its digest.

    Args:
        out: the folder.
        made_by: the network that is to make them.
        images: what each case is made of now, see `image_of`.
        replace: whether label maps that another network, or somebody else, made are outdated, or a reason to refuse
            the folder.

    Attributes:
        kept: the cases whose label maps are there, of the same images.
        outdated: those whose label maps are there, but of other images, of images that are not recorded, or changed.
    """

    def __init__(self, out: Path, made_by: MadeBy, images: Mapping[str, str], *, replace: bool) -> None:
        self._replace = replace
        self._out, self._manifest, self._made, self._images = out, out / MANIFEST, made_by.to_json(), images
        self.kept: set[str] = set()
        self.outdated: list[str] = []

    def open(self, side_inputs: Mapping[str, str | None], broken: Collection[str]) -> None:
        """Create the folder, or accept it if the same model made what is in it; clean up what a killed run left.

        Of the side inputs, those of every case that is kept must be the same; of a ``broken`` one none is kept.
        """
        out, manifest = self._out, self._manifest
        if out.exists() and not out.is_dir():
            raise DataError(out, "output folder", got="a file", want="a folder, new or of the same model's predictions")
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        before: dict[str, str] = {}
        self._recorded: dict[str, str] = {}
        written: dict[str, str] | None = {}
        if manifest.exists():
            try:
                before, self._recorded, written = self._compare(*_read_manifest(manifest))
            except DataError:
                if not self._replace:
                    raise
        elif not self._replace and any(out.glob("*.nii.gz")):
            raise DataError(out, "output folder", got="volumes of unknown origin", want="an empty or a new folder")
        there = [case_id for case_id in side_inputs if prediction_path(out, case_id).exists()]
        found = {case_id: sha256_of(prediction_path(out, case_id)) for case_id in there}
        self._written = found if written is None else written  # what an older version wrote is believed
        others = [case_id for case_id in there if found[case_id] != self._written.get(case_id)]
        if others and not self._replace:
            raise DataError(
                out,
                "label maps",
                got=f"others than were written there, of {listed(others)}",
                want="those that trifuse predict wrote",
                hint="if they were corrected by hand, keep them: choose another output folder; otherwise remove them",
            )
        same = {case_id for case_id in there if _is_of(self._images[case_id], self._recorded.get(case_id))}
        self.kept = same.difference(others, broken)
        changed = [name for name in there if name in self.kept and before.get(name) != side_inputs[name]]
        if self._replace:
            self.kept -= {*changed}
        elif changed:
            other = f"another prior or ECG of {listed(changed)}"
            raise DataError(manifest, "made by", got=other, want="the same ones", hint="choose another output folder")
        self.outdated = [case_id for case_id in there if case_id not in self.kept]
        self._extras = {**before, **{name: digest for name, digest in side_inputs.items() if digest is not None}}
        for case_id in self.outdated:  # until it is made anew
            self._recorded.pop(case_id, None)
        self._write()
        self._say()

    def _compare(
        self,
        made: Mapping[str, Any],
        extras: dict[str, str],
        images: dict[str, str] | None,
        written: dict[str, str] | None,
    ) -> tuple[dict[str, str], dict[str, str], dict[str, str] | None]:
        """Return the recorded digests of side inputs, images and label maps, if the same network made these."""
        if differences := {name: (old, new) for name, old, new in _differences(made, self._made)}:
            folder, run = ({name: pair[which] for name, pair in differences.items()} for which in (0, 1))
            got, want = f"{folder}, which made the label maps in this folder", f"{run}, of the run that is to predict"
            raise DataError(self._manifest, "made by", got=got, want=want, hint="choose another output folder")
        return extras, images or {}, written

    def add(self, case_id: str, written: Path) -> None:
        """Record a new label map, which lies under a temporary name still, and remove the one in whose place it comes.

        So at no moment is there a label map of which the manifest says something else.
        """
        self._recorded[case_id] = self._images[case_id]
        self._written[case_id] = sha256_of(written)
        prediction_path(self._out, case_id).unlink(missing_ok=True)
        self._write()

    def _write(self) -> None:
        extras = {_EXTRAS: self._extras} if self._extras else {}
        write_record(self._manifest, {**self._made, **extras, _IMAGES: self._recorded, _LABELS: self._written})

    def _say(self) -> None:
        said = [f"{count(len(self.kept), 'label map')} kept, of the same images"] if self.kept else []
        if self.outdated:
            of = "their images, the network or they themselves have changed, or nothing says which they were"
            said.append(f"{count(len(self.outdated), 'label map')} made anew, because {of}: {listed(self.outdated)}")
        if said:
            print(f"note: {self._out}: {'; '.join(said)}", file=sys.stderr)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], section: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name and both values of what differs, sections that both have field by field."""
    for name, value in wanted.items():
        other = found[name]
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(other, value, f"{section}{name}.")
        elif value != other:
            yield f"{section}{name}", other, value


def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str] | None, dict[str, str] | None]:
    """Return what predictions were made with, in names of today, and digests of side inputs, images and label maps.

    Of images, and of label maps, that is None where an older version recorded none.
    """
    try:
        values = read_record(path)
        images, written = (dict(values.pop(name)) if name in values else None for name in (_IMAGES, _LABELS))
        extras = dict(values.pop(_EXTRAS, {}))
        return config_from_json(MadeBy, values, path).to_json(), extras, images, written
    except (ValueError, TypeError, CheckpointError):
        raise DataError(path, "made by", got="a damaged file", want="what trifuse predict wrote") from None
