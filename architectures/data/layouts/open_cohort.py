"""A folder becomes a cohort: which cases there are, which file is what, and what is wrong with them.

Each layout that is understood has a file of its own, see `LAYOUTS`; ``"auto"`` tells them apart by the files that are
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from trifuse.architectures.data.volumes.files import NIFTI_SUFFIXES, nifti_files, unread_images
from trifuse.architectures.storage.epoch_log import SMOOTHED
from trifuse.architectures.storage.file_names import can_name_files, composed
from trifuse.architectures.storage.text import count, listed, natural_key, printable
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import DataError, require

from . import LAYOUTS
from .channels import cases_of_images
from .cohort import MAX_CLASSES, Case, Cohort, Split, missing_files
from .cohort_options import AUTO, COHORT_OPTIONS
from .found import MEAN_OF_CLASSES, Classes, Found, Targets, by_name, chosen_classes, parse_targets
from .layout import Layout


def open_cohort(root: Path, layout: str = AUTO, targets: Targets | None = None, **options: Any) -> Cohort:
    """Find the cases below a folder, without reading their voxels.

    Args:
        root: the cohort's folder; for LAScarQS also the ``train_data`` folder itself.
        layout: the name of one of `LAYOUTS`, or ``"auto"`` to tell by the files that are there.
        targets: the label values to segment: one value, or names with one value or several each, e.g.
            ``{"lv": 3, "wall": [1, 2]}`` or ``["lv=3", "wall=1,2"]``; all other values are background. Without it
            labels must be 0 and 1 in the plain layout; others know the meaning of their labels. Some layouts, such as
            LAScarQS and Synapse, have no choice.
        options: ``patient_pattern``, a regular expression that finds the patient in a case's name (its first group,
            or all of the match), so that several images of one patient stay on one side of a split; without it the
            layout knows the patient (ACDC), or every case is one. ``frame``, the frame to take of images of four
            dimensions, counted from 0; their labels have as many frames, or are those of that one. Further ones belong
            to one layout each, which declares them: `COHORT_OPTIONS` lists them all.

    Raises:
        DataError: files are missing (all of them are listed), names collide, or no case was found.
    """
    cohort, problems = scan_cohort(root, layout, targets, **options)
    if problems:
        raise DataError.merge(problems)
    return cohort


def scan_cohort(
    root: Path, layout: str = AUTO, targets: Targets | None = None, **options: Any
) -> tuple[Cohort, list[DataError]]:
    """Find the cases as ``open_cohort`` does, and return what is wrong with names and files beside the cohort.

    Raises:
        DataError: there is no case at all, or the arguments make no sense.
    """
    root = Path(root)
    if unknown := set(options) - {option.name for option in COHORT_OPTIONS}:
        known = ", ".join(option.name for option in COHORT_OPTIONS)
        raise TypeError(f"options of a cohort: expected some of {known}, got {', '.join(sorted(unknown))}")
    chosen = layout_of(root, layout)
    _refuse_options_of_others(root, chosen, options)
    values = _values(chosen, options)
    found = _find(root, chosen, values)
    classes = _classes(root, chosen, found, targets, values)
    if strange := [name for name in classes.names if printable(name) != name]:
        raise DataError(root, "class names", got=listed(map(ascii, strange)), want="text")
    if taken := [name for name in classes.names if name == MEAN_OF_CLASSES or f"_{name}".endswith(SMOOTHED)]:
        want = f"none called {MEAN_OF_CLASSES!r}, or with {SMOOTHED!r} at the end: tables of scores have such columns"
        raise DataError(root, "class names", got=listed(taken), want=want)
    if len(classes.names) > MAX_CLASSES:
        got = f"{len(classes.names) - 1} beside the background"
        hint = "choose some of them with targets=NAME=VALUE, or join several with targets=NAME=VALUE,VALUE"
        raise DataError(
            root, "classes", got=got, want=f"at most {MAX_CLASSES - 1}: maps hold them in 8 bits", hint=hint
        )
    _require_readers(found.cases)
    cases, unmatched = with_patients(found.cases, options.get("patient_pattern"))
    problems = [*found.problems, *unmatched, *_unusable_names(root, cases), *missing_files(cases)]
    cohort = Cohort(
        root,
        chosen.name,
        *classes[:3],
        _of_frame(root, cases, options.get("frame")),
        classes.largest_label,
        found.has_spacing,
        found.split,
        found.notes,
    )
    return cohort, problems


def open_images(path: Path, **options: Any) -> Cohort:
    """Find images to segment: a NIfTI file, a folder that holds some, or the images of a cohort, labelled or not.

    Args:
        path: the file or folder. Names that end as nnU-Net's images do lose the number of their channel.
        options: ``frame`` and those of the folder's layout, see ``open_cohort``; those of other layouts have no effect.
            ``channel``, the number that was trained on, also chooses among the channels of a folder.

    Raises:
        DataError: there is no image, two have the same name, or an option is needed to tell which images are meant.
    """
    path = Path(path)
    if path.is_file():
        images = [file for file in nifti_files(path.parent) if file[1] == path]
        if not images:
            raise DataError(path, "file name", got=path.name, want=f"one that ends in {' or '.join(NIFTI_SUFFIXES)}")
    else:
        images = list(nifti_files(path)) if path.is_dir() else []
    root = path.parent if path.is_file() else path
    problems = unread_images(path) if images and path.is_dir() else []
    if images:
        found = Found(cases_of_images(root, by_name(images, problems), problems, channel=options.get("channel") or ""))
    else:
        layout = layout_of(path)
        found = _find(path, layout, _values(layout, options))
        problems += found.problems if found.images_unclear else []
    cases = sorted((replace(case, label=None) for case in found.cases), key=lambda case: natural_key(case.case_id))
    _require_readers(cases)
    problems += _unusable_names(path, cases)
    if problems:
        raise DataError.merge(problems)
    classes = ("background", "foreground")
    of_frame = _of_frame(path, cases, options.get("frame"))
    return Cohort(root, "images", classes, None, False, of_frame, has_spacing=found.has_spacing)


def layout_of(root: Path, name: str = AUTO) -> Layout:
    """Return a folder's layout, by the files that are there if the name leaves it open.

    Raises:
        DataError: there is no folder, or it looks like none that is known.
        ValueError: there is no layout of that name.
    """
    layouts = {layout.name: layout for layout in LAYOUTS}
    check_choice("layout", name, (AUTO, *layouts))
    root = Path(root)
    if not root.is_dir():
        raise DataError(root, "folder", got="a file" if root.exists() else "nothing there", want="a folder of cases")
    if name != AUTO:
        return layouts[name]
    for layout in LAYOUTS:
        if layout.detect(root):
            return layout
    signs = [f"{layout.signs} ({layout.name})" for layout in LAYOUTS]
    raise DataError(
        root,
        "layout",
        got=f"none that is known; it holds {listed(sorted(path.name for path in root.iterdir())) or 'nothing'}",
        want=f"{', '.join(signs[:-1])}, or {signs[-1]}",
    )


# --------------------------------------------------------------------------------------------- scanning


def _refuse_options_of_others(root: Path, layout: Layout, options: Mapping[str, Any]) -> None:
    """Refuse options that belong to another layout, unless they have their default."""
    for owner in LAYOUTS:
        for option in owner.options if owner is not layout else ():
            value = options.get(option.name)
            if value not in (None, option.default):
                want = f"none: it belongs to the {owner.name} layout, this is {layout.name}"
                raise DataError(root, option.name, got=value, want=want)


def _values(layout: Layout, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a layout's own options, with the default of each that is not given."""
    said = {name: value for name, value in options.items() if value is not None}
    return {option.name: said.get(option.name, option.default) for option in layout.options}


