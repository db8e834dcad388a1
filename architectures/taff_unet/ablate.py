"""The paper's table on a cohort: with and without the atlas, the ECG and the days between; predicted and oracle prior.

On the phantom, with narrow networks, it shows that every row can be run, and how the rows differ there; not what they
are worth on patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trifuse.architectures.data.phantoms.ambiguous import TRUTH
from trifuse.architectures.evaluation.statistics import format_p, paired_t_test
from trifuse.architectures.evaluation.summary import SCAR
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.runs.ablation import scores_of_runs, train_all, write_ablation
from trifuse.architectures.runs.parallel import one_thread
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.prepared_data import open_split
from trifuse.architectures.runs.recipes import RecipeError

from . import pretrain
from .ambiguity_tables import write_ambiguity_tables
from .demo import demo_recipe, draw_time_bars, ecg_recipe
from .first_pass import first_pass
from .inputs import ORACLE
from .phantoms import ABLATIONS, Phantom, Plan
from .report import scar_dsc
from .train import TaffUNetRecipe

Row = tuple[str, str]  # setting and prior

COLUMNS = ("setting", "prior")
BASELINE: Row = ("baseline", "-")
ROWS: tuple[Row, ...] = (  # the paper's settings, those with a prior with either source of it
    BASELINE,
    ("ap", "predicted"),
    ("ap", ORACLE),
    ("ecg", "-"),
    ("ecg_ap", "predicted"),
    ("ecg_ap", ORACLE),
    ("full", "predicted"),
    ("full", ORACLE),
)
CEILING: Row = ("territory given", ORACLE)
"""The setting ``ap`` whose prior holds the scarred territory alone: what knowing all that an ECG can tell is worth."""
AMBIGUOUS_ROWS: tuple[Row, ...] = (*(row for row in ROWS if row[0] != "ecg"), CEILING)
TITLES = {
    "dsc": ("scar DSC", "SD"),
    "precision": ("precision", "SD"),
    "sensitivity": ("sensitivity", "SD"),
    "volume_difference_ml": ("volume difference (mL)", "SD"),
}


def ablate(
    out: Path,
    *,
    phantom: Phantom = "easy",
    seeds: int | None = None,
    epochs: int | None = None,
    cases: int | None = None,
    cohort: Path | None = None,
    jobs: int = 1,
    command: Sequence[str] = (),
) -> Path:
    """Train every row with every seed and write ``table.md`` and ``table.csv``; a finished training is not repeated.

    The first pass is trained once, and the predicted priors of all rows and seeds are made of its label maps. What was
    broken off goes on where it stopped.

    Args:
        out: folder for the cohort, the runs and the table.
        phantom: to be trained on; ``"ambiguous"`` has a row with the territory given, and tables by ambiguity and days.
        seeds: trainings of each row; a seed decides the weights at the start and the order of samples. None, here and
            below, takes the phantom's own number.
        epochs: of each training.
        cases: of the phantom.
        cohort: to be used in place of the phantom, with a split of its own.
        jobs: trainings at a time, each on one thread.
        command: the command line that makes the table again, to be put below it.

    Raises:
        RecipeError: both a cohort and the ambiguous phantom, or a number of its cases, are asked for.
        DataError: ``out`` holds a phantom with another number of cases.
        Further ones: see `train`.
    """
    beside = {"phantom": None if phantom == "easy" else phantom, "cases": cases}  # what there would be no effect of
    for name, value in beside.items():
        if cohort is not None and value is not None:
            raise RecipeError(f"a cohort takes the place of the phantom: expected no {name} beside it, got {value!r}")
    plan = ABLATIONS[phantom].of_cases(cases)
    plan = replace(plan, epochs=epochs or plan.epochs, seeds=seeds or plan.seeds)
    root = cohort or plan.write(out, keep=True)
    with one_thread():
        pretrain.train(ecg_recipe(root, plan), out / "ecg", resume=True)
    plain = demo_recipe(root, plan)
    labels = first_pass(plain, *open_split(plain.data, out), out, jobs)
    rows = ROWS if phantom == "easy" else AMBIGUOUS_ROWS
    runs = {row: [out / f"{'-'.join(row).replace(' ', '_')}-seed{seed}" for seed in range(plan.seeds)] for row in rows}
    trainings = [
        (_recipe(root, plan, row, labels, out / "ecg" / "best", seed), run)
        for row, folders in runs.items()
        for seed, run in enumerate(folders)
    ]
    train_all(trainings, train, jobs)
    bars = {"with time": runs["full", "predicted"], "without time": runs["ecg_ap", "predicted"]}
    draw_time_bars(bars, plain, out)
    further = ""
    if phantom == "ambiguous":
        bars = {"ECG, prior and time": runs["full", "predicted"], "prior alone": runs["ap", "predicted"]}
        draw_time_bars(bars, plain, out, "with_and_without_ecg")
        further = write_ambiguity_tables(out, root, runs)
    return write_ablation(
        out,
        COLUMNS,
        {row: scores_of_runs(folders, list(TITLES), SCAR) for row, folders in runs.items()},
        TITLES,
        caption=_caption(cohort, labels, plan),
        tests=("p of DSC", _p_values(runs)),
        further=further,
        command=command,
    )


def _recipe(root: Path, plan: Plan, row: Row, labels: Path, ecg: Path, seed: int) -> TaffUNetRecipe:
    setting, prior = row
    if row == CEILING:
        return demo_recipe(root, plan, setting="ap", oracle=True, arteries=root / TRUTH, seed=seed)
    oracle = prior == ORACLE
    return demo_recipe(
        root, plan, setting=setting, oracle=oracle, labels=None if oracle else labels, ecg=ecg, seed=seed
    )


def _caption(cohort: Path | None, labels: Path, plan: Plan) -> str:
    cases = len(list(labels.glob("*.nii.gz")))
    name = "a phantom cohort" if plan.phantom == "easy" else "an ambiguous phantom cohort"
    what = f"Synthetic: {name} of" if cohort is None else f"Cohort {cohort.name}, with"
    return (
        f"{what} {cases} cases, networks of {plan.base_dim} channels in the first stage, slices of {plan.image_size} "
        f"pixels, {plan.epochs} epochs. Scores of the scar over the test cases, then mean and SD over {plan.seeds} "
        "seeds; p of a paired t-test of each test case's DSC, mean over the seeds, against the baseline's. An oracle "
        f"prior is built from the reference annotation, a predicted one by a first pass of {plan.folds} folds."
    )


def _p_values(runs: Mapping[tuple[str, str], Sequence[Path]]) -> dict[tuple[str, ...], str]:
    """Test each row's cases against the baseline's."""
    means = {
        row: scar_dsc(scored for run in folders for scored in read_case_table(run / "test_cases.csv"))
        for row, folders in runs.items()
    }
    baseline = means[BASELINE]
    return {
        row: "-"
        if row == BASELINE
        else format_p(paired_t_test([*baseline.values()], [of[case] for case in baseline]).p)
        for row, of in means.items()
    }
