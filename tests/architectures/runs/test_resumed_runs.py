"""Runs that go on: longer, over data that changed, or not at all; each from its cohort to its report."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from children import run_ranks

from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.volumes.nifti import read_image, read_labels, write_image
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs import pipeline
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.repeats import train_repeats
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.record import read_record
from trifuse.architectures.storage.safetensors_file import digest_of_tensors
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import CheckpointError, DataError, TrifuseError

NO_RECORD = "# of which there is no record"


@pytest.fixture
def cohort(tmp_path) -> Path:
    folder = tmp_path / "atria"
    write_split(folder / "split.json", write_left_atrium_phantom(folder, cases=3, size=(48, 48, 6)))
    return folder


def recipe_of(cohort: Path, *, base_dim: int = 4, **training) -> PlainUNetRecipe:
    recipe = PlainUNetRecipe(network=PlainUNetConfig(base_dim=base_dim))
    preprocessing = replace(recipe.data.preprocessing, image_size=32, patches=None)
    split = str(cohort / "split.json")
    data = replace(recipe.data, root=str(cohort), split=split, augment="none", preprocessing=preprocessing)
    options = {"epochs": 1, "batch_size": 4, "device": "cpu", "best_epoch_by": "last", **training}
    return replace(recipe, data=data, training=replace(recipe.training, **options))


def test_t13_a_finished_run_that_is_trained_longer_gets_its_report(cohort, tmp_path):
    out = tmp_path / "run"
    train(recipe_of(cohort), out, parts=("test", "train"))
    report = train(recipe_of(cohort, epochs=2), out, resume=True)
    assert "epoch 2 of 2" in report.read_text()
    weights = digest_of_tensors(PlainUNet.from_pretrained(out / "best").state_dict())
    for part in ("test", "train"):  # what was reported once is not left behind
        assert read_record(out / "predictions" / part / "predictions.json")["weights_sha256"] == weights
    assert read_record(out / "results.json")["parts"] == ["test", "train"]
    assert "Training cases" in report.read_text()
    assert [row["epoch"] for row in read_log(out / "log.csv")] == [1, 2]
    assert read_record(out / "run.json")["recipe"]["epochs"] == 2


def test_the_report_of_a_run_that_was_trained_longer_names_every_command_that_does_it_again(cohort, tmp_path):
    out = tmp_path / "run"

    def again(report: Path) -> str:
        return report.read_text().split("To do it again", 1)[1].split("\n\n## ")[0]

    def command(*words: object) -> list[str]:
        return ["trifuse", "train", "plain_unet", "--data", str(cohort), *map(str, words)]

    first, longer = command("--epochs", 1), command("--resume", "--epochs", 2)
    train(recipe_of(cohort), out, command=first)
    report = train(recipe_of(cohort), out, resume=True, command=command("--resume"))
    once = " (folders are shortened to their names):\n\n```sh\ntrifuse train plain_unet --data atria --resume\n```"
    assert again(report) == once  # its report was made anew, and nothing trained
    with (out / "sessions.jsonl").open("a") as stream:
        stream.write('{"started": "20\n')  # what a kill leaves
    in_order = (
        ", in this order, as its recipe changed on the way (folders are shortened to their names):\n\n```sh\n"
        "trifuse train plain_unet --data atria --epochs 1\n"
        "# after epoch 1: recipe.epochs: 1 -> 2\n"
        "trifuse train plain_unet --data atria --resume --epochs 2\n```"
    )
    for _ in range(2):
        report = train(recipe_of(cohort, epochs=2), out, resume=True, command=longer)
        assert again(report) == in_order
    older = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines() if line.endswith("}")]
    del older[0]["command"]
    (out / "sessions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in older))
    report = train(recipe_of(cohort, epochs=2), out, resume=True, command=longer)
    assert again(report) == in_order.replace("trifuse train plain_unet --data atria --epochs 1", NO_RECORD)


def test_the_report_says_what_auto_became(cohort, tmp_path):
    report = train(recipe_of(cohort), tmp_path / "run").read_text()
    assert re.search(r"\| Precision +\| not said \(trifuse\) +\| auto \(fp32\) +\|", report)
    assert read_record(tmp_path / "run" / "run.json")["recipe"]["precision"] == "fp32"


def test_t14_data_that_changed_between_two_sessions_are_noticed(cohort, tmp_path):
    out = tmp_path / "run"
    recipe = recipe_of(cohort)
    train(recipe, out)
    case = cohort / "train_data" / "train_1" / "enhanced.nii.gz"
    image = read_image(case)
    write_image(case, image.voxels + 1, like=image)
    with pytest.raises(OutputFolderError, match=r"config\.digests\.train_1: '\w+' -> '\w+'\nresume with the old"):
        train(recipe, out, resume=True)
    train(recipe, out, force_resume=True)
    train(recipe, out, resume=True)


def test_t14_the_same_data_may_lie_elsewhere(cohort, tmp_path, monkeypatch):
    """By another path to the same place, or moved: their digests tell. A run without digests does not know."""
    out = tmp_path / "run"
    train(recipe_of(cohort), out)
    monkeypatch.chdir(tmp_path)
    train(recipe_of(Path("atria")), out, resume=True)
    moved = cohort.rename(tmp_path / "moved")
    train(recipe_of(moved, epochs=2), out, resume=True)
    assert read_record(out / "run.json")["config"]["data"]["root"] == str(moved)
    described = read_record(out / "run.json")
    del described["config"]["digests"]
    (out / "run.json").write_text(json.dumps(described))
    with pytest.raises(OutputFolderError, match=r"config\.data\.root: '.*moved' -> '.*further'"):
        train(recipe_of(moved.rename(tmp_path / "further"), epochs=2), out, resume=True)


def test_t14_a_forced_resume_that_fails_leaves_the_run_as_it_was(cohort, tmp_path):
    out = tmp_path / "run"
    train(recipe_of(cohort), out)
    before = (out / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        train(recipe_of(cohort, base_dim=8), out, force_resume=True)
    assert (out / "run.json").read_bytes() == before
    train(recipe_of(cohort), out, resume=True)


def test_t11_a_case_that_one_rank_alone_finds_broken_stops_all_with_its_message(cohort, tmp_path):
    def prepare_data(*arguments, **options):
        raise DataError("train_2", "image", got="an input/output error")

    def work():
        rank = os.environ["RANK"]
        if rank == "1":
            pipeline.prepare_data = prepare_data
        try:
            train(recipe_of(cohort), tmp_path / "run")
        except TrifuseError as error:
            (tmp_path / rank).write_text(str(error))
            raise

    assert run_ranks(work) == [1, 1]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [
        "another rank failed: rank 1: train_2: image: got an input/output error",
        "train_2: image: got an input/output error",
    ]


def test_l16_a_repeated_run_is_kept_only_if_it_was_made_of_these_data(cohort, tmp_path, capsys):
    """Of a test case, too, whose files are in no run.json: the report is made anew."""
    out = tmp_path / "runs"
    train_repeats(recipe_of(cohort), out, 1)
    capsys.readouterr()
    train_repeats(recipe_of(cohort), out, 1, resume=True)
    assert "run_1 has finished, with this recipe and of these data, and is kept" in capsys.readouterr().err
    before = (out / "run_1" / "test_cases.csv").read_text()
    tested = json.loads((cohort / "split.json").read_text())["test"][0]
    label = next((cohort / "train_data" / tested).glob("*atriumSegImgMO*"))
    truth = read_labels(label)
    write_image(label, np.roll(truth.voxels, 5, axis=1), like=truth)
    train_repeats(recipe_of(cohort), out, 1, resume=True)
    assert "is kept" not in capsys.readouterr().err
    assert (out / "run_1" / "test_cases.csv").read_text() != before
    drawn = out / "run_1" / "figures"
    (drawn / "mine.png").write_text("mine")
    names = {path.relative_to(drawn).as_posix() for path in drawn.rglob("*.png")}
    assert set(read_record(out / "run_1" / "results.json")["files"]) >= {
        f"figures/{name}" for name in names - {"mine.png"}
    }
    with pytest.raises(OutputFolderError, match="another configuration"):
        train_repeats(recipe_of(cohort, lr=0.5), out, 1, resume=True)
    train_repeats(recipe_of(cohort), out, 1, resume=True, parts=("test", "train"))
    assert (out / "run_1" / "train_cases.csv").exists()
    split = json.loads((cohort / "split.json").read_text())
    swapped = {**split, "train": [*split["train"][1:], *split["test"]], "test": split["train"][:1]}
    (cohort / "split.json").write_text(json.dumps(swapped))
    for forced in (False, True):
        with pytest.raises(DataError, match="in other parts than when the run began"):
            train_repeats(recipe_of(cohort), out, 2, resume=True, force_resume=forced)
    (cohort / "split.json").write_text(json.dumps(split))
    label = next((cohort / "train_data" / split["train"][0]).glob("*atriumSegImgMO*"))
    write_image(label, np.roll(read_labels(label).voxels, 5, axis=1), like=read_labels(label))
    with pytest.raises(OutputFolderError, match=r"config\.digests\."):
        train_repeats(recipe_of(cohort), out, 2, resume=True)
    assert not (out / "run_2").exists()


def test_a_run_of_an_older_version_gets_digests_with_its_next_checkpoint(cohort, tmp_path):
    out = tmp_path / "run"
    train(recipe_of(cohort), out)
    described = read_record(out / "run.json")
    del described["config"]["digests"]
    (out / "run.json").write_text(json.dumps(described))
    train(recipe_of(cohort), out, resume=True)
    assert read_record(out / "run.json")["config"]["digests"].keys() == {"train_1", "train_2"}
