"""The whole way on a synthetic cohort: ECGs, first pass, training with and without time, scores, pictures; minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from trifuse.architectures.data.phantoms.ambiguous import BEATS_FOLDER
from trifuse.architectures.data.samples.preprocessing import Patches
from trifuse.architectures.evaluation.interval_figures import draw_interval_bars, interval_days
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import REPORT, add_picture
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.runs.claim import claim_run_folder
from trifuse.architectures.runs.demonstration import show_audit
from trifuse.architectures.runs.nnunet_recipe import VAL_DICE_EMA, nnunet_data
from trifuse.architectures.runs.parallel import one_thread, run_each
from trifuse.architectures.runs.pipeline import print_results, train
from trifuse.architectures.runs.prepared_data import open_split
from trifuse.architectures.runs.results import noted_results
from trifuse.architectures.training.recipe import Recipe

from . import pretrain
from .config import TaffUNetConfig
from .ecg_autoencoder import EcgAutoencoderConfig
from .first_pass import first_pass
from .inputs import PriorRecipe
from .optimisation import PartsRecipe
from .phantoms import COHORT_FOLDER, DEMOS, Phantom, Plan
from .pretrain import EXPLAINED, EcgData, EcgPretrainingRecipe
from .report import scar_dsc
from .train import TaffUNetRecipe

JOBS = 3  # trainings at a time, each on one thread: the first pass has three


def demo_recipe(
    cohort: Path,
    plan: Plan = DEMOS["easy"],
    *,
    setting: str = "full",
    labels: Path | None = None,
    oracle: bool = False,
    arteries: Path | None = None,
    ecg: Path | None = None,
    seed: int = 0,
) -> TaffUNetRecipe:
    """Return a recipe small enough for a CPU: narrow networks, small slices, AdamW for a short training.

    Args:
        cohort: the cohort's folder.
        plan: how large networks and trainings are.
        setting: which inputs the network has.
        labels: folder of the first pass's label maps; None trains one.
        oracle: whether the prior comes from the reference annotation.
        arteries: table of the artery that is known of each case, see `PriorRecipe`.
        ecg: folder of a trained ECG autoencoder.
        seed: of the weights at the start and the order of samples.
    """
    network = TaffUNetConfig(
        setting=setting,
        image_size=plan.image_size,
        base_dim=plan.base_dim,
        fusion_stage=plan.fusion_stage,
        init_seed=seed,
    )
    if network.takes_ecg and ecg is not None:
        network = replace(network, ecg_checkpoint=str(ecg))
    patches = Patches(mirror=False, samples_per_epoch=plan.samples_per_epoch)
    data = nnunet_data().with_preprocessing(image_size=plan.image_size, patches=patches)
    return TaffUNetRecipe(
        data=replace(data, root=str(cohort)),
        network=network,
        training=Recipe(
            epochs=plan.epochs,
            batch_size=4,
            lr=4e-3,
            weight_decay=1e-4,
            warmup_epochs=1,
            grad_clip=12.0,
            seed=seed,
            best_epoch_smoothing=VAL_DICE_EMA,
        ),
        parts=PartsRecipe(ecg_lr=4e-4, fusion_lr=4e-3),
        prior=PriorRecipe(
            "gt" if oracle else "predicted",
            labels=None if labels is None else str(labels),
            folds=plan.folds,
            first_pass_epochs=plan.first_pass_epochs,
            arteries=None if arteries is None else str(arteries),
        ),
        ecg_warmup_epochs=3.0,
    )


def ecg_recipe(cohort: Path, plan: Plan = DEMOS["easy"], *, seed: int = 0) -> EcgPretrainingRecipe:
    """Return a short training of the ECG autoencoder, on beats without an image where the phantom has them.

    Where it has none, the beats of the training cases are all there is.
    """
    training = Recipe(
        epochs=plan.ecg_epochs,
        batch_size=plan.ecg_batch_size,
        lr=3e-3,
        weight_decay=5e-5,
        betas=(0.9, 0.95),
        warmup_epochs=4,
        seed=seed,
        best_epoch_by=EXPLAINED,
    )
    data = EcgData(root=str(cohort), kind="cohort")
    beats = cohort / BEATS_FOLDER
    if plan.phantom == "ambiguous" and any(beats.glob("*0.*")):  # fewer than ten are too few to train on
        data = EcgData(root=str(beats), kind="records", val_records=("*0",))  # a tenth
    return EcgPretrainingRecipe(data=data, network=EcgAutoencoderConfig(init_seed=seed), training=training)


def run_demo(
    out: Path, *, phantom: Phantom = "easy", seed: int = 0, overwrite: bool = False, command: Sequence[str] = ()
) -> Path:
    """Make the phantom, train on it, predict its test cases, and print where the report lies."""
    plan = DEMOS[phantom]
    run, without_time, ecg = out / "run", out / "without_time", out / "ecg"
    with ExitStack() as claimed:
        for folder in (run, without_time, ecg):
            claimed.enter_context(claim_run_folder(folder, overwrite=overwrite))
        print(f"writing a synthetic cohort of {plan.cases} hearts and their ECGs to {out / COHORT_FOLDER}", flush=True)
        cohort = plan.write(out, seed)
        print("training the ECG autoencoder", flush=True)
        with one_thread():
            pretrain.train(ecg_recipe(cohort, plan, seed=seed), ecg, resume=True)
        print(f"first pass: {plan.folds + 1} plain U-Nets find the wall", flush=True)
        recipe = demo_recipe(cohort, plan, ecg=ecg / "best", seed=seed)
        labels = first_pass(recipe, *open_split(recipe.data, run), run, jobs=JOBS)
    print("training TAFF-UNet, and TAFF-UNet without time", flush=True)
    other = demo_recipe(cohort, plan, setting="ecg_ap", labels=labels, ecg=ecg / "best", seed=seed)
    run_each(_train, [(recipe, run, command), (other, without_time, command)], JOBS)
    report = run / REPORT
    with noted_results(run):
        bars = draw_time_bars({"with time": [run], "without time": [without_time]}, recipe, run / "figures")
    add_picture(report, bars)
    with one_thread():
        show_audit(report)
    print_results(report)
    return report


def draw_time_bars(
    runs: Mapping[str, Sequence[Path]], recipe: TaffUNetRecipe, figures: Path, name: str = "with_and_without_time"
) -> Picture:
    """Draw the DSC of the scar in each bin of days, for groups of runs, into ``<name>.png``."""
    scores = {
        group: scar_dsc(row for run in some for row in read_case_table(run / "test_cases.csv"))
        for group, some in runs.items()
    }
    days = interval_days(recipe.data.open(), next(iter(scores.values())))
    return draw_interval_bars(days, scores, figures, name=name)


def _train(recipe: TaffUNetRecipe, out: Path, command: Sequence[str]) -> None:
    train(recipe, out, resume=True, command=command)
