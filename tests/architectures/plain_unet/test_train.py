"""The plain U-Net from a cohort to a report: nnU-Net's recipe, on patches and on whole slices."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decision_rows import decisions_of_report

from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.plain_unet.paper import LEFT_ATRIUM, SCAR, paper_tables
from trifuse.architectures.plain_unet.train import PlainUNetRecipe, fit_options
from trifuse.architectures.runs.pipeline import fit_network, train
from trifuse.architectures.runs.predict import load_network
from trifuse.architectures.runs.prepared_data import prepare_data
from trifuse.architectures.runs.recipes import recipe_from
from trifuse.architectures.runs.repeats import train_repeats
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.training.losses import SegmentationLoss


def tiny_recipe(cohort: Path, *, patches: Patches | None = None, **training) -> PlainUNetRecipe:
    """Return nnU-Net's recipe with a network and slices small enough for a second."""
    recipe = PlainUNetRecipe(network=PlainUNetConfig(base_dim=4))
    split = str(cohort / "split.json")
    preprocessing = replace(recipe.data.preprocessing, image_size=32, patches=patches)
    data = replace(recipe.data, root=str(cohort), split=split, augment="none", preprocessing=preprocessing)
    options = {"epochs": 2, "batch_size": 4, "device": "cpu", **training}
    return replace(recipe, data=data, training=replace(recipe.training, **options))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("atria")
    write_split(folder / "split.json", write_left_atrium_phantom(folder, cases=3, size=(48, 48, 6)))
    return folder


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(tiny_recipe(cohort), out, command=["trifuse", "train", "plain_unet"]) == out / "report.md"
    return out


# ---------------------------------------------------------------------------------------------------------- recipe


def test_defaults_are_nnunets():
    recipe = PlainUNetRecipe()
    training = recipe.training
    assert (training.optimizer, training.lr, training.momentum, training.weight_decay) == ("sgd", 1e-2, 0.99, 3e-5)
    assert (training.schedule, training.epochs, training.batch_size) == ("poly", 1000, 12)
    assert training.grad_clip == 12
    assert (recipe.data.preprocessing.image_size, recipe.data.augment) == (256, "nnunet")
    expected = Preprocessing(intensity="zscore", channels=1, restore="logits", image_size=256, patches=Patches())
    assert recipe.data.preprocessing == expected
    assert recipe.data.preprocessing.patches.samples_per_epoch == 250 * training.batch_size
    assert recipe.batch_dice
    assert (recipe.lambda_dice, recipe.lambda_ce) == (1.0, 1.0)
    assert recipe.network == PlainUNetConfig()


def test_the_network_is_planned_for_the_size_of_the_data():
    recipe = PlainUNetRecipe()
    assert recipe.network.features == (32, 64, 128, 256, 512, 512, 512)
    smaller = replace(recipe, data=recipe.data.with_preprocessing(image_size=96))
    assert smaller.network.features == (32, 64, 128, 256, 512)
    again = replace(smaller, data=recipe.data)
    assert again == recipe
    three = replace(smaller, network=PlainUNetConfig(num_stages=3))
    assert three.network == PlainUNetConfig(num_stages=3, image_size=96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": PlainUNetConfig(in_channels=3)}, "channels is 1, but network.in_channels is 3"),
        ({"data": PlainUNetRecipe().data.with_preprocessing(image_size=250)}, "a multiple of 64.* got 250; use 256"),
        ({"lambda_ce": -1.0}, "lambda_ce must be a finite number, and not negative, got -1.0"),
        ({"lambda_dice": 0.0, "lambda_ce": 0.0}, "lambda_dice and lambda_ce must not all be 0: there would be nothing"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PlainUNetRecipe(), **change)


def test_the_weights_of_the_loss_are_fields():
    settings = ["batch_dice=false", "lambda_dice=2", "lambda_ce=0.5"]
    recipe = recipe_from(PlainUNetRecipe, given={"data.root": "cohort"}, settings=settings)
    loss = fit_options(None, recipe, None, Path())["loss"]
    assert loss == SegmentationLoss(batch_dice=False, w_dice=2.0, w_ce=0.5)
    assert loss.words.startswith("2 Dice (of each sample) + 0.5 cross-entropy")


def test_what_papers_report_stands_where_it_can_be_compared():
    assert [paper_tables(targets) for targets in (1, 2, 3)] == [[LEFT_ATRIUM], [], [SCAR]]
    for table in (LEFT_ATRIUM, SCAR):
        assert table.title.startswith("Paper-reported")
        assert {len(row) for row in table.rows} == {len(table.header)}


# ------------------------------------------------------------------------------------------------------------ runs


def test_a_run_tells_what_of_it_was_compiled(cohort, tmp_path, monkeypatch):
    """Nothing, where there is no compiler."""

    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, options, **rest: compile(run, backend=missing, **rest))
    report = train(tiny_recipe(cohort, epochs=1, compile=True), tmp_path / "run").read_text()
    reason = "BackendCompilerFailed: backend='missing' raised: RuntimeError: no C++ compiler"
    assert f"| Forward pass | all eager from step 1 on, as it could not be compiled: {reason} |" in report
    found = read_record(tmp_path / "run" / "results.json")["compilation"]
    assert found == {"shapes": {}, "surplus_since": None, "eager_since": 1, "reason": reason}


