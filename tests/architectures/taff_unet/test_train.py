"""TAFF-UNet from a cohort to a report: an oracle is called one, all pictures are there, new images bring their ECG."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.runs.audit import audit_run
from trifuse.architectures.runs.folder import claim_run_folder
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.predict import load_network, predict_images
from trifuse.architectures.runs.recipes import RecipeError
from trifuse.architectures.runs.repeats import train_repeats
from trifuse.architectures.taff_unet.inputs import PriorRecipe
from trifuse.architectures.taff_unet.model import TaffUNet, TaffUNetConfig
from trifuse.architectures.taff_unet.paper import RESULTS
from trifuse.architectures.taff_unet.train import TaffUNetRecipe
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import DataError

PICTURES = (
    "bullseye",
    "lead_attention",
    "temporal_attention",
    "gate_weights",
    "interval_bars",
    "exchange_test",
    "curves",
    "test/overlays",
)


def tiny_recipe(cohort: Path, setting: str = "full", **prior) -> TaffUNetRecipe:
    """Return the paper's recipe with a network and patches small enough for a few seconds."""
    recipe = TaffUNetRecipe(network=TaffUNetConfig(setting=setting, base_dim=4))
    patches = Patches(mirror=False, samples_per_epoch=8)
    data = replace(recipe.data, root=str(cohort)).with_preprocessing(image_size=32, patches=patches)
    training = replace(recipe.training, epochs=1, batch_size=4, device="cpu")
    return replace(recipe, data=data, training=training, prior=PriorRecipe(**prior))


