"""FIAS from a cohort to a report: the paper's recipe, its scores side by side, and what cannot be trained."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.samples.augmentation_recipe import AugmentationRecipe
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.evaluation.audit import audit_network
from trifuse.architectures.evaluation.audit_report import percent
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.fias.mechanisms import mechanisms
from trifuse.architectures.fias.model import Fias, FiasConfig
from trifuse.architectures.fias.paper import ABLATION, ACDC, SYNAPSE, paper_tables
from trifuse.architectures.fias.report import describe_mechanisms
from trifuse.architectures.fias.train import FiasRecipe, fit_options, layout_defaults
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.architectures.runs.pipeline import train, with_classes
from trifuse.architectures.runs.predict import load_network
from trifuse.architectures.runs.prepared_data import prepare_data
from trifuse.architectures.runs.repeats import train_repeats
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.pretrained import config_to_json
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.training.losses import MutationLoss
from trifuse.kernels import CheckpointError, DataError

WEIGHTS = ("channel", "position")
TINY = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))


def tiny_recipe(cohort: Path, **training) -> FiasRecipe:
    """Return the paper's recipe with a network and slices small enough for a second."""
    recipe = FiasRecipe(network=FiasConfig(variant=TINY, decoder_heads=(2, 2, 2, 2)))
    preprocessing = replace(recipe.data.preprocessing, intensity="as_is", image_size=32)
    data = replace(
        recipe.data,
        root=str(cohort),
        label_space="transunet9",
        slices="foreground",
        preprocessing=preprocessing,
    )
    options = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "device": "cpu", **training}
    return replace(recipe, data=data, training=replace(recipe.training, **options))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("abdomen")
    write_abdomen_phantom(folder, cases=3, size=(48, 48, 12))
    return folder


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(tiny_recipe(cohort), out, command=["trifuse", "train", "fias"]) == out / "report.md"
    return out


def test_defaults_are_the_papers():
    recipe = FiasRecipe()
    training = recipe.training
    assert (training.optimizer, training.lr, training.weight_decay) == ("adam", 1e-4, 1e-4)
    assert (training.schedule, training.warmup_epochs) == ("constant", 0)
    assert (training.batch_size, training.epochs, training.seed) == (2, 300, 2222)
    assert (recipe.data.preprocessing.image_size, recipe.data.augment) == (256, "transunet")
    assert recipe.data.preprocessing == Preprocessing(resize="cubic", channels=1, restore="labels", image_size=256)
    assert (recipe.gamma, recipe.subsets, recipe.reduction) == (0.4, "mutation", "sum")
    assert recipe.network == FiasConfig()


@pytest.mark.parametrize(
    ("layout", "epochs", "intensity"),
    [("synapse", 300, "as_is"), ("acdc", 400, "percentiles"), ("acdc_slices", 400, "percentiles"),
     ("nnunet", 300, "percentiles")],
)  # fmt: skip
def test_a_layout_has_defaults_of_its_own(layout, epochs, intensity):
    defaults = layout_defaults(next(one for one in LAYOUTS if one.name == layout))
    assert layout_defaults(None) == {}
    assert defaults.get("training.epochs", FiasRecipe().training.epochs) == epochs
    assert defaults.get("data.preprocessing.intensity", FiasRecipe().data.preprocessing.intensity) == intensity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"data": FiasRecipe().data.with_preprocessing(image_size=250)}, "multiple of 32, got 250"),
        ({"network": FiasConfig(in_channels=3)}, "channels is 1, but network.in_channels is 3"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FiasRecipe(), **change)


def test_the_loss_is_that_of_the_recipe():
    recipe = replace(FiasRecipe(), gamma=0.3, subsets="last", reduction="mean")
    assert fit_options(None, recipe, None, Path())["loss"] == MutationLoss(0.3, "last", "mean")


def test_any_size_may_be_padded():
    recipe = FiasRecipe()
    assert replace(recipe, network=FiasConfig(pad=True), data=recipe.data.with_preprocessing(image_size=250))


