"""nnU-Net's raw data sets: whatever its own integrity check finds is found here, and all of it at once."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.open_cohort import layout_of, open_cohort, open_images
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.runs.predict import predict_images
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.storage.config_json import config_to_json
from trifuse.kernels import DataError

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
DESCRIPTION = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


def put_image(path, seed, affine=AFFINE, shape=(5, 4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = new_volume(np.random.default_rng(seed).random(shape, dtype=np.float32), affine)
    write_image(path, volume.voxels, like=volume)


def put_label(path, values=(0, 1, 2), affine=AFFINE, shape=(5, 4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = new_volume(np.resize(np.array(values, np.int16), shape), affine)
    write_labels(path, volume.voxels, like=volume)


def describe(root, **changes):
    """Write ``dataset.json``; a field that is None is left out."""
    values = {name: value for name, value in {**DESCRIPTION, **changes}.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(values))


def fill(root, part="Tr", cases="abc", channels=1):
    for number, case in enumerate(cases):
        for channel in range(channels):
            put_image(root / f"images{part}" / f"{case}_{channel:04d}.nii.gz", seed=[number, channel, *part.encode()])
        put_label(root / f"labels{part}" / f"{case}.nii.gz")


@pytest.fixture
def root(tmp_path):
    fill(tmp_path)
    describe(tmp_path)
    return tmp_path


def messages(root, **options):
    """All errors and warnings of a check."""
    try:
        findings = check_folder(root, "nnunet", **options)
    except DataError as error:
        return str(error)
    return "\n".join(map(str, (*findings.errors, *findings.warnings)))


def finds(root, *words, **options):
    text = messages(root, **options)
    for word in words:
        assert word in text, text


# ------------------------------------------------------------------------------------------------ sound


def test_a_sound_data_set(root):
    assert messages(root) == ""
    cohort = open_cohort(root)
    assert (cohort.layout, cohort.class_names, cohort.split) == ("nnunet", ("background", "liver", "spleen"), None)
    assert [case.case_id for case in cohort.cases] == ["a", "b", "c"]
    _, labels = load_case(cohort, cohort.cases[0])
    assert np.bincount(labels.voxels.ravel()).tolist() == [20, 20, 20]


def test_the_description_or_the_images_are_sign_enough(root):
    (root / "imagesTr").rename(root / "elsewhere")
    assert layout_of(root).name == "nnunet"
    (root / "dataset.json").unlink()
    (root / "elsewhere").rename(root / "imagesTr")
    assert layout_of(root).name == "nnunet"


def test_labels_in_any_order_and_targets_among_them(root):
    describe(root, labels={"spleen": 2, "liver": 1, "background": 0})
    assert open_cohort(root).class_names == ("background", "liver", "spleen")
    cohort = open_cohort(root, targets={"organ": [1, 2]})
    assert np.bincount(load_case(cohort, cohort.cases[0])[1].voxels.ravel()).tolist() == [20, 40]


def test_labelled_test_cases_are_never_trained_on(root):
    fill(root, "Ts", "xyz")
    (root / "labelsTs" / "z.nii.gz").unlink()
    cohort = open_cohort(root)
    assert (cohort.split.train, cohort.split.val, cohort.split.test) == (("a", "b", "c"), (), ("x", "y"))
    assert DataRecipe().choose_split(cohort) == cohort.split
    finds(root, "imagesTs: no labels for z: not part of the cohort")
    fill(root, "Ts", "a")
    finds(root, "case a: expected one of them, got imagesTr and imagesTs")


def test_cases_that_the_description_lists(root):
    listed = {name: {"images": [f"imagesTr/{name}_0000.nii.gz"], "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"}
    describe(root, dataset=listed, numTraining=2)
    assert [case.case_id for case in open_cohort(root).cases] == ["a", "b"]
    describe(root, dataset={**listed, "c": {**listed["b"], "images": ["imagesTr/c_0000.nii.gz"]}}, numTraining=3)
    finds(root, "dataset: expected each file once: an image of one case and channel, got", "b.nii.gz more than once")
    for wrong in ({"images": ["imagesTr/a_0000.nii"]}, {"label": "labelsTr/a.nii"}):
        describe(root, dataset={**listed, "a": {**listed["a"], **wrong}}, numTraining=2)
        finds(root, ".nii: file ending: expected .nii.gz, by dataset.json, got a")
    describe(root, dataset=listed, numTraining=2)
    (root / "labelsTr" / "a.nii.gz").unlink()
    finds(root, "labelsTr/a.nii.gz: label of case a: expected a file")


def test_what_is_ignored_is_said(root):
    describe(root, overwrite_image_reader_writer="SimpleITKIO", description="a note", name="x")
    assert messages(root) == f"{root}: dataset.json: overwrite_image_reader_writer is ignored"


def test_hidden_files_are_no_cases(root):
    for name in ("imagesTr/._a_0000.nii.gz", "labelsTr/._a.nii.gz", "imagesTr/.DS_Store"):
        (root / name).write_bytes(b"left by macOS")
    assert messages(root) == ""


def test_one_of_several_channels(root):
    fill(root, channels=2)
    describe(root, channel_names={"0": "T2", "1": "ADC"})
    with pytest.raises(DataError, match="channel_names: expected one channel, got 2 channels: T2, ADC"):
        open_cohort(root)
    with pytest.raises(DataError, match="channel: expected one of T2, ADC, 0, 1, got CT"):
        open_cohort(root, channel="CT")
    with pytest.raises(DataError, match="channel: expected one of T2, ADC, 0, 1, got 2"):
        open_images(root, channel="2")
    for channel in ("ADC", "1"):
        case = open_cohort(root, channel=channel).cases[0]
        assert case.image.name == "a_0001.nii.gz"
        assert [path.name for path in case.other_channels] == ["a_0000.nii.gz"]
    assert messages(root, channel="T2") == ""
    with pytest.raises(DataError, match="2 channels: T2, ADC"):
        open_images(root)
    assert open_images(root, channel="ADC").cases[0].image.name == "a_0001.nii.gz"


def test_d1_a_case_to_test_on_that_lacks_the_chosen_channel_is_not_scored_on_another(root):
    for part, cases in (("Tr", "abc"), ("Ts", "de")):
        fill(root, part, cases, channels=2)
    describe(root, channel_names={"0": "T2", "1": "ADC"})
    (root / "imagesTs" / "e_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="channels of case e: expected 0000, 0001, got 0000"):
        open_cohort(root, channel="ADC")


@pytest.mark.parametrize(
    ("names", "channel", "meant"),
    [
        (("zscore", "zscore"), "zscore", "got zscore, which may be any of 0 (zscore), 1 (zscore)"),
        (("1", "0"), "1", "got 1, which may be any of 0 (1), 1 (0)"),
    ],
)
def test_d29_a_channel_that_may_be_two_is_refused(root, names, channel, meant):
    fill(root, channels=2)
    describe(root, channel_names=dict(zip("01", names, strict=True)))
    for reader, folder in ((open_cohort, root), (open_images, root), (open_images, root / "imagesTr")):
        with pytest.raises(DataError, match=re.escape(f"channel: expected a name or number of one channel, {meant}")):
            reader(folder, channel=channel)


def test_a_run_on_a_channel_predicts_from_that_channel(root, tmp_path_factory):
    fill(root, cases="a", channels=2)
    for case in "bc":
        for path in root.glob(f"*/{case}*.nii.gz"):
            path.unlink()
    describe(root, channel_names={"0": "T2", "1": "ADC"})
    out = tmp_path_factory.mktemp("run")
    network = PlainUNet(PlainUNetConfig(image_size=8, base_dim=2, num_stages=2))
    network.save_pretrained(out / "best")
    preprocessing = Preprocessing("zscore", channels=1, image_size=8)
    data = DataRecipe(str(root), channel="ADC", preprocessing=preprocessing)
    (out / "run.json").write_text(json.dumps({"config": {"data": config_to_json(data)}}))
    (by_run,) = predict_images(out, root, out / "cohort")
    (by_file,) = predict_images(out, root / "imagesTr" / "a_0001.nii.gz", out / "file")
    assert by_run.read_bytes() == by_file.read_bytes()


# ------------------------------------------------------------------------------------------ D29, at once

MUTATIONS = {  # field: what becomes of it, and what the check then says
    "channel_names": [
        (None, "channel_names: expected one of the required fields"),
        ({}, "channel_names: expected names by number"),
        ({"1": "CT"}, "channel_names: expected names by number"),
        (["CT"], "channel_names: expected names by number"),
        ({"0": "CT", "1": "PET"}, "channels of case b: expected 0000, 0001, got 0000"),
    ],
    "labels": [
        (None, "labels: expected one of the required fields"),
        ([0, 1], "labels: expected values by name"),
        ({"background": 0, "liver": 1, "spleen": 3}, "labels: expected consecutive values, 0 to 2, each once"),
        ({"background": 0, "liver": 1, "spleen": 1}, "labels: expected consecutive values"),
        ({"liver": 1, "spleen": 2}, "labels: background: expected 0, got no such label"),
        ({"background": 1, "liver": 0, "spleen": 2}, "labels: background: expected 0, got 1"),
        ({"background": 0, "both": [1, 2], "spleen": 2}, "labels: both: expected one value: regions"),
        ({"background": 0, "liver": 1.0, "spleen": 2}, "labels: liver: expected an integer, got 1.0"),
        ({"0": "background", "1": "liver"}, "nnU-Net 1 wrote names by value"),
        ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, "labels: ignore: expected no such label"),
    ],
    "numTraining": [
        (None, "numTraining: expected one of the required fields"),
        (7, "numTraining: expected the number of cases, got 7, but 3 cases"),
        ("3", "numTraining: expected the number of training cases, got 3"),
        (True, "numTraining: expected the number of training cases, got True"),
    ],
    "file_ending": [
        (None, "file_ending: expected one of the required fields"),
        (".png", "file_ending: expected .nii.gz or .nii, got .png"),
        (3, "file_ending: expected .nii.gz or .nii, got 3"),
    ],
}


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(kinds) for name, kinds in MUTATIONS.items()}))
def test_d29_every_fault_of_the_description_is_named_at_once(sound_root, mutations):
    describe(sound_root, **{name: value for name, (value, _) in mutations.items()})
    text = messages(sound_root)
    for _, words in mutations.values():
        assert words in text, text
    if not mutations:
        assert text == ""


@pytest.fixture(scope="module")
def sound_root():
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        yield Path(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "dataset.json: JSON: expected valid JSON"),
        ("[]", "dataset.json: JSON: expected an object with fields, got list"),
        (None, "dataset.json: file: expected the description of an nnU-Net data set"),
        ('{"labels": {"background": 0, "a": 1, "a": 2}}', "a: expected one, got 2 fields of that name"),
    ],
)
def test_d29_descriptions_that_are_none(root, text, words):
    (root / "dataset.json").unlink()
    if text is not None:
        (root / "dataset.json").write_text(text)
    finds(root, words)
    with pytest.raises(DataError):
        open_cohort(root)


@pytest.mark.parametrize("files", [None, [], {"images": "a.nii.gz"}, {"images": [], "label": "b"}, {"images": [1]}])
def test_d29_listings_that_make_no_sense(root, files):
    describe(root, dataset={"a": files})
    finds(root, 'dataset: a: expected {"images": [one file per channel], "label": a file}', "got 3, but 0 cases")
    describe(root, dataset=["a"])
    finds(root, "dataset: expected files by case")


@pytest.mark.parametrize(
    "path", ["../a.nii.gz", "/etc/passwd", "imagesTr/../../a.nii.gz", "link/a.nii.gz", "a\0b.nii.gz"]
)
def test_d30_paths_outside_the_data_set(root, tmp_path_factory, path):
    (root / "link").symlink_to(tmp_path_factory.mktemp("outside"))
    for images, label in (([path], "labelsTr/a.nii.gz"), (["imagesTr/a_0000.nii.gz"], path)):
        describe(root, dataset={"a": {"images": images, "label": label}})
        finds(root, f"dataset: a: expected a file below the folder of the data set, got {path}")


@pytest.mark.parametrize("name", ["../../escaped", "/absolute/escaped", "a\\b", "..", "", "a\0b", "a\nb", 250 * "a"])
def test_d30_names_that_would_leave_the_folder_of_results(root, name):
    """A case's results are stored under its name: it has to be one that a file can have."""
    describe(root, dataset={name: {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}})
    finds(root, "case name: expected a name that a file can have", f"got {name!r}")
    with pytest.raises(DataError, match="a name that a file can have"):
        open_images(root)


