"""What a finished run has made, and of what: ``results.json``.

It names the pictures and pages that are the run's own, and has digests of the tables that are read again, and of the
cases' files that all of it was made of.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.evaluation.report import REPORT
from trifuse.architectures.storage.atomic_files import sha256_of, written_files
from trifuse.architectures.storage.config_json import upgraded_json
from trifuse.architectures.storage.file_names import real_path
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.architectures.storage.text import listed
from trifuse.kernels import CheckpointError, DataError

from .folder import LOG_FILE, SPLIT_FILE, run_section
from .prepared_data import Part, open_split
from .recipes import DataRecipe
from .run_description import describe_recipe

RESULTS_FILE = "results.json"
_NAMED = re.compile(r"(figures|audit)/.+")  # what lies in a run's folder under names that are not fixed
_TABLE = re.compile(rf"\w+_cases\.csv|{re.escape(LOG_FILE)}")


@contextmanager
def noted_results(run: Path, **made_of: Any) -> Iterator[None]:
    """Note what is written into a run's folder in this context as the run's own.

    Args:
        run: the folder.
        made_of: what `has_finished` compares, see `describe_results`; nothing where results are only added to.
    """
    with written_files() as written:
        yield
    before, root = _read(run), real_path(run)
    names = {path.relative_to(root).as_posix() for path in map(real_path, written) if path.is_relative_to(root)}
    if made_of:
        names.add(LOG_FILE)
    files = {*before.get("files", ()), *filter(_NAMED.fullmatch, names)}
    tables = {name: sha256_of(run / name) for name in sorted(filter(_TABLE.fullmatch, names)) if (run / name).exists()}
    described = {
        **before,
        "files": sorted(name for name in files if (run / name).is_file()),
        "tables": {**before.get("tables", {}), **tables},
        **made_of,
    }
    write_record(run / RESULTS_FILE, described)


def describe_results(
    recipe: Any, cohort: Cohort, split: Split, parts: Sequence[Part], known: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a run's results are made of, as JSON values.

    Args:
        recipe: as it was given.
        cohort, split: its cases.
        parts: what was scored.
        known: digests of cases, as far as they were taken, see `Case.digest`.
    """
    cases = (*split.train, *split.val, *split.test)
    digests = {case_id: known.get(case_id) or cohort.case(case_id).digest() for case_id in cases}
    return {"recipe": json.loads(json.dumps(describe_recipe(recipe))), "parts": [*parts], "digests": digests}


def has_finished(run: Path, recipe: Any, parts: Sequence[Part] = ("test",)) -> bool:
    """Tell whether a folder holds the report of a run of that recipe, its split, the cases' files of now, and parts.

    If it holds another run's, or one of an older version, which did not record what it was given, going on with it
    tells: it is refused, or reported again. So it is where a table of the report has changed.
    """
    found = _read(run)
    if "recipe" not in found or not all((run / name).exists() for name in (REPORT, SPLIT_FILE)):
        return False
    try:
        check_tables(run)
        said = describe_results(recipe, *open_split(recipe.data, run), parts, {})
    except (OSError, CheckpointError, DataError):
        return False
    of_now = upgraded_json(type(recipe), found["recipe"]), found["digests"]
    return of_now == (said["recipe"], said["digests"]) and {*parts} <= {*found["parts"]}


def is_kept(run: Path, recipe: Any, parts: Sequence[Part] = ("test",)) -> bool:
    """Tell whether a run `has_finished` and need not be done again, and say so."""
    kept = has_finished(run, recipe, parts)
    if kept:
        print(f"note: {run} has finished, with this recipe and of these data, and is kept", file=sys.stderr)
    return kept


def check_tables(run: Path) -> None:
    """Refuse tables of a run that have changed since it wrote them; runs of older versions do not know.

    Raises:
        CheckpointError: naming the file.
    """
    for name, expected in _read(run).get("tables", {}).items():
        path = run / name
        if path.exists() and (found := sha256_of(path)) != expected:
            raise CheckpointError(
                f"{path}: the content has changed since the run wrote it: expected SHA-256 {expected}, got {found}; "
                "restore the file, or let train --resume write it anew"
            )


def check_same_cases(run: Path, first: Path) -> None:
    """Refuse to score two runs against each other whose cases of one name were made of other files, or whose targets of
    one name are other labels.

    Runs on two channels or frames are of other files by intent; runs of older versions do not know theirs.

    Raises:
        DataError: naming the cases or targets.
        CheckpointError: a folder holds no run.
    """
    read, first_read = (run_section(each, "data", DataRecipe) for each in (run, first))
    values, known = (dict(each.partition("=")[::2] for each in data.targets or ()) for data in (read, first_read))
    if other := [f"{name}={value}" for name, value in values.items() if known.get(name, value) != value]:
        want = listed(f"{name}={value}" for name, value in known.items() if name in values)
        raise DataError(run, "targets", got=listed(other), want=f"those of {first}: {want}")
    if (read.channel, read.frame) != (first_read.channel, first_read.frame):
        return
    digests, expected = (_read(each).get("digests", {}) for each in (run, first))
    if other := [case for case, digest in digests.items() if expected.get(case, digest) != digest]:
        hint = "to compare them all the same, name their tables, such as test_cases.csv"
        got = f"other images, labels or ECGs under the names {listed(other)}"
        raise DataError(run, "cases", got=got, want=f"those of {first}", hint=hint)


def named_files(run: Path) -> frozenset[str] | None:
    """Return the files in ``figures/`` and ``audit/`` that are the run's own; None for a run of an older version."""
    found = _read(run)
    if "files" not in found:
        return None if (run / REPORT).exists() and not (run / RESULTS_FILE).exists() else frozenset()
    return frozenset(found["files"])


def _read(run: Path) -> dict[str, Any]:
    """Return what is noted of a run's results; nothing where that is missing or damaged."""
    try:
        return read_record(run / RESULTS_FILE)
    except (OSError, CheckpointError):
        return {}
