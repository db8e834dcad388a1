"""What demos share: a phantom, one short training on it, a small audit of it, and where to look afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.split import Split, write_split
from trifuse.architectures.evaluation.audit_report import headline
from trifuse.architectures.evaluation.report import add_picture

from .audit import audit_run
from .claim import claim_run_folder
from .parallel import one_thread
from .pipeline import print_results, train
from .recipes import RecipeError

AUDITED_CASES = 2  # of the test cases: a demo shows what an audit is, and takes minutes


def write_phantom(folder: Path, write: Callable[[Path], Split]) -> tuple[Path, Path]:
    """Write a phantom cohort and its split below a folder, and return their paths.

    Args:
        folder: is made if it does not exist.
        write: writes the cohort into the folder that it is given, and returns the split.

    Raises:
        RecipeError: there is no such phantom, as of too few cases.
    """
    cohort, split = folder / "phantom", folder / "phantom_split.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        drawn = write(cohort)
    except ValueError as error:
        raise RecipeError(f"phantom: {error}") from error
    write_split(split, drawn)
    return cohort, split


def demonstrate(
    out: Path,
    what: str,
    write: Callable[[Path], tuple[Path, Path]],
    make_recipe: Callable[[Path, Path], Any],
    *,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """Make a phantom, train on it on one thread, predict its test cases, audit it, and print where the report lies.

    Args:
        out: folder of the phantom, and of the run in ``run``.
        what: the phantom, in words.
        write: writes it below a folder, and returns the paths of cohort and split.
        make_recipe: returns the recipe of the run from these.
        overwrite: replace what an earlier demo left.
        command: the command line that does the run again, to be put into the report.

    Returns:
        The path of the report.
    """
    run = out / "run"
    with claim_run_folder(run, overwrite=overwrite):
        print(f"writing a synthetic cohort of {what} to {out / 'phantom'}", flush=True)
        cohort, split = write(out)
        print("training the network, then segmenting the test cases", flush=True)
        with one_thread():
            report = train(make_recipe(cohort, split), run, resume=True, command=command)
            assert report is not None  # a demo is one process
            show_audit(report)
    print_results(report)
    return report


def show_audit(report: Path) -> None:
    """Audit a finished run on a few of its test cases, put the chart into its report, and print what was found."""
    print("audit: is every mechanism of the network alive?", flush=True)
    found = audit_run(report.parent, most=AUDITED_CASES)
    add_picture(report, found.picture)
    print(f"{headline(found.audit)}\naudit:    {found.page}")
