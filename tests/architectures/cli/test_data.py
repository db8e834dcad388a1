"""What is typed about data: `trifuse data check`, `trifuse data convert`, and the fields of a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.layouts.cohort import Split
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.volumes.nifti import read_image, write_image
from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.runs.prepared_data import prepare_data
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError, recipe_from
from trifuse.kernels import DataError


def run(capsys, *words):
    """Run a command; return its exit code and all that it printed."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_check_asks_for_the_label_space_and_takes_it(tmp_path, put_synapse, capsys):
    put_synapse()
    code, text = run(capsys, "data", "check", tmp_path)
    assert code == 3
    assert "--label-space: expected one of btcv14, transunet9, merit9" in text
    code, text = run(capsys, "data", "check", tmp_path, "--label-space", "merit9")
    assert code == 0, text
    assert "synapse layout, 3 cases, classes background, aorta, gallbladder" in text
    code, text = run(capsys, "data", "check", tmp_path, "--label-space", "btcv14")
    assert (code, text.count("largest label")) == (3, 6)


def test_check_counts_in_grammar_and_needs_a_folder_for_digests(tmp_path, put_case, capsys):
    put_case("a", root=tmp_path / "cohort")
    code, text = run(capsys, "data", "check", tmp_path / "cohort")
    assert (code, "plain layout, 1 case, classes" in text) == (0, True)
    (tmp_path / "cohort" / "images" / "b.nii.gz").write_bytes(b"")
    code, text = run(capsys, "data", "check", tmp_path / "cohort")
    assert (code, "2 cases" in text, "1 error, 0 warnings" in text) == (3, True, True), text
    code, text = run(capsys, "data", "check", tmp_path / "cohort", "--digests", tmp_path / "gone" / "digests.json")
    assert (code, "there is no folder" in text) == (2, True)


def test_check_takes_frames_and_channel(tmp_path, put_synapse, capsys):
    put_synapse()
    for option, value in (("--frames", "ed"), ("--channel", "T2")):
        code, text = run(capsys, "data", "check", tmp_path, "--label-space", "merit9", option, value)
        assert code == 3
        assert f"{option[2:]}: expected none" in text


def test_convert_to_both_layouts_and_back(tmp_path, put_synapse, capsys):
    raw = put_synapse(root=tmp_path / "cohort")
    words = ["data", "convert", tmp_path / "cohort", "--label-space", "transunet9", "--to"]
    code, text = run(capsys, *words, "nnunet", "--out", tmp_path / "nnunet", "--channel-name", "CT")
    assert code == 0, text
    assert "3 cases, of which 1 test" in text
    assert "size of a voxel; 1 x 1 x 1 was written" in text
    assert json.loads((tmp_path / "nnunet" / "dataset.json").read_text())["channel_names"] == {"0": "CT"}
    words = ["data", "convert", tmp_path / "nnunet", "--to", "synapse", "--out", tmp_path / "again"]
    code, text = run(capsys, *words, "--window", 0, 1)
    assert code == 0, text
    assert "label space is transunet9" in text
    with np.load(tmp_path / "again" / "train_npz" / "case0005_slice001.npz") as stored:
        np.testing.assert_array_equal(stored["label"], raw["case0005"][1])
    code, text = run(capsys, *words)
    assert code == 3
    assert "new or an empty folder" in text


def test_convert_replaces_nan_if_asked(tmp_path, put_case, capsys):
    put_case("a", root=tmp_path / "cohort")
    path = tmp_path / "cohort" / "images" / "a.nii.gz"
    image = read_image(path)
    voxels = image.voxels.copy()
    voxels[0, 0, 0] = np.nan
    write_image(path, voxels, like=image)
    words = ["data", "convert", tmp_path / "cohort", "--out", tmp_path / "out", "--to"]
    code, text = run(capsys, *words, "nnunet")
    assert code == 3
    assert "1 NaN or infinite voxels" in text
    assert run(capsys, *words, "nnunet", "--nonfinite", "zero")[0] == 0
    assert read_image(tmp_path / "out" / "imagesTr" / "a_0000.nii.gz").voxels[0, 0, 0] == 0


