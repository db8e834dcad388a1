"""PTB-XL's table and folds, folders without a table, and the check of every ECG in them."""

from __future__ import annotations

import csv
import shutil
from functools import partial

import numpy as np
import pytest
from made_ecg import made_ecg
from refused_cohort import refused_by

from trifuse.architectures.data.ecg.check import check_ecgs
from trifuse.architectures.data.ecg.ptbxl import find_ecgs, open_ptbxl
from trifuse.kernels import DataError

COLUMNS = ("ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold", "filename_lr", "filename_hr")


def row(number, fold=1, **changes):
    line = {
        "ecg_id": number,
        "patient_id": f"{number + 9000}.0",
        "age": "56.0",
        "sex": 1,
        "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
        "strat_fold": fold,
        "filename_lr": f"records100/00000/{number:05d}_lr",
        "filename_hr": f"records500/00000/{number:05d}_hr",
    }
    return {**line, **changes}


def put_table(root, rows, columns=COLUMNS, there=("hr", "lr")):
    """Write a table, and a header for each of its records."""
    with open(root / "ptbxl_database.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        for kind in there:
            path = root / line[f"filename_{kind}"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".hea").touch()


def refused(root, *words, **options):
    refused_by(partial(open_ptbxl, root, **options), *words)


def numbers(records):
    return [record.ecg_id for record in records]


def test_folds_1_to_8_train_9_validates_10_tests(tmp_path):
    put_table(tmp_path, [row(20 - fold, fold) for fold in range(1, 11)])
    ptbxl = open_ptbxl(tmp_path)
    assert numbers(ptbxl.records) == list(range(10, 20))
    assert numbers(ptbxl.part("train")) == list(range(12, 20))
    assert (numbers(ptbxl.part("val")), numbers(ptbxl.part("test"))) == ([11], [10])
    assert (ptbxl.rate_hz, ptbxl.notes) == (500, ())


def test_what_is_known_of_a_record(tmp_path):
    put_table(tmp_path, [row(7, 3), row(8, 3, age="", sex="")])
    first, second = open_ptbxl(tmp_path).records
    assert first.path == tmp_path / "records500/00000/00007_hr"
    assert (first.ecg_id, first.patient, first.fold, first.age_years, first.sex) == (7, "9007", 3, 56, 1)
    assert first.diagnoses == {"NORM": 100, "SR": 0}
    assert (second.age_years, second.sex) == (None, None)


def test_the_other_rate(tmp_path):
    put_table(tmp_path, [row(7)])
    assert open_ptbxl(tmp_path, rate_hz=100).records[0].path.name == "00007_lr"
    refused(tmp_path, "got 250", "500 or 100", rate_hz=250)


def test_records_that_are_not_there_are_counted(tmp_path):
    put_table(tmp_path, [row(1), row(2), row(3)], there=())
    refused(tmp_path, "records: expected the files", "got none")
    (tmp_path / "records500/00000").mkdir(parents=True)
    (tmp_path / "records100/00000").mkdir(parents=True)
    (tmp_path / "records500/00000/00001_hr.hea").touch()
    (tmp_path / "records100/00000/00003_lr.hea").touch()
    ptbxl = open_ptbxl(tmp_path)
    assert [record.path.name for record in ptbxl.records] == ["00001_hr", "00003_lr"]
    assert ptbxl.notes == ("1 record of the table not there", "1 record at 100 Hz, not there at 500 Hz")


def test_all_faults_of_a_table_at_once(tmp_path):
    torn = {"patient_id": "5.0"}
    put_table(
        tmp_path,
        [
            row(1),
            row(1),
            row(2, 11),
            row(3, scp_codes="{'A': print('executed') or 1.0}"),
            row(4, 1, **torn),
            row(5, 9, **torn),
        ],
    )
    refused(tmp_path, "1 more than once", "line 4", "fold 11", "line 5", "patients 5 in several parts", "4 problems")


NONSENSE = [
    *({"ecg_id": "x"}, {"ecg_id": "inf"}, {"ecg_id": "1.5"}, {"ecg_id": "9" * 5000}, {"patient_id": "-inf"}),
    *({"scp_codes": "{'A': 'b'}"}, {"scp_codes": "3"}, {"scp_codes": "[" * 5000}, {"scp_codes": "-" * 50_000 + "1"}),
    *({"sex": "f"}, {"sex": "nan"}, {"age": "inf"}, {"strat_fold": "1e400"}, {"strat_fold": "0.5"}),
]


@pytest.mark.parametrize("changes", NONSENSE, ids=lambda changes: str(changes)[:24])
def test_a_line_that_makes_no_sense(tmp_path, changes):
    put_table(tmp_path, [{**row(1), **changes}])
    refused(tmp_path, "line 2")


@pytest.mark.parametrize("name", ["../records500/1", "/etc/passwd", "..\\1", ""])
def test_a_record_outside_the_folder(tmp_path, name):
    put_table(tmp_path, [row(1), row(2, filename_hr=name)], there=())
    refused(tmp_path, "line 3", "a file that is not below the folder of ptbxl_database.csv")


def test_a_line_that_was_cut_off(tmp_path):
    put_table(tmp_path, [row(1), row(2)])
    table = tmp_path / "ptbxl_database.csv"
    table.write_text(table.read_text().rpartition(",records100")[0])
    refused(tmp_path, "line 3")


def test_missing_columns_are_all_named(tmp_path):
    put_table(tmp_path, [row(1)], columns=("ecg_id", "patient_id", "filename_hr", "filename_lr"))
    refused(tmp_path, "no scp_codes, strat_fold")


def test_no_table(tmp_path):
    refused(tmp_path, "ptbxl_database.csv", "No such file")
    (tmp_path / "ptbxl_database.csv").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "ptbxl_database.csv", "table")


