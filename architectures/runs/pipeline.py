"""One run: a cohort in; a trained network, predictions, scores and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

from trifuse.architectures.evaluation.report import headline_of
from trifuse.architectures.storage.run_loggers import RunLogger
from trifuse.architectures.training.distributed import open_world
from trifuse.architectures.training.loop import FitResult, fit
from trifuse.architectures.training.memory import is_exhausted
from trifuse.architectures.training.run_folder import DIGESTS
from trifuse.kernels import DataError

from .claim import claim_run_folder
from .decisions import decision_parts
from .folder import BEST_FOLDER, FIGURES_FOLDER, PREDICTIONS_FOLDER, network_folder
from .prepared_data import Part, PreparedData, open_split, prepare_data, require_packages
from .recipes import RecipeError
from .registry import experiment_of
from .report import parts_to_report, report_run
from .results import describe_results, noted_results
from .run_description import compilation_of, describe_run


class RunOptions(TypedDict, total=False):
    """How a run is started, and what becomes of it at its end.

    Keys:
        resume: continue the run in the folder, for more epochs if the recipe has more.
        overwrite: replace the run in the folder, which stays until the new one has its first checkpoint.
        force_resume: continue although anything else of the recipe, or the data, has changed.
        loggers: what else gets the rows of ``log.csv``; see `RunLogger`.
        parts: of the split to predict, score and report; the test cases if the option is not given. A run that goes on
            reports those again that it has reported.
        command: the command line that does the run again, to be put into the report.
    """

    resume: bool
    overwrite: bool
    force_resume: bool
    loggers: Sequence[RunLogger]
    parts: Sequence[Part]
    command: Sequence[str]


def train(
    recipe: Any,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force_resume: bool = False,
    loggers: Sequence[RunLogger] = (),
    parts: Sequence[Part] = ("test",),
    command: Sequence[str] = (),
) -> Path | None:
    """Run a network's recipe from its data to ``out/report.md``; return that path, or None on all ranks but the first.

    Args:
        recipe: of one of the networks in the registry.
        out: the run's folder.
        resume, overwrite, force_resume, loggers, parts, command: see `RunOptions`.

    Raises:
        RecipeError: the network refuses the recipe.
        OutputFolderError: ``out`` is in use, or holds another run.
        DataError: cases are unusable, or have other classes than the network.
        MissingExtra: scipy or matplotlib is not installed.
        CheckpointError, NumericError, Interrupted: see `fit`.
    """
    out = Path(out)
    experiment = experiment_of(recipe)
    require_packages(recipe.data)
    experiment.load(experiment.check, lambda recipe: None)(recipe)
    network = experiment.load(experiment.network)
    side_inputs = experiment.load(experiment.training_inputs)
    given, decisions = recipe, experiment.load(experiment.decisions, ())
    with ExitStack() as claimed:  # by the first rank, until its report is written
        with open_world(recipe.training.device) as world:  # once: processes that part cannot safely meet again
            with world.raise_on_any_rank():  # the others wait until the first rank has claimed the folder
                goes_on = resume or force_resume
                claimed.enter_context(
                    claim_run_folder(out, recipe, resume=goes_on, overwrite=overwrite, force=force_resume)
                )
            with world.raise_on_any_rank():
                found = open_split(recipe.data, out) if side_inputs else ()
            brought = side_inputs and side_inputs(recipe, *found, out, force_resume=force_resume)
            with world.raise_on_any_rank():
                data = prepare_data(recipe.data, out, side_inputs=brought, scored=parts)
                recipe = with_classes(filled_in(recipe, data), len(data.cohort.class_names), sigmoid=experiment.sigmoid)
                model = build(network, recipe)
            started = {"resume": resume, "force_resume": force_resume, "loggers": loggers, "command": command}
            fit_network(model, recipe, data, out, **started)
        if not world.is_main:
            return None
        best = network.from_pretrained(out / BEST_FOLDER).to(next(model.parameters()).device)
        targets = len(data.cohort.class_names) - 1
        parts = parts_to_report(out, parts)
        made_of = describe_results(given, data.cohort, data.split, parts, data.digests)
        compilation = compilation_of(out)
        with noted_results(out, **made_of, compilation=compilation and asdict(compilation)):
            return report_run(
                out,
                best,
                data,
                title=experiment.load(experiment.title)(recipe),
                parts=parts,
                command=command,
                protocol=experiment.load(experiment.protocol),
                decisions=decision_parts(decisions, replace(recipe, data=given.data), data),
                paper_tables=experiment.load(experiment.paper_tables, lambda targets: ())(targets),
                paper=experiment.load(experiment.paper, ""),
                **experiment.load(experiment.report, lambda best, recipe, data, out: {})(best, recipe, data, out),
            )


def build(network: Any, recipe: Any) -> Any:
    """Build a recipe's network, with drawn weights or those that it starts from.

    Raises:
        RecipeError: memory does not hold it.
        CheckpointError: the weights are for another network.
    """
    try:
        model = network(recipe.network)
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        reason = str(error).splitlines()[0]
        raise RecipeError(f"network: more weights than memory holds ({reason}); make it smaller") from error
    if recipe.training.init is not None:
        model.start_from(network_folder(Path(recipe.training.init)), reset_head=recipe.training.reset_head)
    return model


def fit_network(model: Any, recipe: Any, data: PreparedData, out: Path, **options: Any) -> FitResult:
    """Train a network on prepared data as its `Experiment` says.

    Args:
        model: the network.
        recipe: of the run; see `filled_in`.
        data: the samples.
        out: the run's folder.
        options: ``resume``, ``force_resume``, ``loggers`` and ``command``, see `fit`.
    """
    experiment = experiment_of(recipe)
    recipe = filled_in(recipe, data)
    arguments = {
        "train_set": data.train_set,
        "validate": data.validation(recipe.training.batch_size),
        "run_config": {},
        **experiment.load(experiment.fit)(model, recipe, data, out),
    }
    described = {"architecture": experiment.name, **describe_run(recipe), **arguments["run_config"]}
    arguments["run_config"] = {**described, DIGESTS: data.digests}
    return fit(model, recipe=recipe.training, out=out, config_type=type(recipe), **arguments, **options)


def filled_in(recipe: Any, data: PreparedData) -> Any:
    """Return a recipe with what it leaves to the data: how samples were prepared, and what chooses the best epoch."""
    training = recipe.training.settled(validates=bool(data.split.val))
    return replace(recipe, data=data.recipe, training=training)


def with_classes(recipe: Any, classes: int, *, sigmoid: bool = False) -> Any:
    """Give a recipe's network the cohort's number of classes, unless it was given one of its own: 1 is a sigmoid.

    Raises:
        DataError: its own does not fit the cohort.
    """
    network = recipe.network
    if network.num_classes == type(network).num_classes:
        return replace(recipe, network=replace(network, num_classes=classes))
    if network.num_classes not in ({1, 2} if sigmoid and classes == 2 else {classes}):
        got, want = f"{classes} with the background", f"{network.num_classes}, the network's num_classes"
        raise DataError(recipe.data.root, "classes", got=got, want=want, hint="leave network.num_classes to the cohort")
    return recipe


def print_results(report: Path) -> None:
    """Print a run's headline, and where its report, pictures and predicted volumes lie."""
    print(f"\n{headline_of(report)}\nreport:   {report}")
    for picture in sorted(report.parent.glob(f"{FIGURES_FOLDER}/**/*.png")):
        print(f"picture:  {picture}")
    print(f"volumes:  {report.parent / PREDICTIONS_FOLDER / 'test'}")