def test_convert_splits_as_it_is_told(tmp_path, put_case, capsys):
    for name in ("p1", "p2", "q"):
        put_case(name, root=tmp_path / "cohort")
    words = ["data", "convert", tmp_path / "cohort", "--to", "nnunet", "--out"]
    code, text = run(capsys, *words, tmp_path / "a", "--test-cases", "p*", "--patient", "p|q")
    assert (code, "--patient finds them" in text) == (0, True)
    assert open_cohort(tmp_path / "a").split == Split(("q",), (), ("p1", "p2"))
    write_split(tmp_path / "split.json", Split(("p1",), ("p2",), ("q",)))
    assert run(capsys, *words, tmp_path / "b", "--split", tmp_path / "split.json")[0] == 0
    assert open_cohort(tmp_path / "b").split == Split(("p1", "p2"), (), ("q",))
    write_split(tmp_path / "part.json", Split(("p1",), (), ("q",), ("p2",)))
    code, text = run(capsys, *words, tmp_path / "d", "--split", tmp_path / "part.json")
    assert "note: left out, as the split does not use them: p2\n2 cases, of which 1 test" in text
    code, text = run(capsys, *words, tmp_path / "c", "--test-cases", "z*")
    assert code == 3
    assert "0 cases that match 'z*'" in text


def test_d28_a_file_of_the_split_and_patterns_are_not_both_followed(tmp_path, put_case, capsys):
    """The file would win, and cases that were named to test would be trained on."""
    for name in ("a", "b", "c"):
        put_case(name, seed=ord(name), root=tmp_path / "cohort")
    write_split(tmp_path / "split.json", Split(("a",), ("b",), ("c",)))
    given = ["--split", tmp_path / "split.json", "--test-cases", "a"]
    words = ["data", "convert", tmp_path / "cohort", "--to", "nnunet", "--out", tmp_path / "out"]
    code, text = run(capsys, *words, *given)
    assert code == 3
    assert "--split: expected no --test-cases beside it, got 'a'" in text
    data = DataRecipe(str(tmp_path / "cohort"), split=str(tmp_path / "split.json"), val_cases=("a",))
    with pytest.raises(DataError, match="no val_cases beside it, got 'a'"):
        data.choose_split(data.open())


def test_recipes_reach_every_field_of_the_data(tmp_path, put_synapse):
    put_synapse(root=tmp_path / "cohort")
    file = tmp_path / "run.toml"
    file.write_text('[data]\nlabel_space = "transunet9"\n[data.preprocessing]\nresize = "cubic"\nchannels = 1\n')
    settings = ["data.preprocessing.intensity=window", "data.preprocessing.window=[-125, 275]", "data.image_size=14"]
    recipe = recipe_from(DinoUNetRecipe, file, {"data.root": str(tmp_path / "cohort")}, settings)
    assert recipe.data.preprocessing == Preprocessing("window", (-125.0, 275.0), "cubic", 1, image_size=14)
    (tmp_path / "run").mkdir()
    data = prepare_data(recipe.data, tmp_path / "run")
    assert (data.split.train, data.split.val, data.split.test) == (("case0005", "case0010"), (), ("case0008",))
    assert data.train_set[0]["image"].shape == (1, 14, 14)
    assert data.validated_on == "train"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.preprocessing.intensity=wide", "intensity"),
        ("data.preprocessing.channels=2", "channels"),
        ("data.preprocessing.intensity=window", "window: expected its lowest and highest value"),
        ("data.preprocessing.resise=cubic", "did you mean 'resize'"),
        ("data.label_space=btcv", "label_space"),
    ],
)
def test_l2_values_that_make_no_sense(setting, words):
    with pytest.raises(RecipeError, match=words):
        recipe_from(DinoUNetRecipe, None, {"data.root": "cohort"}, [setting])


@dataclass(frozen=True)
class OneChannelRecipe:
    data: DataRecipe = field(
        default_factory=lambda: DataRecipe(preprocessing=Preprocessing("as_is", channels=1, image_size=256))
    )


def test_each_network_has_defaults_of_its_own():
    recipe = recipe_from(OneChannelRecipe, None, {"data.root": "cohort"}, ["data.preprocessing.resize=cubic"])
    preprocessing = Preprocessing("as_is", resize="cubic", channels=1, image_size=256)
    assert recipe.data == DataRecipe("cohort", preprocessing=preprocessing)
