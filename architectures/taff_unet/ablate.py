"""The paper's table on a cohort: with and without the atlas, the ECG and the days between; predicted and oracle prior.

On the phantom, with narrow networks, it shows that every row can be run, and how the rows differ there; not what they
are worth on patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trifuse.architectures.evaluation.statistics import format_p, paired_t_test
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.runs.ablation import scores_of_runs, train_all, write_ablation
from trifuse.architectures.runs.parallel import one_thread
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.prepared_data import open_split

from . import pretrain
from .demo import BASE_DIM, FOLDS, SIZE, demo_recipe, draw_time_bars, ecg_recipe, write_demo_cohort
from .first_pass import first_pass
from .inputs import ORACLE
from .report import SCAR, scar_dsc
from .train import TaffUNetRecipe

ECG_EPOCHS, FIRST_PASS_EPOCHS, SAMPLES_PER_EPOCH = 30, 6, 320  # more than the demo can afford

COLUMNS = ("setting", "prior")
BASELINE = ("baseline", "-")
ROWS = (  # the paper's settings, those with a prior with either source of it
    BASELINE,
    ("ap", "predicted"),
    ("ap", ORACLE),
    ("ecg", "-"),
    ("ecg_ap", "predicted"),
    ("ecg_ap", ORACLE),
    ("full", "predicted"),
    ("full", ORACLE),
)
TITLES = {
    "dsc": ("scar DSC", "SD"),
    "precision": ("precision", "SD"),
    "sensitivity": ("sensitivity", "SD"),
    "volume_difference_ml": ("volume difference (mL)", "SD"),
}


def ablate(
    out: Path,
    *,
    seeds: int = 3,
    epochs: int = 12,
    cases: int = 72,
    cohort: Path | None = None,
    jobs: int = 1,
    command: Sequence[str] = (),
) -> Path:
    """Train every row with every seed and write ``table.md`` and ``table.csv``; a finished training is not repeated.

    The first pass is trained once, and the predicted priors of all rows and seeds are made of its label maps.

    Args:
        out: folder for the cohort, the runs and the table.
        seeds: trainings of each row; a seed decides the weights at the start and the order of samples.
        epochs: of each training.
        cases: of the phantom; a third tests.
        cohort: to be used in place of the phantom, with a split of its own.
        jobs: trainings at a time, each on one thread.
        command: the command line that makes the table again, to be put below it.
    """
    val, test = round(cases / 9), round(cases / 3)
    root = cohort or write_demo_cohort(out, parts=(cases - val - test, val, test))
    if not (out / "ecg" / "report.md").exists():
        with one_thread():
            pretrain.train(ecg_recipe(root, epochs=ECG_EPOCHS), out / "ecg", resume=True)
    plain = _longer(demo_recipe(root, epochs=epochs))
    labels = first_pass(plain, *open_split(plain.data, out), out, jobs)
    runs = {row: [out / f"{'-'.join(row).replace(' ', '_')}-seed{seed}" for seed in range(seeds)] for row in ROWS}
    trainings = [
        (_recipe(root, row, labels, out / "ecg" / "best", epochs, seed), run)
        for row, folders in runs.items()
        for seed, run in enumerate(folders)
    ]
    train_all(trainings, train, jobs)
    bars = {"with time": runs["full", "predicted"], "without time": runs["ecg_ap", "predicted"]}
    draw_time_bars(bars, plain, out)
    return write_ablation(
        out,
        COLUMNS,
        {row: scores_of_runs(folders, list(TITLES), SCAR) for row, folders in runs.items()},
        TITLES,
        caption=_caption(cohort, labels, epochs, seeds),
        tests=("p of DSC", _p_values(runs)),
        command=command,
    )


def _recipe(root: Path, row: tuple[str, str], labels: Path, ecg: Path, epochs: int, seed: int) -> TaffUNetRecipe:
    setting, prior = row
    given = {"oracle": True} if prior == ORACLE else {"labels": labels}
    return _longer(demo_recipe(root, setting=setting, ecg=ecg, epochs=epochs, seed=seed, **given))


def _longer(recipe: TaffUNetRecipe) -> TaffUNetRecipe:
    """Give a recipe of the demo the ablation's longer epochs and first pass."""
    patches = recipe.data.preprocessing.patches
    assert patches is not None  # see TaffUNetRecipe
    data = recipe.data.with_preprocessing(patches=replace(patches, samples_per_epoch=SAMPLES_PER_EPOCH))
    prior = replace(recipe.prior, first_pass_epochs=FIRST_PASS_EPOCHS)
    return replace(recipe, data=data, prior=prior)


def _caption(cohort: Path | None, labels: Path, epochs: int, seeds: int) -> str:
    cases = len(list(labels.glob("*.nii.gz")))
    what = "Synthetic: a phantom cohort of" if cohort is None else f"Cohort {cohort.name}, with"
    return (
        f"{what} {cases} cases, networks of {BASE_DIM} channels in the first stage, slices of {SIZE} pixels, {epochs} "
        f"epochs. Scores of the scar over the test cases, then mean and SD over {seeds} seeds; p of a paired t-test of "
        "each test case's DSC, mean over the seeds, against the baseline's. An oracle prior is built from the "
        "reference annotation, a predicted one by a first pass of "
        f"{FOLDS} folds."
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