def test_a_run_leaves_a_report_under_two_conventions(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# FIAS (12 channels) on abdomen")
    header = "| Mean ± SD | DSC (strict) | HD95, voxels (strict) | DSC (transunet) | HD95, voxels (transunet) |"
    assert header in report
    for organ in ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"):
        assert f"| {organ} |" in report
    assert "| mean of classes |" in report
    assert f"| Augmentation | {AugmentationRecipe().describe('transunet')} |" in report
    assert report.index("| mean of classes |") < report.index("Paper-reported: Synapse")
    assert "the table" in report  # the paper's own contradictions stay visible
    conventions = [read_case_table(finished / name)[0].conventions
                   for name in ("test_cases.csv", "test_transunet_cases.csv")]  # fmt: skip
    assert conventions == [Conventions("strict").in_voxels(), Conventions("transunet").in_voxels()]
    for name in ("run.json", "split.json", "best/model.safetensors", "figures/test/overlays.png", "test_summary.csv"):
        assert (finished / name).stat().st_size > 0


def test_a_report_says_whether_caf_s_weights_differ_between_images_and_what_a_draw_moves(finished, cohort, tmp_path):
    """What it says is what an audit finds; here of a network with weights so large that it predicts something."""
    assert all(f"CAF's {which} weights: SD over images" in (finished / "report.md").read_text() for which in WEIGHTS)
    recipe = tiny_recipe(cohort)
    data = prepare_data(recipe.data, tmp_path)
    torch.manual_seed(0)
    model = Fias(with_classes(recipe, 9).network).eval()
    with torch.no_grad():
        for layer in (*model.decoder.heads, *(fusion.channel for fusion in model.fusions)):
            layer.weight.normal_()
    facts = describe_mechanisms(model, data, data.split.test)
    asked = [each for each in mechanisms(model) if "fixed" in each.name or "draw" in each.name]
    found = audit_network(model, data.cohort, data.split.test, recipe.data.preprocessing, asked)
    spreads = {spread.name: spread for spread in found.spreads}
    changed = {finding.mechanism.name: percent(finding.moved[0].share.mean) for finding in found.findings}
    for which in WEIGHTS:
        own = [spreads[f"CAF's {which} weights at 1/{4 * 2**level}"] for level in range(4)]
        said = facts[f"CAF's {which} weights: SD over images"]
        assert said.startswith(
            ", ".join(f"{each.sd:.3f}" for each in own) + f", finest level first, over {own[0].images} "
        )
        assert (
            f"fixed at their mean change {changed[f'{which} weights of fusion fixed']} of the voxels of 1 case" in said
        )
    assert f"as in training changes {changed['Monte Carlo draw']} of the voxels" in facts["Monte Carlo attention"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"fusion": "sum"}, {"Monte Carlo attention"}), ({"fusion": "sum", "mixatt": False}, set())],
)
def test_a_report_is_silent_on_what_a_network_has_not(options, said, cohort, tmp_path):
    recipe = tiny_recipe(cohort)
    data = prepare_data(recipe.data, tmp_path)
    model = Fias(replace(recipe.network, **options)).eval()
    assert describe_mechanisms(model, data, data.split.test).keys() == said


def chosen(run: Path) -> tuple[str, str, str]:
    """Return what chose the epoch: as the run describes it, as its weights do, and in the report's words."""
    (line,) = (line for line in (run / "report.md").read_text().splitlines() if line.startswith("| Chosen |"))
    described = json.loads((run / "run.json").read_text())["recipe"]["best_epoch_by"]
    return described, BestEpoch.read(run / "best").metric, line


def test_no_training_case_chooses_the_epoch_of_the_published_split(finished):
    assert json.loads((finished / "split.json").read_text())["val"] == []
    line = "| Chosen | epoch 1 of 1, the last one, whatever its scores; no case validates |"
    assert chosen(finished) == ("last", "last", line)
    assert "the scores are those of the training cases" in (finished / "report.md").read_text()


@pytest.mark.parametrize(
    ("data", "training", "by", "line"),
    [
        ({"val_patients": 1}, {}, "dice", "by Dice on the val cases |"),
        ({}, {"best_epoch_by": "val_dice"}, "dice", "by Dice on the train cases; no case validates |"),
    ],
    ids=["held out", "asked for"],
)
def test_held_out_patients_choose_the_epoch_and_training_cases_where_that_is_asked_for(
    data, training, by, line, cohort, tmp_path
):
    recipe = tiny_recipe(cohort, **training)
    train(replace(recipe, data=replace(recipe.data, **data)), tmp_path / "run")
    described, metric, words = chosen(tmp_path / "run")
    assert (described, metric) == (f"val_{by}", by)
    assert words.endswith(line)
    said = "the scores are those of the training cases" in (tmp_path / "run" / "report.md").read_text()
    assert said == (not data)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == ((1, 1) if data else (2, 0))


