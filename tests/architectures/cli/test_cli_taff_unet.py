"""Scar segmentation on the command line: its trainings, its pictures, and what it says to wrong words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trifuse.architectures.cli.arguments import DEFAULTS, REFERENCES
from trifuse.architectures.cli.arguments import SETTINGS as SETTING_WORDS
from trifuse.architectures.cli.main import main
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.taff_unet import EcgAutoencoder
from trifuse.architectures.taff_unet.aha17_angles import Reference
from trifuse.architectures.taff_unet.model import SETTINGS
from trifuse.architectures.taff_unet.pretrain import EcgRecipe
from trifuse.architectures.taff_unet.train import TaffUNetRecipe
from trifuse.kernels import DataError

TINY = [
    *("--image-size", "32", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--set", "network.base_dim=4"),
    *("--set", "data.patches.samples_per_epoch=8", "--set", "data.patches.mirror=false"),
]


def run_main(words: list[object], capsys) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def plain(scar_cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert main(["train", "plain_unet", str(scar_cohort), "--out", str(out), *TINY]) == 0
    return out


def test_the_words_of_the_command_repeat_the_code():
    assert set(SETTING_WORDS) == set(SETTINGS)
    assert set(REFERENCES) == set(Reference.__args__)
    for network, kind in (("plain_unet", PlainUNetRecipe), ("taff_unet", TaffUNetRecipe)):
        said, recipe = DEFAULTS[network], kind()
        assert (said["image_size"], said["augment"]) == (str(recipe.data.preprocessing.image_size), recipe.data.augment)
        for field in ("epochs", "batch_size", "lr", "seed"):
            assert said[field] == str(getattr(recipe.training, field))


def test_plain_unet_from_a_cohort_to_a_report_and_to_new_images(plain, scar_cohort, tmp_path, capsys):
    assert (plain / "report.md").read_text().startswith("# ")
    run = json.loads((plain / "run.json").read_text())["config"]
    assert run["network"]["image_size"] == run["data"]["preprocessing"]["image_size"] == 32
    assert {row.class_name for row in read_case_table(plain / "test_cases.csv")} >= {"scar", "blood pool"}
    network = shutil.copytree(plain / "best", tmp_path / "network")  # as a converted one: nobody knows its spacing
    words = ["predict", network, scar_cohort, "--out", tmp_path / "labels"]
    code, _, errors = run_main(words, capsys)
    assert code == 4
    assert "--spacing 1.25 1.25" in errors
    spacing = run["data"]["preprocessing"]["patches"]["spacing_mm"]
    assert run_main([*words, "--spacing", *spacing], capsys)[0] == 0
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 7
    code, _, errors = run_main(["predict", plain, scar_cohort, "--out", tmp_path / "x", "--spacing", 1, 1], capsys)
    assert code == 4
    assert "leave the spacing to it" in errors


def test_prior_labels_are_for_networks_with_a_prior(plain, scar_cohort, tmp_path, capsys):
    words = ["predict", plain, scar_cohort, "--out", tmp_path / "labels", "--prior-labels", scar_cohort / "seg"]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "expected a network that takes a prior, got plain_unet" in errors


def test_several_networks_in_one_picture(plain, scar_cohort, tmp_path, capsys):
    other = tmp_path / "baseline"
    words = ["train", "taff_unet", scar_cohort, "--setting", "baseline", "--out", other, *TINY]
    assert run_main(words, capsys)[0] == 0
    code, output, _ = run_main(["compare", "--overlay", plain, other, "--out", tmp_path / "sheet"], capsys)
    assert code == 0
    assert (tmp_path / "sheet" / "model_overlays.png").exists()
    assert "model_overlays.png" in output
    assert run_main(["compare", plain, other], capsys)[0] == 0  # the paired test
    for wrong, message in (
        (["compare", plain], "expected two runs to compare"),
        (["compare", plain, other, plain], "expected two runs to compare"),
        (["compare", "--overlay", plain, other], "say with --out which folder"),
    ):
        code, _, errors = run_main(wrong, capsys)
        assert code == 2
        assert message in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prior.source: setting 'full' takes the AHA-17 prior"),
        (["--prior", "gt", "--strict"], "refused because of --strict"),
        (["--prior", "oracle"], "invalid choice: 'oracle'"),
        (["--setting", "ecgap", "--prior", "gt"], "invalid choice: 'ecgap'"),
        (["--prior", "gt", "--variant", "tiny"], "unrecognized arguments: --variant"),
        (["--prior", "gt", "--set", "prior.fold=3"], "did you mean 'folds'?"),
    ],
)
def test_l1_l2_wrong_words_are_named(words, message, capsys, scar_cohort, tmp_path):
    code, _, errors = run_main(["train", "taff_unet", scar_cohort, "--out", tmp_path / "run", *words], capsys)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_is_trained_on_a_cohort_and_starts_the_network(scar_cohort, tmp_path, capsys, monkeypatch):
    words = ["train", "ecg", "--cohort", scar_cohort, "--out", tmp_path / "ecg", "--epochs", 2, "--batch-size", 4]
    assert run_main(words, capsys)[0] == 0
    run = json.loads((tmp_path / "ecg" / "run.json").read_text())
    assert run["recipe"]["lr"] == 1e-4  # fine-tuning is slower
    assert EcgAutoencoder.from_pretrained(tmp_path / "ecg" / "best").config == EcgRecipe().network
    recipes = []
    monkeypatch.setattr("trifuse.architectures.taff_unet.train.train", lambda recipe, out, **_: recipes.append(recipe))
    words = ["train", "taff_unet", scar_cohort, "--ecg", tmp_path / "ecg" / "best", "--prior", "gt", "--out", tmp_path]
    assert run_main(words, capsys)[0] == 0
    assert recipes[0].network.ecg_checkpoint == str(tmp_path / "ecg" / "best")
    assert recipes[0].prior.source == "gt"


def test_further_folders_of_records_train_too(scar_cohort, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        "trifuse.architectures.taff_unet.pretrain.train", lambda recipe, *_, **__: recipes.append(recipe)
    )
    folder = scar_cohort / "ecg"
    assert main(["train", "ecg", str(folder), "--also", str(folder), str(folder), "--out", str(tmp_path)]) == 0
    assert recipes[0].data.root == str(folder)
    assert recipes[0].data.also == (str(folder), str(folder))


def test_train_ecg_wants_one_source(scar_cohort, tmp_path, capsys):
    for sources in ([], [scar_cohort, "--cohort", scar_cohort]):
        assert run_main(["train", "ecg", *sources, "--out", tmp_path / "run"], capsys)[0] == 2


def test_pictures_of_an_ecg_and_of_the_heart(scar_cohort, tmp_path, capsys):
    code, output, _ = run_main(["plot", "ecg", scar_cohort / "ecg" / "case003.npz", "--out", tmp_path], capsys)
    assert code == 0
    assert (tmp_path / "case003.png").exists()
    truth = scar_cohort / "seg" / "case001.nii.gz"
    words = ["plot", "bullseye", truth, truth, "--reference", "orientation", "--out", tmp_path]
    code, output, _ = run_main(words, capsys)
    assert code == 0
    assert (tmp_path / "bullseye.png").exists()
    assert "note: " in output
    words = ["plot", "bullseye", truth, "--reference", "fixed_angle", "--angle", 30, "--of", "wall", "--out", tmp_path]
    assert run_main(words, capsys)[0] == 0
    assert run_main(["plot", "bullseye", truth, "--out", tmp_path], capsys)[0] == 2


def test_e9_intervals_are_checked_and_may_be_allowed(scar_cohort, tmp_path, capsys):
    words = ["data", "check", scar_cohort, "--max-interval", 30]
    code, output, _ = run_main(words, capsys)
    assert code == 3
    assert "[0, 30] days" in output
    assert run_main(["data", "check", scar_cohort], capsys)[0] == 0
    recipe = DataRecipe(root=str(scar_cohort), max_interval_days=30.0)
    with pytest.raises(DataError, match=r"\[0, 30\] days"):
        recipe.open()


def test_volume_differences_are_stated_as_asked(plain, scar_cohort, tmp_path, capsys):
    words = ["evaluate", plain / "predictions" / "test", scar_cohort, "--cases", "case006", "case007"]
    assert run_main([*words, "--out", tmp_path / "a.csv", "--volume", "signed"], capsys)[0] == 0
    assert run_main([*words, "--out", tmp_path / "b.csv", "--volume", "relative"], capsys)[0] == 0
    assert "volume_difference_ml" in (tmp_path / "a.csv").read_text()
    assert "volume_difference_relative" in (tmp_path / "b.csv").read_text()


def test_e6_every_ecg_of_a_folder_is_looked_at(scar_cohort, tmp_path, capsys):
    folder = shutil.copytree(scar_cohort / "ecg", tmp_path / "ecg")
    code, output, _ = run_main(["data", "check-ecg", folder], capsys)
    assert code in (0, 3)
    (folder / "broken.npy").write_bytes(b"no array")
    code, output, _ = run_main(["data", "check-ecg", folder], capsys)
    assert code == 3
    assert "broken.npy: error: " in output


@pytest.mark.parametrize(("network", "millions"), [("taff_unet", "34,815,052"), ("plain_unet", "33,474,840")])
def test_doctor_counts_the_networks(network, millions, capsys):
    code, output, _ = run_main(["doctor", "--model", network], capsys)
    assert code == 0
    assert millions in output
