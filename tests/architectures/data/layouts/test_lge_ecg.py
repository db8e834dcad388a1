"""LGE and ECG paired by a table: what its lines mean, and what is wrong with any of them, all at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refused_cohort import refused

from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.cohort import Clinical, Split
from trifuse.architectures.data.layouts.lge_ecg import SCAR_CLASSES, TABLE, scan_scar_cohort
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.kernels import DataError

AFFINE = np.diag([-1.5, -1.5, 8.0, 1.0])
HEADER = "case_id,split,lge_path,seg_path,ecg_path,ecg_rate_hz,mri_date,ecg_date,rv_ant_x,rv_ant_y,rv_inf_x,rv_inf_y"


def put_case(root, name):
    """Write image, labels and a plausible median beat of a case."""
    rng = np.random.default_rng(list(name.encode()))
    for folder in ("lge", "seg", "ecg"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    grid = new_volume(rng.integers(0, 500, (9, 8, 3)).astype(np.int16), AFFINE)
    write_image(root / "lge" / f"{name}.nii.gz", grid.voxels, like=grid)
    write_labels(root / "seg" / f"{name}.nii.gz", np.resize(np.arange(4, dtype=np.uint8), (3, 8, 9)), like=grid)
    eight = rng.uniform(0.5, 1.5, (8, 1)) * np.exp(-0.5 * ((np.arange(600) - 200) / 6.0) ** 2)
    eight += rng.normal(0, 0.01, (8, 600))
    one, two = eight[:2]
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    np.save(root / "ecg" / f"{name}.npy", np.stack([*limb, *eight[2:]]))


def line(name, **changes):
    """Return a sound line of the table, or one with changes."""
    cells = {
        "case_id": name,
        "split": "train",
        "lge_path": f"lge/{name}.nii.gz",
        "seg_path": f"seg/{name}.nii.gz",
        "ecg_path": f"ecg/{name}.npy",
        "ecg_rate_hz": "500",
        "mri_date": "2024-03-01",
        "ecg_date": "2024-02-25",
        "rv_ant_x": "3.5",
        "rv_ant_y": "2",
        "rv_inf_x": "3",
        "rv_inf_y": "7",
    }
    return {**cells, **changes}


def put_table(root, *lines, header=HEADER):
    """Write the table; the files of its cases are there."""
    for cells in lines:
        put_case(root, cells["case_id"])
    text = "\n".join([header, *(",".join(cells[name] for name in header.split(",")) for cells in lines)])
    (root / TABLE).write_text(text + "\n")
    return root


# -------------------------------------------------------------------------------------------- what it says


def test_a_sound_cohort(tmp_path):
    put_table(tmp_path, line("a"), line("b", split="val"), line("c", split="test"), line("d", split="unused"))
    cohort = open_cohort(tmp_path)
    assert (cohort.layout, cohort.class_names, cohort.notes) == ("lge_ecg", SCAR_CLASSES, ())
    assert cohort.split == Split(("a",), ("b",), ("c",), ("d",))
    assert DataRecipe(str(tmp_path)).choose_split(cohort) == cohort.split
    ecg = tmp_path / "ecg/a.npy"
    assert cohort.case("a").clinical == Clinical(ecg, 500.0, 5.0, (3.5, 2.0), (3.0, 7.0))
    assert cohort.case("a").files == (tmp_path / "lge/a.nii.gz", tmp_path / "seg/a.nii.gz", ecg)
    _, labels = load_case(cohort, cohort.case("a"))
    assert set(np.unique(labels.voxels)) == {0, 1, 2, 3}
    findings = check_folder(tmp_path)
    assert (findings.errors, findings.warnings) == ((), ())


def test_a_case_of_the_tables_own_validation_may_test(tmp_path):
    put_table(tmp_path, line("a"), line("b", split="val"), line("c", split="val"), line("d", split="test"))
    split = DataRecipe(str(tmp_path), test_cases=("c",)).choose_split(open_cohort(tmp_path))
    assert split == Split(("a", "d"), ("b",), ("c",))


def test_d28_an_ecg_of_two_cases(tmp_path):
    """Refused across the parts of a split, and said by data check whatever the split: here in another file format."""
    put_table(tmp_path, line("a"), line("b", ecg_path="ecg/a.npy", split="test"), line("c", ecg_path="ecg/c.npz"))
    np.savez(tmp_path / "ecg" / "c.npz", ecg=np.load(tmp_path / "ecg" / "a.npy"))
    with pytest.raises(DataError, match="same ECG in two parts: expected one part, got a in train and b in test"):
        DataRecipe(str(tmp_path)).choose_split(open_cohort(tmp_path))
    errors = [str(error) for error in check_folder(tmp_path).errors]
    assert len(errors) == 3
    for word in ("same ECG in two parts", "b and a have the same beat", "c and a have the same beat"):
        assert any(word in error for error in errors), word


@given(days=st.integers(-90, 90))
def test_e9_the_interval_counts_whichever_came_first(tmp_path_factory, days):
    root = tmp_path_factory.mktemp("cohort")
    ecg = np.datetime64("2024-03-01") + days
    (root / TABLE).write_text(f"case_id,lge_path,ecg_path,mri_date,ecg_date\na,a.nii,a.npy,2024-03-01,{ecg}\n")
    found = scan_scar_cohort(root)
    assert not found.problems
    assert found.cases[0].clinical.interval_days == abs(days)


@settings(max_examples=40)
@given(days=st.integers(91, 40_000), before=st.booleans(), allowed=st.sampled_from([90.0, 365.0]))
def test_e9_intervals_that_are_too_long(tmp_path_factory, days, before, allowed):
    root = tmp_path_factory.mktemp("cohort")
    ecg = np.datetime64("2024-03-01") + (-days if before else days)
    (root / TABLE).write_text(f"case_id,lge_path,ecg_path,mri_date,ecg_date\nx7,a.nii,a.npy,2024-03-01,{ecg}\n")
    problems = scan_scar_cohort(root, allowed).problems
    assert bool(problems) == (days > allowed)
    for problem in problems:
        for word in ("line 2, case x7", f"{days} days", f"[0, {allowed:g}] days", str(ecg)):
            assert word in str(problem)


def test_more_days_may_be_allowed(tmp_path):
    put_table(tmp_path, line("a", ecg_date="2023-03-01"), line("b"))
    refused(tmp_path, "366 days", "[0, 90]", "max_interval_days")
    cohort = open_cohort(tmp_path, max_interval_days=400)
    assert cohort.case("a").clinical.interval_days == 366
    (tmp_path / "plain/images").mkdir(parents=True)
    refused(tmp_path / "plain", "max_interval_days", "belongs to the lge_ecg layout", max_interval_days=400)


def test_e9_no_day_may_be_allowed(tmp_path):
    put_table(tmp_path, line("a", ecg_date="2024-02-29"), line("b", ecg_date="2024-03-01"))
    assert "case b" not in refused(tmp_path, "case a", "1 days", "[0, 0] days", max_interval_days=0.0)


def test_e9_dates_that_cannot_be_right_are_told(tmp_path):
    past, future = {"mri_date": "1850-03-01", "ecg_date": "1850-03-01"}, {"mri_date": "2999-03-01", "ecg_date": ""}
    put_table(tmp_path, line("a", **past), line("b", ecg_path="", **future), line("c"))
    *_, note = open_cohort(tmp_path).notes
    assert "case a, mri_date 1850-03-01, case a, ecg_date 1850-03-01, case b, mri_date 2999-03-01:" in note
    assert "were the dates shifted?" in note
    assert any("were the dates shifted?" in str(warning) for warning in check_folder(tmp_path).warnings)


def test_e9_a_case_without_an_ecg(tmp_path):
    put_table(tmp_path, line("a", ecg_path="", ecg_date=""), line("b", ecg_date=""), line("c", ecg_path=""), line("d"))
    cohort = open_cohort(tmp_path)
    for name in "abc":
        clinical = cohort.case(name).clinical
        assert (clinical.ecg, clinical.interval_days, clinical.ecg_rate_hz) == (None, None, None)
        assert clinical.rv_anterior == (3.5, 2.0)
    assert cohort.case("d").clinical.interval_days == 5
    assert cohort.notes == (
        "cases.csv: case a has no ecg_path and no ecg_date: no ECG",
        "cases.csv: case b has no ecg_date: no ECG",
        "cases.csv: case c has no ecg_path: no ECG",
    )
    assert len(check_folder(tmp_path).warnings) == 3


def test_only_names_and_images_are_needed(tmp_path):
    put_table(tmp_path, line("a"), line("b"), header="case_id,lge_path")
    cohort = open_cohort(tmp_path)
    assert (cohort.split, cohort.notes) == (None, ())
    assert [(case.label, case.clinical) for case in cohort.cases] == [(None, Clinical())] * 2


def test_tables_as_spreadsheets_write_them(tmp_path):
    put_table(tmp_path, line("a"), line("b"))
    plain = open_cohort(tmp_path)
    text = (tmp_path / TABLE).read_text()
    lines = ["Case_ID, ".join(text.split("case_id,", 1)).replace(",", ";"), ";" * HEADER.count(","), ""]
    (tmp_path / TABLE).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).replace("/", "\\").encode())
    assert open_cohort(tmp_path).cases == plain.cases


def test_unknown_columns_are_noted(tmp_path):
    put_table(tmp_path, line("a", age="61", sex="f"), header=HEADER + ",age,sex")
    assert open_cohort(tmp_path).notes == ("cases.csv: unknown columns age, sex: not read",)


# ---------------------------------------------------------------------------------------------- what is wrong

FAULTS = [
    ({"case_id": ""}, ["case without a name: case_id", "got nothing"]),
    ({"case_id": "../x"}, ["case_id", "a name that can be a file's"]),
    ({"lge_path": ""}, ["lge_path", "path of the LGE volume"]),
    ({"mri_date": "01.03.2024"}, ["mri_date", "YYYY-MM-DD", "got 01.03.2024"]),
    ({"ecg_date": "2024-02-30"}, ["ecg_date", "YYYY-MM-DD", "got 2024-02-30"]),
    ({"ecg_date": "20240225"}, ["ecg_date", "YYYY-MM-DD", "got 20240225"]),
    ({"mri_date": ""}, ["mri_date", "the case has an ECG"]),
    ({"ecg_date": "2024-08-01"}, ["153 days", "in [0, 90] days"]),
    ({"rv_ant_x": "nan"}, ["rv_ant_x", "a finite number", "got nan"]),
    ({"rv_inf_y": "inf"}, ["rv_inf_y", "a finite number", "got inf"]),
    ({"rv_ant_x": "left"}, ["rv_ant_x", "a finite number", "got left"]),
    ({"rv_ant_y": ""}, ["rv_ant_x", "both rv_ant_x and rv_ant_y"]),
    ({"rv_inf_x": ""}, ["rv_inf_y", "both rv_inf_x and rv_inf_y"]),
    ({"ecg_rate_hz": "-500"}, ["ecg_rate_hz", "above 0"]),
    ({"ecg_rate_hz": "fast"}, ["ecg_rate_hz", "a finite number"]),
    ({"split": "training"}, ["case b: split", "train, val, test, unused", "got training"]),
    ({"split": ""}, ["case b: split", "nothing in all lines", "got nothing"]),
    ({"seg_path": "/etc/passwd"}, ["seg_path", "below the folder of cases.csv"]),
    ({"lge_path": "lge/../../a.nii"}, ["lge_path", "below the folder of cases.csv"]),
    ({"ecg_path": "..\\a.npy"}, ["ecg_path", "below the folder of cases.csv"]),
    ({"ecg_path": "C:\\a.npy"}, ["ecg_path", "below the folder of cases.csv"]),
    ({"ecg_path": "a\0b.npy"}, ["ecg_path", "below the folder of cases.csv"]),
    ({"case_id": "a"}, ["line 3, case_id", "a name that line 2 does not have"]),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=str)
def test_one_fault_is_named_with_line_and_case(tmp_path, change, words):
    put_table(tmp_path, line("a"), line("b"))
    lines = (tmp_path / TABLE).read_text().splitlines()
    lines[2] = ",".join(line("b", **change).values())
    (tmp_path / TABLE).write_text("\n".join(lines))
    message = refused(tmp_path, "cases.csv: ", *words)
    assert "problems" not in message
    assert "line 3" in message or "case b" in message


def test_d1_all_faults_of_all_lines_come_at_once(tmp_path):
    a, b = line("a", mri_date="x", rv_ant_x="nan"), line("b", ecg_date="2020-01-01")
    put_table(tmp_path, a, b, line("c", split="no"))
    (tmp_path / "ecg/c.npy").unlink()
    (tmp_path / "lge/b.nii.gz").unlink()
    refused(tmp_path, "6 problems", "ecg/c.npy: ECG of case c: expected a file", "lge/b.nii.gz: image of case b")
    errors = check_folder(tmp_path).errors
    assert len(errors) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["columns", "case_id and lge_path", "no case_id and no lge_path"]),
        (b"case_id,seg_path\na,b\n", ["got no lge_path", "the first line names the columns"]),
        (b"case_id,lge_path,split,split\na,b,c,d\n", ["got split more than once"]),
        (b"case_id,lge_path\n", ["0 cases", "lines in cases.csv"]),
        (b"case_id,lge_path\na,b,c\n", ["line 2", "3 cells: a, b, c", "expected 2"]),
        (b"case_id,lge_path\n\xff\xfe\n", ["encoding", "UTF-8"]),
    ],
)
def test_a_table_that_is_none(tmp_path, content, words):
    (tmp_path / TABLE).write_bytes(content)
    refused(tmp_path, *words, layout="lge_ecg")


def test_no_table(tmp_path):
    refused(tmp_path, "cases.csv: file", "a table of cases", layout="lge_ecg")


def test_d16_labels_on_another_grid(tmp_path):
    put_table(tmp_path, line("a"), line("b"))
    grid = new_volume(np.zeros((9, 8, 3), np.int16), AFFINE + np.diag([0, 0, 2.0, 0]))
    write_labels(tmp_path / "seg/b.nii.gz", grid.voxels, like=grid)
    (error,) = check_folder(tmp_path).errors
    assert "seg/b.nii.gz: affine" in str(error)


def test_ecgs_are_read_to_their_beats(tmp_path):
    put_table(tmp_path, line("a"), line("b"), line("c"), line("d", ecg_rate_hz=""))
    (tmp_path / "ecg/a.npy").write_bytes(b"no array")
    np.save(tmp_path / "ecg/b.npy", np.zeros((12, 600)))
    np.save(tmp_path / "ecg/c.npy", np.ones((11, 600)))
    findings = check_folder(tmp_path)
    assert [str(error).partition(":")[0] for error in findings.errors] == [
        str(tmp_path / "ecg" / f"{name}.npy") for name in "abc"
    ]
    assert findings.warnings == (f"{tmp_path / 'ecg/d.npy'}: ECG: no sampling rate is given: taken for 500 Hz",)