def test_nothing_is_in_mm_where_nobody_knows_the_spacing(finished):
    for path in (finished / "report.md", *finished.glob("*.csv")):
        assert not re.search(r"\bmm\b|\bmL\b|_mm|_ml\b", path.read_text()), path.name
    assert "unknown to the files: distances and volumes are in voxels" in (finished / "report.md").read_text()


def test_the_mean_is_over_cases_first_then_over_classes(finished):
    rows = read_case_table(finished / "test_cases.csv")
    names = list(dict.fromkeys(row.class_name for row in rows))
    assert len(names) == 8
    of_class = [[row.scores["dsc"] for row in rows if row.class_name == name] for name in names]
    mean = sum(sum(scores) / len(scores) for scores in of_class) / 8
    (line,) = (
        line
        for line in csv.DictReader((finished / "test_summary.csv").open())
        if (line["class_name"], line["metric"]) == ("mean of classes", "dsc") and "strict" in line["conventions"]
    )
    assert float(line["mean"]) == pytest.approx(mean)


def test_the_run_is_described_and_its_network_comes_back_with_it(finished, tmp_path):
    config = json.loads((finished / "run.json").read_text())["config"]
    assert (config["architecture"], config["network"]["num_classes"]) == ("fias", 9)
    assert (config["gamma"], config["subsets"], config["reduction"]) == (0.4, "mutation", "sum")
    network, data = load_network(finished)
    assert isinstance(network, Fias)
    assert not network.training
    assert (data.preprocessing.image_size, data.preprocessing.intensity, data.preprocessing.restore) == (
        32,
        "as_is",
        "labels",
    )
    assert load_network(finished / "best")[1] == data
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "run.json", tmp_path / "run" / "run.json")
    for name in ("last", "last.old", "best.old"):  # their images are prepared as the run's, too
        folder = shutil.copytree(finished / "best", tmp_path / "run" / name)
        assert load_network(folder)[1] == data
    with contextlib.chdir(folder):
        assert load_network(Path())[1] == data
    (tmp_path / "link").symlink_to(folder)
    assert load_network(tmp_path / "link")[1] == data
    shutil.copytree(finished / "best", tmp_path / "best")
    network, data = load_network(tmp_path / "best")  # without its run
    assert data == FiasRecipe().data
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 9, 32, 32)


def test_a_damaged_run_is_refused(finished, tmp_path):
    (tmp_path / "best").symlink_to(finished / "best")
    for text, said in (("{", "expected JSON"), ('{"config": {"data": {"sizes": 3}}}', "unknown field 'sizes'")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            load_network(tmp_path)


@pytest.mark.parametrize("own", [1, 5])
def test_a_network_of_other_classes_is_refused(own):
    recipe = replace(FiasRecipe(), network=FiasConfig(num_classes=own))
    with pytest.raises(DataError, match=rf"4 with the background.*{own}|{own}.*4 with the background"):
        with_classes(recipe, 4)


def test_the_number_of_classes_follows_the_cohort():
    assert with_classes(FiasRecipe(), 4).network.num_classes == 4
    assert with_classes(replace(FiasRecipe(), network=FiasConfig(num_classes=4)), 4).network.num_classes == 4


def test_the_papers_tables_stand_where_they_can_be_compared():
    assert paper_tables(8) == [SYNAPSE, ABLATION]
    assert paper_tables(3) == [ACDC, ABLATION]
    assert paper_tables(2) == [ABLATION]
    for table in (SYNAPSE, ACDC, ABLATION):
        assert table.title.startswith("Paper-reported")
        assert {len(row) for row in table.rows} == {len(table.header)}
    assert [row[0] for row in SYNAPSE.rows][-1] == "FIAS"
    assert "89.06" in SYNAPSE.note
    assert "caption says ACDC" in ABLATION.note


@pytest.mark.slow
def test_repeats_differ_in_their_seeds_alone(cohort, tmp_path):
    recipe = tiny_recipe(cohort)
    report = train_repeats(recipe, tmp_path / "out", 2)
    runs = [read_record(tmp_path / "out" / f"run_{k}" / "run.json") for k in (1, 2)]
    assert [run["recipe"]["seed"] for run in runs] == [2223, 2224]
    assert [run["config"]["network"]["init_seed"] for run in runs] == [1, 2]
    for run in runs:
        run["recipe"].pop("seed")
        run["config"]["network"].pop("init_seed")
    assert runs[0] == runs[1]
    assert runs[0]["config"]["data"] == config_to_json(recipe.data)
    text = report.read_text()
    assert "mean ± SD over 2 runs of 1 case" in text
    assert "| run_2 | 2224 |" in text
    assert "Paper-reported: Synapse" in text
