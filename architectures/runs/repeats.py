"""The same training several times with other seeds, and one report over all of them: how the papers state results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from trifuse.architectures.evaluation.protocols import Protocol
from trifuse.architectures.evaluation.report import PaperTable, describe_environment
from trifuse.architectures.evaluation.tables import case_tables, read_case_table
from trifuse.architectures.storage.config_json import upgraded_json
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.run_folder import open_run

from .claim import claim_run_folder
from .pipeline import RunOptions, train
from .prepared_data import require_packages
from .registry import experiment_of
from .repeats_report import RepeatedRun, write_repeats_report
from .results import is_kept, noted_results
from .run_description import describe_recipe
from .sessions import earlier_commands


def train_repeats(recipe: Any, out: Path, repeats: int, **options: Unpack[RunOptions]) -> Path | None:
    """Train a network's recipe with ``repeats`` seeds and report mean and SD over the runs; see `repeat_training`."""
    experiment = experiment_of(recipe)
    require_packages(recipe.data)
    experiment.load(experiment.check, lambda recipe: None)(recipe)
    return repeat_training(
        train,
        recipe,
        out,
        repeats,
        title=experiment.load(experiment.title)(recipe),
        protocol=experiment.load(experiment.protocol),
        paper_tables=experiment.load(experiment.paper_tables, lambda targets: ()),
        paper=experiment.load(experiment.paper, ""),
        **options,
    )


def repeat_training(
    train: Callable[..., Path | None],
    recipe: Any,
    out: Path,
    repeats: int,
    *,
    title: str,
    protocol: Protocol | None = None,
    paper_tables: Callable[[int], Sequence[PaperTable]] = lambda targets: (),
    paper: str = "",
    **options: Unpack[RunOptions],
) -> Path | None:
    """Train a recipe with several seeds, and report mean and SD over the runs.

    Run k, counted from 1, lies in ``out/run_<k>``; k is added to the seeds of training and of the weights. Resumed
    with the same recipe, only the runs that are not finished, see `has_finished`, are done, and ``repeats`` may have
    grown.

    Args:
        train: does one run, as `train` of pipeline.py.
        recipe: what to do, with the seeds that k is added to.
        out: folder of the runs, and of ``report.md`` over them.
        repeats: how many runs.
        title: of the report.
        protocol: how the publication scored.
        paper_tables: what the publication reports for a cohort of that many targets.
        paper: how to cite it.
        options: see `RunOptions`.

    Returns:
        The path of the report; None on all ranks but the first.

    Raises:
        OutputFolderError: ``out`` is in use, or holds something else, or runs of another recipe.
        Further ones: see ``train``.
    """
    resume, force = options.get("resume", False), options.get("force_resume", False)
    overwrite = options.get("overwrite", False)
    with ExitStack() as claimed:
        with open_world(recipe.training.device) as world:  # of all runs: see `open_world`
            with world.raise_on_any_rank():
                goes_on = resume or force
                claimed.enter_context(claim_run_folder(out, recipe, resume=goes_on, overwrite=overwrite, force=force))
                if world.is_main:
                    _open_runs(out, recipe, force=force)
            runs = [RepeatedRun(out / f"run_{k}", recipe.training.seed + k) for k in range(1, repeats + 1)]
            for k, run in enumerate(runs, start=1):
                parts = options.get("parts", ("test",))
                if world.any(world.is_main and not is_kept(run.folder, with_seeds(recipe, k), parts)):
                    train(with_seeds(recipe, k), run.folder, **{**options, "resume": True, "overwrite": False})
        if not world.is_main:
            return None
        classes = {row.class_name for row in read_case_table(case_tables(runs[0].folder)[0])}
        with noted_results(out):
            return write_repeats_report(
                out,
                runs,
                title=f"{title}, {repeats} runs",
                facts=describe_environment(),
                command=options.get("command", ()),
                earlier=earlier_commands(runs[0].folder),
                protocol=protocol,
                paper_tables=paper_tables(len(classes)),
                paper=paper,
            )


def _open_runs(out: Path, recipe: Any, *, force: bool) -> None:
    """Write what the runs are into ``run.json``, or compare it."""
    described = {"repeated": describe_recipe(recipe)}
    _, accept = open_run(out, described, resume=True, force=force, upgrade=partial(_upgraded, type(recipe)))
    accept()


def with_seeds(recipe: Any, k: int) -> Any:
    """Add k to the seeds of training and of the network's weights."""
    training = replace(recipe.training, seed=recipe.training.seed + k)
    return replace(recipe, training=training, network=replace(recipe.network, init_seed=recipe.network.init_seed + k))


def _upgraded(kind: type, old: dict[str, Any]) -> dict[str, Any]:
    """Return what an older version wrote of repeated runs in the names and spellings of today."""
    return {**old, "repeated": upgraded_json(kind, old["repeated"])} if "repeated" in old else old
