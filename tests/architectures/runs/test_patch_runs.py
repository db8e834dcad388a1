"""Runs on patches: how a recipe asks for them, what is fixed when one is prepared, and what becomes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from trifuse.architectures.data.layouts.split import read_split
from trifuse.architectures.data.samples.patch_dataset import GridPatches, PatchDataset
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.architectures.dino_unet.train import DinoUNetRecipe
from trifuse.architectures.plain_unet.train import PlainUNetRecipe
from trifuse.architectures.runs.folder import SPLIT_FILE
from trifuse.architectures.runs.pipeline import train
from trifuse.architectures.runs.predict import load_network, predict_images
from trifuse.architectures.runs.prepared_data import open_split, prepare_data
from trifuse.architectures.runs.recipes import DataRecipe, RecipeError, recipe_from
from trifuse.architectures.storage.config_json import config_from_json, config_to_json, dataclass_of
from trifuse.kernels import CheckpointError, DataError

ONE_CHANNEL = Preprocessing("zscore", channels=1)


@dataclass(frozen=True)
class Kind:
    """A recipe whose data are whole slices by default."""

    data: DataRecipe = field(default_factory=DataRecipe)
    network: str | Patches = "small"


def recipe(*settings, file=None):
    return recipe_from(Kind, file, {"data.root": "cohort"}, settings)


# ------------------------------------------------------------------------------------------------ words


def test_a_word_about_patches_asks_for_them():
    assert recipe().data.preprocessing.patches is None
    assert recipe("data.patches.mirror=false").data.preprocessing.patches == Patches(mirror=False)
    assert recipe("data.patches.step=1", "data.patches.spacing_mm=[1, 2]").data.preprocessing.patches == Patches(
        (1.0, 2.0), step=1.0
    )
    assert recipe("data.patches={}").data.preprocessing.patches == Patches()
    assert recipe("data.patches.step=1", "data.patches={}").data.preprocessing.patches == Patches(step=1.0)
    assert recipe("data.patches.step=1", "data.patches=null").data.preprocessing.patches is None


def test_sections_of_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[data.patches]\n")
    assert recipe(file=file).data.preprocessing.patches == Patches()
    file.write_text("[data]\naugment = 'nnunet'\n[data.patches]\nforeground = 0.5\n[data.preprocessing]\n")
    assert recipe(file=file).data.preprocessing.patches == Patches(foreground=0.5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.patches.mirrr=false", r"there is no field 'mirrr'; did you mean 'mirror'\?"),
        ("data.patches.step=2", r"field 'patches': patches.step must be in \(0, 1\], got 2.0"),
        ("data.patches.mirror=3", "field 'patches': field 'mirror': expected bool, got 3"),
        ("data.patches=4", "field 'patches': expected"),
        ("data.patchs.step=1", r"there is no section 'patchs'; did you mean 'patches'\?"),
        ("data.root.step=1", "there is no section 'root'"),
        ("network.step=1", "there is no section 'network'"),
        ("data.preprocessing=3", "there is no field 'preprocessing'"),
        (
            "data.augment=nnunet",
            "augment for whole slices: expected one of 'none', 'flip_rot', 'transunet', got 'nnunet'",
        ),
    ],
)
def test_words_that_make_no_sense(setting, message):
    with pytest.raises(RecipeError, match=message):
        recipe(setting)


@pytest.mark.parametrize(
    ("preprocessing", "options", "message"),
    [
        ({}, {"augment": "flip_rot"}, "augment for patches: expected one of 'none', 'nnunet', got 'flip_rot'"),
        ({"resize": "cubic"}, {}, "are for whole slices"),
        ({"restore": "labels"}, {}, "are for whole slices"),
    ],
)
def test_what_patches_do_not_have(preprocessing, options, message):
    with pytest.raises(ValueError, match=message):
        DataRecipe(preprocessing=Preprocessing(patches=Patches(), **preprocessing), **options)
    with pytest.raises(ValueError, match="cache_features needs whole slices"):
        DinoUNetRecipe(DataRecipe(preprocessing=Preprocessing(patches=Patches())), cache_features=True)


def test_patches_come_back_from_json():
    data = DataRecipe(augment="nnunet", preprocessing=Preprocessing(patches=Patches((0.5, 0.75), foreground=0.0)))
    assert config_from_json(DataRecipe, json.loads(json.dumps(config_to_json(data))), "run.json") == data
    with pytest.raises(CheckpointError, match="field 'patches': unknown field 'stepp'"):
        config_from_json(DataRecipe, {"patches": {"stepp": 1}}, "run.json")
    assert dataclass_of(Literal["a"] | None) is None


# --------------------------------------------------------------------------------------------------- data


@pytest.fixture
def data(tmp_path, put_case):
    """Return a recipe of three cases that train, of other spacings each, and one that validates."""
    for name, step in (("a", 1.0), ("b", 1.5), ("c", 4.0), ("v", 9.0)):
        labels = np.zeros((3, 20, 18), np.uint8)
        labels[1, 4:12, 5:11] = 1
        put_case(
            name, labels=labels, shape=(18, 20, 3), affine=np.diag([-step, -2 * step, 30.0, 1.0]), root=tmp_path / "s"
        )
    return DataRecipe(
        root=str(tmp_path / "s"),
        val_cases=("v",),
        augment="nnunet",
        preprocessing=replace(ONE_CHANNEL, image_size=16, patches=Patches(samples_per_epoch=6)),
    )


def test_what_is_left_to_the_cohort_is_fixed_when_a_run_is_prepared(data, tmp_path):
    (tmp_path / "run").mkdir()
    prepared = prepare_data(data, tmp_path / "run")
    assert prepared.recipe == data.with_preprocessing(patches=Patches((3.0, 1.5), samples_per_epoch=6))
    assert isinstance(prepared.train_set, PatchDataset)
    assert isinstance(prepared.val_set, GridPatches)
    assert prepared.train_set[(0, 0, 0)]["image"].shape == (1, 16, 16)
    assert prepared.train_set.case_ids == ("a", "b", "c")
    assert {prepared.val_set[index]["case_id"] for index in range(len(prepared.val_set))} == {"v"}
    assert (len(prepared.train_set), prepared.train_set.len_slices, prepared.side_inputs) == (6, 9, None)
    given = replace(data, augment="none").with_preprocessing(patches=Patches((5.0, 5.0)))
    assert prepare_data(given, tmp_path / "run").recipe == given


def test_the_choice_of_slices_holds_for_patches(data, tmp_path):
    (tmp_path / "run").mkdir()
    prepared = prepare_data(replace(data, slices="foreground"), tmp_path / "run")
    assert {prepared.train_set[(0, 0, index)]["slice"] for index in range(6)} == {1}
    assert {prepared.val_set[index]["slice"] for index in range(len(prepared.val_set))} == {0, 1, 2}
    labelled = prepare_data(replace(data, slices="labelled"), tmp_path / "run").val_set
    assert {labelled[index]["slice"] for index in range(len(labelled))} == {1}


class TakesExtras(nn.Module):
    """See class 1 where the prior has a segment, if an interval says so."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, image, prior, interval):
        seen = prior.sum(1, keepdim=True) * (interval == 7)[:, None, None, None] * self.one
        return torch.cat([0.5 - seen, seen - 0.5], dim=1)


