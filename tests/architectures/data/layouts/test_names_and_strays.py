"""Names in either form of their accents are one name, in every layout; and what lies beside images is no image."""

from __future__ import annotations

import json
import unicodedata

import pytest
from refused_cohort import refused

from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images
from trifuse.architectures.data.layouts.split import read_split
from trifuse.architectures.data.volumes.files import nifti_named
from trifuse.architectures.evaluation.scoring import prediction_path
from trifuse.architectures.runs.recipes import DataRecipe, matching_cases
from trifuse.architectures.storage.file_names import can_name_files, path_below

NAME = "Müller_é"
FORMS = [unicodedata.normalize(form, NAME) for form in ("NFC", "NFD")]
PAIRS = [(one, other) for one in FORMS for other in FORMS]
STRAYS = ["c.json", "Thumbs.db", "desktop.ini", ".DS_Store", "._c.nii.gz", "c.bval", "notes.txt", "c.nii.gz.md5"]


def put(root, *files):
    """Make files that hold their own name: which there are is all that opening a cohort looks at."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)


def describe(root, cases, **fields):
    labels = {"background": 0, "organ": 1}
    values = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz", **fields}
    (root / "dataset.json").write_text(json.dumps(values))


def put_plain(root, image, label):
    put(root, f"images/{image}.nii.gz", f"labels/{label}.nii.gz")


def put_nnunet(root, image, label):
    put(root, f"imagesTr/{image}_0000.nii.gz", f"labelsTr/{label}.nii.gz")
    describe(root, cases=1)


def put_nnunet_list(root, image, label):
    """The description names both files in one form, whatever they are stored in."""
    put_nnunet(root, image, label)
    listed = {"images": [f"imagesTr/{NAME}_0000.nii.gz"], "label": f"labelsTr/{NAME}.nii.gz"}
    describe(root, cases=1, dataset={NAME: listed})


def put_synapse(root, image, listed):
    put(root, f"train_npz/{image}_slice000.npz", f"test_vol_h5/{image}.npy.h5")
    (root / "test_vol_h5" / f"{image}.npy.h5").rename(root / "test_vol_h5" / "other.npy.h5")
    put(root, "lists_Synapse/train.txt")
    (root / "lists_Synapse" / "train.txt").write_text(f"{listed}_slice000\n")


def put_acdc(root, folder, file):
    frames = [f"{folder}/{file}_frame{frame:02d}{gt}.nii.gz" for frame in (1, 9) for gt in ("", "_gt")]
    put(root, f"{folder}/Info.cfg", *frames)
    (root / folder / "Info.cfg").write_text("ED: 1\nES: 9\n")


def put_table(root, stored, listed):
    put(root, f"lge/{stored}/image.nii", "cases.csv")
    (root / "cases.csv").write_text(f"case_id,lge_path,split\n{listed},lge/{listed}/image.nii,train\n")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("put_cohort", [put_plain, put_nnunet, put_nnunet_list, put_synapse, put_acdc, put_table])
def test_d27_one_name_in_two_forms(put_cohort, pair, tmp_path):
    put_cohort(tmp_path, *pair)
    options = {"label_space": "btcv14"} if put_cohort is put_synapse else {}
    cohort = open_cohort(tmp_path, **options)
    ids = [case.case_id for case in cohort.cases]
    assert FORMS[0] in ids or ids == [f"{FORMS[0]}_frame01", f"{FORMS[0]}_frame09"]
    assert all(case.image.is_file() and (case.label is None or case.label.is_file()) for case in cohort.cases)
    assert {case.patient for case in cohort.cases} <= {FORMS[0], "other"}
    assert cohort.split is None or {*cohort.split.train, *cohort.split.test} == {*ids}
    apart = any(not unicodedata.is_normalized("NFC", path.name) for path in tmp_path.rglob("*"))
    said = any("accents stored apart" in note for note in cohort.notes)
    assert said == apart or put_cohort is put_table, "in a table it is the table that counts"


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("said", FORMS)
def test_d27_names_that_are_said_elsewhere(stored, said, tmp_path):
    """In a split, in a pattern of the command, in a table, and in a folder of predictions."""
    put_plain(tmp_path, stored, stored)
    put_plain(tmp_path, "b", "b")
    cohort = open_cohort(tmp_path)
    (tmp_path / "split.json").write_text(json.dumps({"train": ["b"], "val": [], "test": [said]}, ensure_ascii=False))
    assert read_split(tmp_path / "split.json", cohort).test == (FORMS[0],)
    assert DataRecipe(root=str(tmp_path), test_cases=(said,)).choose_split(cohort).test == (FORMS[0],)
    assert matching_cases(cohort, [FORMS[0], "b"], [f"{said[:4]}*"]) == (FORMS[0],)
    assert path_below(tmp_path, f"images/{said}.nii.gz").is_file()
    put(tmp_path, f"predictions/{stored}.nii.gz")
    assert prediction_path(tmp_path / "predictions", said).is_file()


@pytest.mark.parametrize("put_cohort", [put_plain, put_nnunet])
def test_d27_both_forms_in_one_folder(put_cohort, tmp_path):
    put_cohort(tmp_path, *FORMS)
    put_cohort(tmp_path, *FORMS[::-1])
    refused(tmp_path, "name 'Müller_é", "how accents are stored")


@pytest.mark.parametrize(("letter", "longest"), [("a", 240), ("é", 120)])
def test_d30_the_length_of_a_name_is_that_of_its_bytes(letter, longest):
    assert can_name_files(letter * longest)
    assert not can_name_files(letter * (longest + 1))


@pytest.mark.parametrize("name", ["case[1]", "[abc]", "a*b", "what?"])
def test_a_name_that_could_be_a_pattern_is_a_name_first(name, tmp_path):
    for case in (name, "a", "case1", "axb", "whats"):
        put_plain(tmp_path, case, case)
    cohort = open_cohort(tmp_path)
    names = [case.case_id for case in cohort.cases]
    assert matching_cases(cohort, names, [name]) == (name,)
    assert DataRecipe(root=str(tmp_path), test_cases=(name,)).choose_split(cohort).test == (name,)


@pytest.mark.parametrize("stray", STRAYS)
def test_d39_strays_beside_images(stray, tmp_path):
    nnunet, plain, acdc = (tmp_path / name for name in ("nnunet", "plain", "acdc"))
    put_nnunet(nnunet, "c", "c")
    put_plain(plain, "c", "c")
    put_acdc(acdc, "c", "c")
    for folder in (nnunet / "imagesTr", nnunet / "labelsTr", plain / "images", plain / "labels", acdc / "c"):
        put(folder, stray)
    for root in (nnunet, plain, acdc):
        assert {case.patient for case in open_cohort(root).cases} == {"c"}
    said = [note for note in open_cohort(nnunet).notes if stray in note]
    assert len(said) == (0 if stray.startswith(".") else 2), "one note for each folder, none of hidden files"
    assert len(open_images(plain / "images").cases) == 1


def test_d39_strays_are_counted_in_one_note(tmp_path):
    put_nnunet(tmp_path, "c", "c")
    put(tmp_path, *(f"imagesTr/c{number}.json" for number in range(30)))
    (note,) = open_cohort(tmp_path).notes
    assert note.startswith("imagesTr: 30 files left out")
    assert note.endswith("and 20 more")


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii", ".png", ".npz", ".dcm"])
def test_d29_images_of_another_ending_are_no_strays(ending, tmp_path):
    put_nnunet(tmp_path, "c", "c")
    put(tmp_path, f"imagesTr/d_0000{ending}")
    refused(tmp_path, f"d_0000{ending}: file ending: expected .nii.gz")


# ------------------------------------------------------------------------------- ACDC as people unpack it


@pytest.mark.parametrize("above", ["", "training", "database/training", "ACDC/database", "ACDC_challenge"])
@pytest.mark.parametrize("file", ["{}.nii.gz", "{}.nii", "{0}.nii/{0}.nii", "{0}.nii.gz/{0}.nii"])
def test_d42_acdc_as_it_is_unpacked(above, file, tmp_path):
    for patient in ("patient001", "patient002"):
        names = [f"{patient}_frame{frame:02d}{gt}" for frame in (1, 12) for gt in ("", "_gt")]
        put(tmp_path / above / patient, "Info.cfg", f"{patient}_4d.nii", *map(file.format, names))
        (tmp_path / above / patient / "Info.cfg").write_bytes(b"\xef\xbb\xbfED: 1\r\nES: 12\r\nGroup: DCM\r\n")
    cohort = open_cohort(tmp_path)
    assert cohort.layout == "acdc"
    assert [case.case_id for case in cohort.cases] == [
        f"patient{patient:03d}_frame{frame:02d}" for patient in (1, 2) for frame in (1, 12)
    ]
    assert not cohort.notes


def test_d42_acdc_trains_on_the_training_patients(tmp_path):
    put_acdc(tmp_path / "database/training", "patient001", "patient001")
    put_acdc(tmp_path / "database/testing", "patient101", "patient101")
    cohort = open_cohort(tmp_path)
    assert {case.patient for case in cohort.cases} == {"patient001"}
    assert cohort.notes == ("1 patient not part of the cohort, in database/testing",)
    assert {case.patient for case in open_cohort(tmp_path / "database/testing").cases} == {"patient101"}


@pytest.mark.parametrize("name", ["Info.cfg", "info.cfg"])
@pytest.mark.parametrize("number", ["9" * 4301, "9" * 12, "-1", "1.5", "１"])
def test_d33_numbers_that_no_frame_has(name, number, tmp_path):
    put_acdc(tmp_path, "p", "p")
    (tmp_path / "p" / "Info.cfg").unlink()
    (tmp_path / "p" / name).write_text(f"ED: 1\nES: {number}\n")
    refused(tmp_path, "phases of patient p", "counted from 1")


def test_d42_a_folder_of_several_unpacked_files_is_none(tmp_path):
    put(tmp_path, "a.nii/a.nii", "a.nii/b.nii")
    assert not nifti_named(tmp_path, "a").is_file()
