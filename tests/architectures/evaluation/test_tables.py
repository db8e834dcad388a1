"""Tables on disk: what is written reads back, in any locale; what cannot be right is refused."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import unicodedata

import pytest

from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import OK, Row
from trifuse.architectures.evaluation.summary import Scored, summarise
from trifuse.architectures.evaluation.tables import (
    is_case_table,
    read_case_table,
    write_case_table,
    write_summary_table,
)
from trifuse.kernels import DataError

STRICT = Conventions()


def row(case_id: str, score: float, *, index: int | None = None) -> Row:
    return Row(case_id, case_id, "atrium", index, OK, dict.fromkeys(STRICT.metrics, score), STRICT)


def test_table_survives_the_disk(tmp_path):
    rows = [row("a b", 1 / 3), row('ü,"x"', math.nan, index=4)]
    write_case_table(tmp_path / "t.csv", rows)
    back = read_case_table(tmp_path / "t.csv")
    assert [(r.case_id, r.slice, r.conventions) for r in back] == [(r.case_id, r.slice, r.conventions) for r in rows]
    assert back[0].scores["dsc"] == 1 / 3
    assert math.isnan(back[1].scores["dsc"])
    with open(tmp_path / "t.csv", newline="") as stream:
        (first, _) = csv.DictReader(stream)
    assert "empty_masks=strict" in first["conventions"]
    assert "hd_unit=mm" in first["conventions"]


def test_d27_names_in_a_table_are_read_with_their_accents_composed(tmp_path):
    write_case_table(tmp_path / "t.csv", [row(unicodedata.normalize("NFD", "Müller_é"), 0.5)])
    (back,) = read_case_table(tmp_path / "t.csv")
    assert (back.case_id, back.patient) == ("Müller_é", "Müller_é")


def test_t22_decimals_have_a_dot_whatever_the_locale(tmp_path):
    """LC_ALL asks for German; and since no German locale may be installed, localeconv is made to say comma too."""
    script = """
import locale, sys
from pathlib import Path
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
locale.localeconv = lambda: {"decimal_point": ",", "thousands_sep": ".", "grouping": [3, 0]}
locale.str = lambda value: str(value).replace(".", ",")
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.scoring import Row
from trifuse.architectures.evaluation.summary import Scored, summarise
from trifuse.architectures.evaluation.tables import write_case_table, write_summary_table
conventions = Conventions()
row = Row("a", "a", "atrium", None, "ok", dict.fromkeys(conventions.metrics, 1234.5), conventions)
write_case_table(Path(sys.argv[1]) / "cases.csv", [row])
write_summary_table(Path(sys.argv[1]) / "summary.csv", [Scored(conventions, summarise([row]))])
"""
    environment = {**os.environ, "LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120)
    assert ",1234.5,1234.5," in (tmp_path / "cases.csv").read_text()
    assert "atrium,dsc,1234.5,nan,1,0," in (tmp_path / "summary.csv").read_text()


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_case_table(path, [row("a", 0.5)])
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_case_table(path, [row("a", 0.6)])
    with pytest.raises(OSError, match="No space"):
        write_summary_table(tmp_path / "s.csv", [Scored(STRICT, summarise([row("a", 0.6)]))])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "no rows"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: text.replace("empty_masks=strict", "empty_masks=kind"), "does not name the conventions"),
        (lambda text: text + text.splitlines()[1].replace("strict", "nnunet") + "\n", "2 of them"),
        (lambda text: text.replace(",iou,", ",jaccard,"), "none called iou"),
        (lambda text: text.replace("0.5", '"0,5"', 1), "decimal dot"),
        (lambda text: "hello\nworld\n", "conventions"),
        (lambda text: text + text.splitlines()[1] + "\n", "a atrium more than once"),
        (lambda text: text + "b,b\n", "line 3 has 2 cells"),
    ],
)
def test_read_rejects(tmp_path, damage, said):
    path = tmp_path / "t.csv"
    write_case_table(path, [row("a", 0.5)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=said) as caught:
        read_case_table(path)
    assert "t.csv" in str(caught.value)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv"):
        read_case_table(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.csv"):
        read_case_table(tmp_path / "binary.csv")


def test_what_is_a_case_table(tmp_path):
    """A file that cannot be read is none, and neither is one of other columns."""
    write_case_table(tmp_path / "cases.csv", [row("a", 0.5)])
    (tmp_path / "other.csv").write_text("case,split\na,train\n")
    names = ("cases.csv", "other.csv", "absent.csv", ".")
    assert [is_case_table(tmp_path / name) for name in names] == [True, False, False, False]
