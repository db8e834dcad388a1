"""The first pass: plain U-Nets find the wall, so that the prior of no case need come from its reference annotation.

    <run>/first_pass/fold_<n>/   trained on all training cases but those that it predicts
    <run>/first_pass/network/    trained on all training cases; predicts all other cases, and those to come
    <run>/first_pass/labels/     one label map for each case of the split

The run's validation cases choose the best epoch of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.data.volumes.nifti import read_labels
from trifuse.architectures.evaluation.memory_need import batch_sizes_within
from trifuse.architectures.evaluation.predict import NotPredicted, predict_cases
from trifuse.architectures.evaluation.prediction_folder import made_of_these_images
from trifuse.architectures.evaluation.scoring import prediction_path
from trifuse.architectures.runs.folder import FIRST_PASS_FOLDER, is_main_process
from trifuse.architectures.runs.parallel import run_each
from trifuse.architectures.runs.pipeline import fit_network
from trifuse.architectures.runs.predict import load_network
from trifuse.architectures.runs.prepared_data import prepare_data
from trifuse.architectures.runs.registry import experiment
from trifuse.architectures.storage.atomic_files import atomic_write
from trifuse.architectures.storage.text import natural_key
from trifuse.architectures.training.distributed import open_world
from trifuse.kernels import DataError

from .inputs import PriorRecipe

NETWORK = "network"
LABELS = "labels"
PREDICTIONS = "predictions"


def first_pass(
    recipe: Any, cohort: Cohort, split: Split, out: Path, jobs: int = 1, *, force_resume: bool = False
) -> Path:
    """Train the first pass of a run, or what is left of it, and return the folder of its label maps.

    A network whose label maps are there, as it wrote them, of the images that there are now, is not asked again.

    Args:
        recipe: of the run; the first pass takes its data, training, width and ``prior.folds``.
        cohort: where the cases are.
        split: of the run; no test case is trained on, no training case predicted by a network that has seen it.
        out: the run's folder.
        jobs: trainings at a time; more than one are each on one thread, in processes of their own.
        force_resume: go on with networks that were begun under another recipe or with other data.

    Raises:
        DataError, CheckpointError, NumericError, Interrupted: see `fit` and `predict_cases`.
    """
    folder = out / FIRST_PASS_FOLDER
    labels = folder / LABELS
    left = [
        (recipe, part, predicted, folder / name, labels, force_resume)
        for name, part, predicted in first_pass_splits(cohort, split, recipe.prior.folds, recipe.training.seed)
        if not all(_is_whole(prediction_path(labels, case_id)) for case_id in predicted)
        or not made_of_these_images(folder / name / PREDICTIONS, labels, cohort, predicted, recipe.data.preprocessing)
    ]
    if jobs > 1:
        run_each(_train_and_predict, left, jobs)
    else:
        for arguments in left:
            _train_and_predict(*arguments)
    return labels


def first_pass_splits(
    cohort: Cohort, split: Split, folds: int, seed: int
) -> Iterator[tuple[str, Split, tuple[str, ...]]]:
    """Yield name, split and the cases to predict of each network; a patient's cases are never in two folds."""
    patients = sorted({cohort.case(case_id).patient for case_id in split.train}, key=natural_key)
    order = np.random.default_rng(seed).permutation(len(patients))
    for number, part in enumerate(np.array_split(order, min(folds, len(patients))), start=1):
        left_out = {patients[index] for index in part}
        held = tuple(case_id for case_id in split.train if cohort.case(case_id).patient in left_out)
        rest = tuple(case_id for case_id in split.train if cohort.case(case_id).patient not in left_out)
        yield f"fold_{number}", replace(split, train=rest, test=held, unused=(*split.unused, *split.test)), held
    yield NETWORK, split, (*split.val, *split.test)


def _train_and_predict(
    recipe: Any, split: Split, predicted: Sequence[str], run: Path, labels: Path, force_resume: bool
) -> None:
    plain = experiment("plain_unet")
    network = plain.load(plain.network)
    config = recipe.network
    with open_world(recipe.training.device) as world:
        epochs = recipe.prior.first_pass_epochs or recipe.training.epochs
        first = plain.load(plain.recipe)(
            data=recipe.data,
            network=network.config_type(
                num_classes=config.num_classes,
                image_size=config.image_size,
                base_dim=config.base_dim,
                max_dim=config.max_dim,
                init_seed=config.init_seed,
            ),
            training=replace(recipe.training, epochs=epochs, init=None, reset_head=False),
        )
        with world.raise_on_any_rank():
            data = prepare_data(first.data, run, split=split)
            model = network(first.network)
        fit_network(model, first, data, run, resume=True, force_resume=force_resume)
        with world.raise_on_any_rank():
            if is_main_process() and predicted:
                best = network.from_pretrained(run / "best").to(world.device)
                for case_id in predicted:
                    if not _is_whole(path := prediction_path(run / PREDICTIONS, case_id)):
                        path.unlink(missing_ok=True)
                paths = predict_cases(
                    best,
                    data.cohort,
                    predicted,
                    run / PREDICTIONS,
                    data.recipe.preprocessing,
                    replace=True,  # the folder is the run's own, and the network may have been trained further
                )
                labels.mkdir(exist_ok=True)
                for path in paths:
                    with atomic_write(labels / path.name) as stream:
                        stream.write(path.read_bytes())


def _is_whole(path: Path) -> bool:
    """Tell whether a label map is there and undamaged, by the checksum of its compression."""
    try:
        read_labels(path)
    except DataError:
        return False
    return True


def first_pass_labels(run: Path, prior: PriorRecipe) -> Path:
    """Return the folder of the label maps that a predicted prior was built from."""
    return run / FIRST_PASS_FOLDER / LABELS if prior.labels is None else Path(prior.labels)


def predict_first_pass(
    run: Path | None,
    cohort: Cohort,
    out: Path,
    prior: PriorRecipe,
    batch_size: int,
    *,
    max_ram: int | None = None,
    broken: dict[str, DataError] | None = None,
) -> Path:
    """Predict the wall of new images by the network of a run's first pass; return the folder of the label maps.

    What is wrong with images that cannot be predicted is taken up by ``broken``, if that is given.

    Raises:
        DataError: the run's prior is an oracle, or it has no first pass of its own, or ``max_ram`` bytes are too few;
            see `predict_cases`.
    """
    want = "--prior-labels, a folder of label maps <case>.nii.gz to build the prior from"
    if prior.source == "gt":
        raise DataError(run or out, "prior", got="a network that was trained with an oracle prior", want=want)
    network = None if run is None else run / FIRST_PASS_FOLDER / NETWORK
    if network is None or not (network / "best").is_dir():
        raise DataError(run or out, "prior", got="no first pass to predict the wall by", want=want)
    model, data = load_network(network)
    case_ids = [case.case_id for case in cohort.cases]
    sizes = batch_sizes_within(max_ram, model, cohort.cases, data.preprocessing, batch_size)
    try:
        predict_cases(model, cohort, case_ids, out, data.preprocessing, batch_size=sizes)
    except NotPredicted as error:
        if broken is None:
            raise
        broken.update(error.by_case)
    return out
