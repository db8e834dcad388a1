"""The audit of a finished run: which mechanisms of its network do anything to the cases of a part of its split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.data.layouts.split import read_split
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.evaluation.audit import THRESHOLD, Audit, audit_network
from trifuse.architectures.evaluation.audit_report import PAGE, TITLE, is_audit, write_audit
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import check_extras, describe_environment, describe_network
from trifuse.architectures.storage.text import count, listed
from trifuse.architectures.training.distributed import choose_device
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import CheckpointError, DataError
from trifuse.kernels.choices import check_choice

from .folder import SPLIT_FILE, run_of
from .predict import load_network
from .prepared_data import Part
from .recipes import matching_cases
from .registry import experiment, experiments
from .results import noted_results

AUDIT_FOLDER = "audit"  # of a run, with one folder for each part of the split


class AuditedRun(NamedTuple):
    """What an audit found, its page ``audit.md``, and its chart."""

    audit: Audit
    page: Path
    picture: Picture


def audit_run(
    folder: Path,
    *,
    part: Part = "test",
    patterns: Sequence[str] = ("*",),
    most: int | None = None,
    threshold: float = THRESHOLD,
    hd95: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> AuditedRun:
    """Audit the network of a run on its own cases, and write ``audit.md``, a chart and tables.

    Args:
        folder: of the run.
        part: of its split.
        patterns: of the cases of that part to look at,
        most: at most so many of them, the first ones; None takes all.
        threshold, hd95, batch_size: see `audit_network`.
        device: see `choose_device`.
        out: folder to write into; None takes ``audit/<part>`` in the run.
        overwrite: replace the files that an earlier audit left there; what else is there stays.
        command: the command line that does it again.

    Raises:
        ValueError: an unknown part, or a threshold that is no share.
        CheckpointError: no run, a damaged one, or one of a network that has no table of mechanisms.
        OutputFolderError: the folder holds something, and may not be overwritten, or no audit.
        DataError: the part has no such cases, or a case is unusable.
        MissingExtra: scipy or matplotlib is not installed.
    """
    check_choice("part", part, Part)
    check_extras()
    run = _require_run(folder)
    out = run / AUDIT_FOLDER / part if out is None else out
    _refuse_taken(out, overwrite)
    model, data = load_network(run)
    known = experiment(model.architecture)
    if not known.mechanisms:
        others = listed(one.name for one in experiments() if one.mechanisms)
        raise CheckpointError(
            f"{run}: expected a network with a table of its mechanisms ({others}), got {known.name}; name one as "
            "mechanisms= in its EXPERIMENT"
        )
    cohort = data.open()
    cases = matching_cases(cohort, _cases_of(run, cohort, part), patterns)[:most]
    model.to(choose_device(device))
    bring = known.load(known.run_inputs)
    side_inputs: Mapping[str, SideInputs] | None = bring and bring(model, run, cohort, cases)
    audit = audit_network(
        model,
        cohort,
        cases,
        data.preprocessing,
        known.load(known.mechanisms)(model),
        side_inputs=side_inputs,
        threshold=threshold,
        hd95=hd95,
        batch_size=batch_size,
    )
    facts = {
        "Run": run.resolve().name,
        "Cases": f"{count(len(cases), f'{part} case')}: {listed(cases)}",
        **describe_network(model),
        **describe_environment(next(model.parameters()).device),
    }
    title = f"{TITLE}{run.resolve().name}, {known.name}"
    with noted_results(run):
        picture = write_audit(out, audit, title=title, facts=facts, command=command)
    return AuditedRun(audit, out / PAGE, picture)


def _require_run(folder: Path) -> Path:
    run = run_of(folder)
    if run is not None:
        return run
    runs = sorted(path.parent.name for path in folder.glob(f"*/{SPLIT_FILE}")) if folder.is_dir() else []
    got = "no such folder" if not folder.is_dir() else "a folder without run.json"
    remedy = f"choose one of the runs in it: {listed(runs)}" if runs else "pass the folder that trifuse train wrote"
    raise CheckpointError(f"{folder}: expected the folder of a run, got {got}; {remedy}")


def _refuse_taken(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, but for an earlier audit that may be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_audit(out / PAGE):
        raise OutputFolderError(
            f"{out}: expected a new folder, an empty one or an earlier audit, got something else; choose another with "
            "--out"
        )
    if not overwrite:
        raise OutputFolderError(
            f"{out}: expected a new or an empty folder, got an earlier audit; choose another with --out "
            "(--overwrite replaces the files of that audit)"
        )


def _cases_of(run: Path, cohort: Cohort, part: Part) -> tuple[str, ...]:
    path = run / SPLIT_FILE
    split = read_split(path, cohort)
    if cases := getattr(split, part):
        return cases
    others = [name for name in ("test", "val", "train") if getattr(split, name)]
    hint = f"take those of another part: --split {' or --split '.join(others)}"
    raise DataError(path, f"{part} cases", got="none", want="at least one to audit the network on", hint=hint)