@pytest.fixture(scope="module")
def finished(scar_cohort, tmp_path_factory) -> Path:
    """Return a run with an oracle prior."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["trifuse", "train", "taff_unet"]
    assert train(tiny_recipe(scar_cohort, source="gt"), out, command=words) == out / "report.md"
    return out


def test_defaults_are_the_papers():
    recipe = TaffUNetRecipe()
    training = recipe.training
    assert (training.optimizer, training.lr, training.momentum, training.weight_decay) == ("sgd", 1e-2, 0.99, 3e-5)
    assert (training.schedule, training.epochs, training.batch_size, training.grad_clip) == ("poly", 1000, 12, 12.0)
    assert recipe.data.preprocessing.patches.samples_per_epoch == 250 * training.batch_size
    assert (recipe.data.preprocessing.image_size, recipe.data.augment) == (256, "nnunet")
    assert recipe.data.preprocessing == Preprocessing(intensity="zscore", channels=1, image_size=256, patches=Patches())
    assert recipe.network == TaffUNetConfig()
    assert (recipe.lambda_ecg, recipe.ecg_warmup_epochs, recipe.lambda_entropy) == (1.0, 10.0, 3e-3)
    assert recipe.entropy_sign == "maximise"
    assert recipe.prior.source is None
    assert recipe.prior.folds == 5


def test_the_network_follows_the_size_of_the_patches():
    recipe = TaffUNetRecipe()
    assert replace(recipe, data=recipe.data.with_preprocessing(image_size=128)).network.image_size == 128
    whole = replace(recipe.data.preprocessing, patches=None)
    with pytest.raises(ValueError, match=r"data\.preprocessing\.patches: this network is trained on patches"):
        replace(recipe, data=replace(recipe.data, augment="none", preprocessing=whole))
    with pytest.raises(ValueError, match=r"data\.preprocessing\.channels must be 1, got 3"):
        replace(recipe, data=recipe.data.with_preprocessing(channels=3))


def test_nothing_is_trained_before_the_prior_is_chosen(scar_cohort, tmp_path):
    for train_some in (train, lambda recipe, out: train_repeats(recipe, out, 2)):
        with pytest.raises(RecipeError, match="has no default"):
            train_some(tiny_recipe(scar_cohort), tmp_path / "run")
    with pytest.raises(RecipeError, match="--strict"):
        train(replace(tiny_recipe(scar_cohort, source="gt"), strict=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_e11_an_oracle_is_called_one_in_the_report(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# TAFF-UNet (full, oracle prior) on phantom")
    assert "| Prior | oracle prior: AHA-17 of the reference annotation (an oracle), angles from landmarks |" in report
    assert "### Test cases, per volume (oracle prior)" in report
    assert "## Test cases: predictions beside the truth (oracle prior)" in report
    assert "this network, oracle prior" in (finished / "figures" / "bullseye.csv").read_text()
    assert "this network, oracle prior" in (finished / "figures" / "interval_bars.csv").read_text()
    assert "| Setting | full |" in report
    assert "started from random weights" in report
    assert RESULTS.title in report
    run = json.loads((finished / "run.json").read_text())["config"]
    assert run["prior"]["source"] == "gt"
    assert run["data"]["preprocessing"]["patches"]["spacing_mm"] is not None  # fixed when the run was prepared


def test_every_picture_is_there_with_its_numbers(finished):
    report = (finished / "report.md").read_text()
    for name in PICTURES:
        assert (finished / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report
    burdens = list(csv.DictReader((finished / "figures" / "scar_burden.csv").open()))
    assert [(line["case_id"], line["source"]) for line in burdens] == [
        (case, source) for case in ("case006", "case007") for source in ("truth", "this network, oracle prior")
    ]
    assert float(burdens[0]["segment_1_ml"]) >= 0
    with (finished / "figures" / "gate_weights.csv").open() as lines:
        assert {line["case_id"] for line in csv.DictReader(lines)} == {"case006", "case007"}


def test_an_audit_takes_the_inputs_of_the_training(finished, tmp_path):
    """The prior of a run is found again; what is exchanged changes as in the report's exchange test."""
    report = (finished / "report.md").read_text()
    found = audit_run(finished, out=tmp_path / "out", device="cpu").audit
    assert {each.mechanism.name: each.cases for each in found.findings} == {
        "prior": 2,
        "prior of another case": 2,
        "ECG": 2,
        "ECG of another case": 2,
        "gate at 1/2": 2,
        "gate fixed": 2,
        "time": 2,
        "interval of another case": 2,
    }
    (spread,) = found.spreads
    assert spread.name == "gate weight of the ECG"
    assert re.search(r"## Exchange test: ECG of another case .* %.*; interval of another case .* %", report)
    with (finished / "figures" / "exchange_test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    shares = {row["mechanism"]: float(row["changed"]) for row in rows if row["target"] == "all classes"}
    ours = {each.mechanism.name: each.moved[0].share.mean for each in found.findings}
    assert shares == {name: ours[name] for name in ("ECG of another case", "interval of another case")}


def test_new_images_bring_their_ecg_and_need_labels_for_an_oracle(finished, scar_cohort, tmp_path):
    with pytest.raises(DataError, match=r"--prior-labels(.|\n)*oracle prior"):
        predict_images(finished, scar_cohort, tmp_path / "labels")
    paths = predict_images(finished / "best", scar_cohort, tmp_path / "labels", prior_labels=scar_cohort / "seg")
    assert len(paths) == 7
    written = finished / "predictions" / "test" / "case007.nii.gz"
    assert (tmp_path / "labels" / "case007.nii.gz").read_bytes() == written.read_bytes()


def test_the_loaded_network_is_the_one_that_was_trained(finished):
    network, data = load_network(finished)
    assert isinstance(network, TaffUNet)
    assert network.config.setting == "full"
    assert network.config.num_classes == 4
    assert data.preprocessing.image_size == 32


@pytest.mark.slow
def test_a_predicted_prior_from_its_first_pass_to_new_images(scar_cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort, "ap", source="predicted", folds=2)
    report = train(recipe, tmp_path / "run").read_text()
    assert report.startswith("# TAFF-UNet (ap, predicted prior) on phantom")
    assert "oracle" not in report.split("## What the paper reports")[0]
    assert len(predict_images(tmp_path / "run", scar_cohort, tmp_path / "new")) == 7
    with pytest.raises(DataError, match="--reference orientation"):  # a file alone has no landmarks
        predict_images(tmp_path / "run", scar_cohort / "lge" / "case007.nii.gz", tmp_path / "one")
    assert (tmp_path / "new" / "first_pass" / "case007.nii.gz").exists()


def test_a_run_that_stopped_in_its_first_pass_is_resumed_or_overwritten(tmp_path):
    fold = tmp_path / "run" / "first_pass" / "fold_1"
    fold.mkdir(parents=True)
    (fold / "split.json").write_text("{}")
    with pytest.raises(OutputFolderError, match="pass --resume to continue it"):
        claim_run_folder(tmp_path / "run")
    claim_run_folder(tmp_path / "run", resume=True)
    assert fold.exists()
    claim_run_folder(tmp_path / "run", overwrite=True)
    assert not fold.exists()


@pytest.mark.slow
def test_seeds_reproduce(scar_cohort, tmp_path):
    recipe = tiny_recipe(scar_cohort, "ecg")
    cohort = open_cohort(scar_cohort)
    weights = []
    for seed, name in ((0, "first"), (1, "other"), (0, "again")):
        of_seed = replace(
            recipe, training=replace(recipe.training, seed=seed), network=replace(recipe.network, init_seed=seed)
        )
        train(of_seed, tmp_path / name, parts=("val",))
        weights.append(TaffUNet.from_pretrained(tmp_path / name / "best").state_dict())
    assert cohort.split.val
    first, other, again = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["encoder.stages.0.0.convs.0.conv.weight"], other["encoder.stages.0.0.convs.0.conv.weight"]
    )
