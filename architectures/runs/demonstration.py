"""What demos share: a phantom, one short training on it, and where to look afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trifuse.architectures.data.layouts.split import Split, write_split

from .folder import claim_run_folder
from .parallel import one_thread
from .pipeline import print_results, train


def write_phantom(folder: Path, write: Callable[[Path], Split]) -> tuple[Path, Path]:
    """Write a phantom cohort and its split below a folder, and return their paths.

    Args:
        folder: is made if it does not exist.
        write: writes the cohort into the folder that it is given, and returns the split.
    """
    cohort, split = folder / "phantom", folder / "phantom_split.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_split(split, write(cohort))
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
    """Make a phantom, train on it on one thread, predict its test cases, and print where the report lies.

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
    claim_run_folder(run, overwrite=overwrite)
    print(f"writing a synthetic cohort of {what} to {out / 'phantom'}", flush=True)
    cohort, split = write(out)
    with one_thread():
        report = train(make_recipe(cohort, split), run, command=command)
    assert report is not None  # a demo is one process
    print_results(report)
    return report