def _find(root: Path, layout: Layout, values: Mapping[str, Any]) -> Found:
    """Find the cases of a folder, sorted by name."""
    found = layout.scan(root, values)
    if not found.cases:
        nothing = DataError(root, "cases", got="0 cases", want=layout.lacking)
        raise DataError.merge([*found.problems, nothing])
    names = [{each.case_id, *(file.name for file in each.files)} for each in found.cases]
    cases = [replace(each, case_id=composed(each.case_id), patient=composed(each.patient)) for each in found.cases]
    notes = found.notes
    if apart := sum(any(name != composed(name) for name in of_case) for of_case in names):
        notes += (f"{count(apart, 'case')} with accents stored apart from their letters (NFD): taken as typed (NFC)",)
    split = found.split and Split(*(tuple(map(composed, ids)) for ids in astuple(found.split)))
    return replace(found, cases=sorted(cases, key=lambda case: natural_key(case.case_id)), split=split, notes=notes)


def _classes(root: Path, layout: Layout, found: Found, targets: Targets | None, values: Mapping[str, Any]) -> Classes:
    """Say what the label values of a layout mean, or of the targets that were chosen in it."""
    if isinstance(targets, Sequence):
        targets = parse_targets(targets)
    if targets is not None:
        if not layout.takes_targets:
            want = f"none: the classes of the {layout.name} layout are fixed"
            raise DataError(root, "targets", got=targets, want=want)
        return chosen_classes(root, targets)
    if layout.classes is not None:
        return layout.classes(root, values)
    return found.classes or Classes(("background", "foreground"), {0: 0, 1: 1}, False)


def _require_readers(cases: Sequence[Case]) -> None:
    """Look for what reading the images needs, by their names alone."""
    for path in (path for case in cases for path in case.image_files if path.suffix == ".h5"):
        require("h5py", "h5", f"reading {path.name}")


def with_patients(cases: Sequence[Case], pattern: str | None) -> tuple[list[Case], list[DataError]]:
    """Find the patient in every case's name, if a pattern says how; return also what it does not fit.

    Raises:
        DataError: it is no regular expression.
    """
    if pattern is None:
        return list(cases), []
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(pattern, "patient_pattern", got=str(error), want="a regular expression") from error
    named, problems = [], []
    for case in cases:
        match = expression.search(case.case_id)
        patient = (match.group(1) if expression.groups else match.group()) if match else None
        if not patient:
            problems.append(DataError(case.case_id, "patient", got="no match", want=f"a name that matches {pattern!r}"))
        named.append(replace(case, patient=patient or case.case_id))
    return named, problems


def _of_frame(root: Path, cases: Sequence[Case], frame: int | None) -> tuple[Case, ...]:
    """Take a frame of every image; those in arrays have none."""
    if frame is not None and any(case.arrays is not None for case in cases):
        raise DataError(root, "frame", got=frame, want="none: arrays of this layout are images of three dimensions")
    return tuple(replace(case, frame=frame) for case in cases)


def _unusable_names(root: Path, cases: Sequence[Case]) -> list[DataError]:
    """Refuse names, under which results are stored, that no file can have or a file system may take for the same."""
    want = "a name that a file can have: without / or \\ or line ends, neither . nor .., at most 240 bytes"
    strange = [
        DataError(root, "case name", got=repr(name), want=want)
        for name in (case.case_id for case in cases)
        if not can_name_files(name)
    ]
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(composed(case.case_id).casefold(), []).append(case.case_id)
    return strange + [
        DataError(
            root,
            "case names",
            got=" and ".join(names),
            want="names that differ by more than case, or by how accents are stored",
        )
        for names in groups.values()
        if len(names) > 1
    ]
