"""Terminals that cannot show a name, names that are no text, and users without a home or a name: no command dies."""

from __future__ import annotations

import io
import os
import pwd
import sys

import numpy as np
import pytest

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.evaluation.picture import new_figure, save_picture
from trifuse.architectures.evaluation.tables import read_case_table
from trifuse.architectures.storage.epoch_log import EpochLog, read_log
from trifuse.kernels import DataError
from trifuse.kernels.gpu.tuning import cache_file

STRANGE = os.fsdecode(b"f\xff\xfe_a")
NAMES = ["Жук_ł", STRANGE, "case[1]", "a|b$x_{$", "±"]


@pytest.fixture
def cohort(put_case, tmp_path):
    """A cohort of strange names, with a perfect prediction of each in ``predictions``."""
    for seed, name in enumerate(NAMES):
        put_case(name, seed=seed)
    (tmp_path / "predictions").mkdir()
    for path in (tmp_path / "labels").iterdir():
        labels = read_labels(path)
        write_labels(tmp_path / "predictions" / path.name, labels.voxels, like=labels)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that runs a command on a terminal of some encoding: its exit code, and all that it wrote."""

    def run(encoding, *words):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        for stream in streams:
            stream.flush()
        return code, b"".join(stream.buffer.getvalue() for stream in streams)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "cp437"])
def test_l13_names_that_a_terminal_cannot_show(cohort, terminal, encoding):
    root, table = cohort, cohort / "scores.csv"
    assert terminal(encoding, "data", "check", root)[0] == 0
    code, said = terminal(encoding, "data", "check", root, "--target", "7")
    assert (code, b"error: " in said) == (3, True)
    code, said = terminal(encoding, "evaluate", root / "predictions", root, "--out", table, "--cases", "Ж*", STRANGE)
    assert (code, b"SD" in said) == (0, True)
    assert {row.case_id for row in read_case_table(table)} == {"Жук_ł", "f\\udcff\\udcfe_a"}
    code, said = terminal(encoding, "evaluate", root / "predictions", root, "--out", root / "x.csv", "--cases", "Щ*")
    assert (code, b"0 cases that match" in said) == (3, True)
    code, said = terminal(encoding, "data", "chekc", "Ж")
    assert (code, b"did you mean" in said) == (2, True)


def test_l13_names_that_are_no_text_are_written_and_found(cohort, terminal):
    code, said = terminal(
        "utf-8", "data", "convert", cohort, "--to", "nnunet", "--out", cohort / "o", "--test-cases", STRANGE
    )
    assert code == 0, said
    assert open_cohort(cohort / "o").split.test == (STRANGE,)
    (cohort / "predictions" / f"{STRANGE}.nii.gz").unlink()
    code, said = terminal("ascii", "evaluate", cohort / "predictions", cohort, "--out", cohort / "x.csv")
    assert (code, b"f\\udcff\\udcfe_a" in said) == (3, True)


@pytest.mark.parametrize("name", [*NAMES, "$\\frac{$", "$", "\\", "a\nb"])
def test_l13_figures_with_strange_names(name, tmp_path):
    figure = new_figure(3, 2)
    axis = figure.subplots()
    axis.set_title(name)
    axis.plot([0, 1], label=name)
    axis.set_xticks([0, 1], [name, name])
    axis.legend()
    picture = save_picture(figure, tmp_path, "a", name, name, ["case_id"], [[name]])
    assert picture.png.stat().st_size > 1000


def test_l13_a_class_whose_name_is_no_text_is_refused(put_case, tmp_path):
    put_case("a")
    with pytest.raises(DataError, match=r"class names: expected text, got 'f\\udcff"):
        open_cohort(tmp_path, targets={STRANGE: 1})


def test_l13_a_column_of_the_log_whose_name_is_no_text(tmp_path):
    log = EpochLog(tmp_path / "log.csv", 0)
    log.append({"epoch": 1, STRANGE: 0.5})
    log.write()
    assert read_log(tmp_path / "log.csv") == [{"epoch": 1, "f\\udcff\\udcfe_a": 0.5}]


def test_t18_a_user_without_home_and_name(cohort, terminal, monkeypatch, tmp_path):
    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for variable in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TRIFUSE_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    assert cache_file().is_absolute()
    assert terminal("utf-8", "data", "check", cohort)[0] == 0
    assert terminal("utf-8", "evaluate", cohort / "predictions", cohort, "--out", cohort / "scores.csv")[0] == 0
    assert terminal("utf-8", "doctor")[0] == 0
    figure = new_figure(1, 1)
    save_picture(figure, tmp_path, "a", "a", "a", ["number"], [[np.pi]])
    assert not list(tmp_path.glob("~*"))