def test_a_run_on_whole_slices_leaves_a_report(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# Plain U-Net (4 channels) on atria")
    assert "Forward pass" not in report
    assert "| Stages | 4, of 4, 8, 16, 32 channels |" in report
    assert "| Loss | 1 Dice (pooled over the batch) + 1 cross-entropy, at all resolutions but the coarsest |" in report
    assert "| left atrium |" in report
    assert "| Mean ± SD | DSC (strict) | IoU (strict) | DSC (nnunet) | IoU (nnunet) |" in report
    assert (
        "* Where both masks are empty, `strict` scores DSC 1 and IoU 1, and `nnunet` leaves DSC and IoU out" in report
    )
    assert report.index("| left atrium |") < report.index("Paper-reported: LAScarQS 2022") < report.index("87.7 ± 2.7")
    for name in ("run.json", "split.json", "best/model.safetensors", "figures/test/overlays.png", "test_cases.csv"):
        assert (finished / name).stat().st_size > 0


def test_a_report_says_what_the_run_settled(finished):
    decided = decisions_of_report((finished / "report.md").read_text())
    assert decided["Slices are seen"] == ["as patches", "whole slices", "**paper**", ""]
    assert decided["Channels of the first stage"][1:3] == ["4", "**paper**, default"]
    assert decided["Learning rate"][1:3] == ["0.01", ""]
    assert decided["Slices are resized by"][1:3] == ["linear", ""]
    assert "Patches per epoch" not in decided


def test_the_run_is_described_and_its_network_comes_back_with_it(finished):
    config = json.loads((finished / "run.json").read_text())["config"]
    assert (config["architecture"], config["batch_dice"], config["data"]["preprocessing"]["patches"]) == (
        "plain_unet",
        True,
        None,
    )
    assert (config["network"]["num_classes"], config["network"]["image_size"]) == (2, 32)
    network, data = load_network(finished)
    assert isinstance(network, PlainUNet)
    assert (data.preprocessing.image_size, data.preprocessing.intensity) == (32, "zscore")
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)


def test_the_best_epoch_is_that_of_the_moving_average(finished):
    rows = list(csv.DictReader((finished / "log.csv").open()))
    first, second = (float(row["val_dice"]) for row in rows)
    smoothed = [float(row["val_dice_smoothed"]) for row in rows]
    assert smoothed == pytest.approx([first, 0.9 * first + 0.1 * second])
    score = json.loads((finished / "best" / "score.json").read_text())
    assert (score["metric"], score["score"]) == ("dice_smoothed", pytest.approx(max(smoothed)))


def test_a_run_on_patches_leaves_a_report(cohort, tmp_path):
    recipe = tiny_recipe(cohort, patches=Patches(samples_per_epoch=8), epochs=1)
    recipe = replace(recipe, data=replace(recipe.data, augment="nnunet"))
    report = train(recipe, tmp_path / "run").read_text()
    assert "| left atrium |" in report
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["training_samples"] == 8
    patches = described["config"]["data"]["preprocessing"]["patches"]
    assert patches["spacing_mm"] == pytest.approx([272 / 48] * 2, rel=1e-3)  # fixed, from the training case
    assert (tmp_path / "run" / "predictions" / "test" / "train_3.nii.gz").stat().st_size > 0


def test_it_learns(cohort, tmp_path):
    """Shown a case again and again, the network finds its atrium."""
    recipe = tiny_recipe(cohort, epochs=25, optimizer="adamw", lr=0.01, schedule="constant")
    data = prepare_data(recipe.data, tmp_path)
    data = replace(data, val_set=data.train_set)
    model = PlainUNet(replace(recipe.network, num_classes=2, num_stages=3))
    fit_network(model, recipe, data, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert max(float(row["val_dice"]) for row in rows) > 0.7
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5


def test_repeats_differ_in_their_seeds_alone(cohort, tmp_path):
    report = train_repeats(tiny_recipe(cohort, epochs=1), tmp_path / "out", 2)
    runs = [read_record(tmp_path / "out" / f"run_{k}" / "run.json") for k in (1, 2)]
    assert [run["recipe"].pop("seed") for run in runs] == [43, 44]
    assert [run["config"]["network"].pop("init_seed") for run in runs] == [1, 2]
    assert runs[0] == runs[1]
    assert "Paper-reported: LAScarQS 2022" in report.read_text()