def test_d1_everything_that_is_wrong_with_the_files(root):
    images, labels = root / "imagesTr", root / "labelsTr"
    (labels / "a.nii.gz").unlink()
    put_image(images / "d_0000.nii.gz", 4)
    (labels / "d.nii.gz").mkdir()
    put_label(labels / "stranger.nii.gz")
    (images / "b_0000.nii").write_bytes(b"")
    (labels / "notes.mha").write_text("")
    (images / "c_000.nii.gz").write_bytes(b"")
    put_image(images / "b_0001.nii.gz", 5)
    words = ["labelsTr/a.nii.gz: label of case a: expected a file, got nothing there"]
    words += ["labelsTr/d.nii.gz: label of case d: expected a file, got a folder"]
    words += ["stranger.nii.gz: label: expected imagesTr/stranger_0000.nii.gz, got no image of that name"]
    words += ["b_0000.nii: file ending: expected .nii.gz, by dataset.json", "notes.mha: file ending"]
    words += [
        "c_000.nii.gz: file name: expected <case>_0000.nii.gz",
        "channels of case b: expected 0000, got 0000, 0001",
    ]
    finds(root, *words)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_missing_folders(root, folder):
    (root / folder).rename(root / "elsewhere")
    finds(root, f"{folder}: folder: expected a folder of files, got nothing there")


