"""The whole way on a synthetic cohort: ECGs, first pass, training with and without time, scores, pictures; minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trifuse.architectures.data.phantoms.scar import write_scar_phantom
from trifuse.architectures.data.samples.preprocessing import Patches
from trifuse.architectures.evaluation.interval_figures import draw_interval_bars
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import REPORT, add_picture
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.runs.demonstration import show_audit
from trifuse.architectures.runs.folder import claim_run_folder
from trifuse.architectures.runs.nnunet_recipe import nnunet_data
from trifuse.architectures.runs.parallel import one_thread, run_each
from trifuse.architectures.runs.pipeline import print_results, train
from trifuse.architectures.runs.prepared_data import open_split
from trifuse.architectures.training.recipe import Recipe

from . import pretrain
from .config import TaffUNetConfig
from .ecg_autoencoder import EcgAutoencoderConfig
from .first_pass import first_pass
from .inputs import PriorRecipe
from .optimisation import PartsRecipe
from .pretrain import EcgData, EcgPretrainingRecipe
from .report import interval_days, scar_dsc
from .train import TaffUNetRecipe

SIZE, SLICES = 96, 8  # pixels of a slice's side, and slices of a case
PARTS = (26, 4, 10)  # cases that train, validate and test
BASE_DIM = 8
EPOCHS, FIRST_PASS_EPOCHS = 6, 4
SAMPLES_PER_EPOCH = 280
ECG_EPOCHS = 15
FOLDS = 2
JOBS = 3  # trainings at a time, each on one thread: the first pass has three


def demo_recipe(
    cohort: Path,
    *,
    setting: str = "full",
    labels: Path | None = None,
    oracle: bool = False,
    ecg: Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
) -> TaffUNetRecipe:
    """Return a recipe small enough for a CPU: narrow networks, slices of 96 pixels, AdamW for a short training.

    Args:
        cohort: the cohort's folder.
        setting: which inputs the network has.
        labels: folder of the first pass's label maps; None trains one.
        oracle: whether the prior comes from the reference annotation.
        ecg: folder of a trained ECG autoencoder.
        epochs: of each training; None takes the demo's.
        seed: of the weights at the start and the order of samples.
    """
    network = TaffUNetConfig(setting=setting, image_size=SIZE, base_dim=BASE_DIM, init_seed=seed)
    if network.takes_ecg and ecg is not None:
        network = replace(network, ecg_checkpoint=str(ecg))
    patches = Patches(mirror=False, samples_per_epoch=SAMPLES_PER_EPOCH)
    data = nnunet_data().with_preprocessing(image_size=SIZE, patches=patches)
    return TaffUNetRecipe(
        data=replace(data, root=str(cohort)),
        network=network,
        training=Recipe(
            epochs=epochs or EPOCHS,
            batch_size=4,
            lr=4e-3,
            weight_decay=1e-4,
            warmup_epochs=1,
            grad_clip=12.0,
            seed=seed,
        ),
        parts=PartsRecipe(ecg_lr=4e-4, fusion_lr=4e-3),
        prior=PriorRecipe(
            "gt" if oracle else "predicted",
            labels=None if labels is None else str(labels),
            folds=FOLDS,
            first_pass_epochs=FIRST_PASS_EPOCHS,
        ),
        ecg_warmup_epochs=3.0,
    )


def ecg_recipe(cohort: Path, *, epochs: int | None = None, seed: int = 0) -> EcgPretrainingRecipe:
    """Return a short training of the ECG autoencoder on the beats of the cohort's training cases."""
    training = Recipe(
        epochs=epochs or ECG_EPOCHS,
        batch_size=8,
        lr=3e-3,
        weight_decay=5e-5,
        betas=(0.9, 0.95),
        warmup_epochs=4,
        seed=seed,
    )
    return EcgPretrainingRecipe(
        data=EcgData(root=str(cohort), kind="cohort"), network=EcgAutoencoderConfig(init_seed=seed), training=training
    )


def write_demo_cohort(folder: Path, *, parts: tuple[int, int, int] | None = None, seed: int = 0) -> Path:
    """Write the phantom cohort, whose table says which cases train, validate and test, and return its path."""
    train, val, test = parts or PARTS
    cohort = folder / "phantom"
    write_scar_phantom(cohort, train + val + test, seed, (SIZE, SIZE, SLICES), val=val, test=test)
    return cohort


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False, command: Sequence[str] = ()) -> Path:
    """Make the phantom, train on it, predict its test cases, and print where the report lies."""
    run, without_time, ecg = out / "run", out / "without_time", out / "ecg"
    for folder in (run, without_time, ecg):
        claim_run_folder(folder, overwrite=overwrite)
    print(f"writing a synthetic cohort of {sum(PARTS)} hearts and their ECGs to {out / 'phantom'}", flush=True)
    cohort = write_demo_cohort(out, seed=seed)
    print("training the ECG autoencoder", flush=True)
    with one_thread():
        pretrain.train(ecg_recipe(cohort, seed=seed), ecg)
    print(f"first pass: {FOLDS + 1} plain U-Nets find the wall", flush=True)
    recipe = demo_recipe(cohort, ecg=ecg / "best", seed=seed)
    labels = first_pass(recipe, *open_split(recipe.data, run), run, jobs=JOBS)
    print("training TAFF-UNet, and TAFF-UNet without time", flush=True)
    other = demo_recipe(cohort, setting="ecg_ap", labels=labels, ecg=ecg / "best", seed=seed)
    run_each(_train, [(recipe, run, command), (other, without_time, command)], JOBS)
    report = run / REPORT
    add_picture(report, draw_time_bars({"with time": [run], "without time": [without_time]}, recipe, run / "figures"))
    show_audit(report)
    print_results(report)
    return report


def draw_time_bars(runs: Mapping[str, Sequence[Path]], recipe: TaffUNetRecipe, figures: Path) -> Picture:
    """Draw the DSC of the scar in each bin of days, for groups of runs, into ``with_and_without_time.png``."""
    scores = {
        name: scar_dsc(row for run in some for row in read_case_table(run / "test_cases.csv"))
        for name, some in runs.items()
    }
    days = interval_days(recipe.data.open(), next(iter(scores.values())))
    return draw_interval_bars(days, scores, figures, name="with_and_without_time")


def _train(recipe: TaffUNetRecipe, out: Path, command: Sequence[str]) -> None:
    train(recipe, out, resume=True, command=command)