def test_extras_reach_samples_and_validation(data, tmp_path):
    (tmp_path / "run").mkdir()
    cohort, split = open_split(data, tmp_path / "run")
    side_inputs = {
        case.case_id: SideInputs(read_image(case.label).voxels.astype(np.uint8), {"interval": torch.tensor(7.0)})
        for case in cohort.cases
    }
    prepared = prepare_data(data, tmp_path / "run", side_inputs=side_inputs)
    assert prepared.split == split == read_split(tmp_path / "run" / SPLIT_FILE, cohort)
    sample = prepared.train_set[(0, 0, 0)]
    assert sample["prior"].shape == (17, 16, 16)
    assert sample["interval"] == 7
    assert prepared.validation(2)(TakesExtras())["dice"] > 0.95  # labels are resampled otherwise than priors
    wrong = {name: replace(one, constants={"interval": torch.tensor(8.0)}) for name, one in side_inputs.items()}
    assert prepare_data(data, tmp_path / "run", side_inputs=wrong).validation(2)(TakesExtras())["dice"] == 0
    with pytest.raises(DataError, match="b: side_inputs"):
        prepare_data(data, tmp_path / "run", side_inputs={"a": side_inputs["a"]})
    whole = replace(data.preprocessing, patches=None)
    with pytest.raises(ValueError, match="side_inputs: expected none for whole slices"):
        prepare_data(replace(data, augment="none", preprocessing=whole), tmp_path / "run", side_inputs=side_inputs)


# --------------------------------------------------------------------------------------------------- runs


def test_a_run_on_patches_predicts_as_it_was_trained(data, tmp_path):
    out = tmp_path / "run"
    wanted = PlainUNetRecipe(data)
    wanted = replace(
        wanted,
        network=replace(wanted.network, base_dim=2),
        training=replace(wanted.training, epochs=1, batch_size=3, device="cpu"),
    )
    report = train(wanted, out).read_text()
    assert "9 to train on, of pixels of 3 x 1.5 mm, seen in 6 patches of 16x16 pixels an epoch" in report
    assert load_network(out)[1].preprocessing.patches == Patches((3.0, 1.5), samples_per_epoch=6)
    by_run = read_image(out / "predictions" / "val" / "v.nii.gz")
    (path,) = predict_images(out, tmp_path / "s" / "images" / "v.nii.gz", tmp_path / "p")
    np.testing.assert_array_equal(read_image(path).voxels, by_run.voxels)
    assert json.loads((tmp_path / "p" / "predictions.json").read_text())["preprocessing"]["patches"]["spacing_mm"] == [
        3.0,
        1.5,
    ]
    assert train(wanted, out, resume=True) is not None, "the recipe is the run's, though that has a spacing"