def test_everything_that_is_wrong_inside_the_files(root):
    """What nnU-Net checks voxel by voxel: values, NaN, shapes, spacings, affines, of labels and of further channels."""
    fill(root, cases="abcdefgh", channels=2)
    describe(root, channel_names={"0": "T2", "1": "ADC"}, numTraining=8)
    images, labels = root / "imagesTr", root / "labelsTr"
    put_label(labels / "a.nii.gz", values=(0, 1, 2, 7))
    put_label(labels / "b.nii.gz", shape=(5, 4, 2))
    put_label(labels / "c.nii.gz", affine=np.diag([-1.0, -1.0, 3.01, 1.0]))
    moved = AFFINE.copy()
    moved[:3, 3] = 0, 0, 1e-3
    put_label(labels / "d.nii.gz", affine=moved)
    volume = new_volume(np.full((5, 4, 3), np.nan, np.float32), AFFINE)
    write_image(images / "e_0001.nii.gz", volume.voxels, like=volume)
    put_image(images / "f_0001.nii.gz", 1, shape=(5, 4, 4))
    put_image(images / "g_0001.nii.gz", 1, affine=np.diag([-1.0, -1.0, 4.0, 1.0]))
    (images / "h_0000.nii.gz").write_bytes((images / "h_0000.nii.gz").read_bytes()[:-9])
    words = ["labelsTr/a.nii.gz: labels: expected 0, 1 and 2, got value 0", "value 7 in 15 voxels"]
    words += ["labelsTr/b.nii.gz: shape: expected (3, 4, 5)", "labelsTr/c.nii.gz: spacing: expected (3.0, 1.0, 1.0) mm"]
    words += ["labelsTr/d.nii.gz: affine: not quite that of", "e_0001.nii.gz: voxels: expected finite numbers"]
    words += ["f_0001.nii.gz: shape", "g_0001.nii.gz: affine", "h_0000.nii.gz: gzip stream"]
    finds(root, *words, channel="T2")


def test_l8_no_case(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    describe(tmp_path, numTraining=0)
    finds(tmp_path, "0 cases", "imagesTr/<case>_0000.nii.gz", "labelsTr: folder")