# --------------------------------------------------------------------------------- folders without a table


def test_every_kind_of_ecg_is_found(tmp_path):
    (tmp_path / "b").mkdir()
    for name in (
        "10.npy",
        "9.npy",
        "b/x.npz",
        "b/y.csv",
        "z.hea",
        "z.dat",
        "notes.txt",
        ".hidden.npy",
        "scp_statements.csv",
    ):
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_ecgs(tmp_path)] == [
        "9.npy", "10.npy", "b/x.npz", "b/y.csv", "z.hea",
    ]  # fmt: skip
    assert find_ecgs(tmp_path / "9.npy") == [tmp_path / "9.npy"]


def test_a_folder_without_ecgs(tmp_path):
    for root, word in ((tmp_path, "none"), (tmp_path / "x", "no such folder")):
        with pytest.raises(DataError, match=word):
            find_ecgs(root)


# ------------------------------------------------------------------------------------------------ the check


def test_the_check_reads_every_record_to_its_beat(tmp_path):
    signal = made_ecg(bpm=60)
    np.savez(tmp_path / "1.npz", ecg=signal, rate=500)
    signal[8] = 0
    np.savez(tmp_path / "2.npz", ecg=signal, rate=500)
    np.savez(tmp_path / "3.npz", ecg=np.zeros((12, 5000)), rate=500)
    np.savez(tmp_path / "4.npz", ecg=made_ecg(3, bpm=60), rate=500)
    findings = check_ecgs(tmp_path)
    lines = [str(record) for record in findings.records]
    assert lines[0] == "1.npz: 12 of 12 leads, 9 beats, 60/min"
    assert lines[1] == "2.npz: 11 of 12 leads, 9 beats, 60/min; V3 is not used: flat"
    assert lines[2].startswith("3.npz: error: ")
    assert "pass min_beats=2" in lines[3]
    assert [error is record.error for error, record in zip(findings.errors, findings.records[2:], strict=True)]
    assert len(check_ecgs(tmp_path, min_beats=2).errors) == 1
    assert str(check_ecgs(tmp_path / "1.npz").records[0]) == lines[0]


def test_the_check_of_public_records(trifuse_data, tmp_path):
    findings = check_ecgs(trifuse_data / "ptbxl_subset")
    assert (len(findings.records), findings.errors) == (6, ())
    assert findings.notes == ("1 record at 100 Hz, not there at 500 Hz",)
    assert all(record.beat.usable.all() for record in findings.records)
    shutil.copytree(trifuse_data / "ptbdb_s0010", tmp_path / "ptbdb")
    (finding,) = check_ecgs(tmp_path / "ptbdb").records
    assert str(finding).startswith("s0010_re.hea: 12 of 12 leads, 51 beats, 82/min; ignored vx, vy, vz")


def test_public_table(trifuse_data):
    ptbxl = open_ptbxl(trifuse_data / "ptbxl_subset")
    assert [numbers(ptbxl.part(part)) for part in ("train", "val", "test")] == [[1, 6001, 6002, 6005], [], [6000, 6004]]
    assert ptbxl.records[1].diagnoses["NORM"] == 100
