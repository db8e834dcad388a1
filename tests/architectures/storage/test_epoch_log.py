"""log.csv: one schema, every epoch once."""

from __future__ import annotations

import locale
import resource

import pytest
from children import Child

from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.epoch_log import EpochLog, read_digest, read_log
from trifuse.kernels.errors import DataError


def rows(first, last):
    dice = {2: float("nan")}
    return [{"epoch": n, "loss": 0.1 * n, "val_dice": dice.get(n, 1e-9)} for n in range(first, last + 1)]


def append(path, epochs_done, last):
    log = EpochLog(path, epochs_done)
    for row in rows(epochs_done + 1, last):
        log.append(row)
        log.write()


@pytest.mark.parametrize("cut", ["nothing", "half a row", "half a header", "empty"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_t16_no_duplicate_and_no_missing_epoch(tmp_path, kept, cut):
    whole, resumed = tmp_path / "whole.csv", tmp_path / "resumed.csv"
    append(whole, 0, 4)
    append(resumed, 0, 3)
    text = resumed.read_text()
    if cut == "half a row":
        resumed.write_text(text + "4,0.4")
    elif cut != "nothing":
        resumed.write_text("epoch,lo" if cut == "half a header" else "")
        kept = 0
    append(resumed, kept, 4)
    assert resumed.read_text() == whole.read_text()
    assert [row["epoch"] for row in read_log(whole)] == [1, 2, 3, 4]


def test_numbers_come_back_as_they_were(tmp_path):
    append(tmp_path / "log.csv", 0, 3)
    assert repr(read_log(tmp_path / "log.csv")) == repr([{k: float(v) for k, v in row.items()} for row in rows(1, 3)])


def test_t22_decimal_points_in_every_locale(tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8"):
        try:
            locale.setlocale(locale.LC_ALL, name)
            break
        except locale.Error:
            continue
    try:
        append(tmp_path / "log.csv", 0, 1)
    finally:
        locale.setlocale(locale.LC_ALL, before)
    assert (tmp_path / "log.csv").read_text() == "epoch,loss,val_dice\n1,0.1,1e-09\n"


def test_t3_rows_wait_for_a_full_disk_to_be_cleared(tmp_path):
    append(tmp_path / "whole.csv", 0, 3)

    def child():
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        log = EpochLog(tmp_path / "full.csv", 0)
        for row, limit in zip(rows(1, 3), [unlimited[0], 37, unlimited[0]], strict=True):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            log.append(row)
            if limit == 37:  # in the middle of the second row
                with pytest.raises(OSError, match="too large"):
                    log.write()
            else:
                log.write()

    assert Child(child).wait() == 0
    assert (tmp_path / "full.csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_other_columns_are_refused(tmp_path):
    append(tmp_path / "log.csv", 0, 1)
    log = EpochLog(tmp_path / "log.csv", 1)
    with pytest.raises(DataError, match=r"columns: expected .*'val_dice'"):
        log.append({"epoch": 2, "loss": 0.0})


def test_a_log_is_widened_where_the_recipe_has_changed(tmp_path):
    path = tmp_path / "log.csv"
    append(path, 0, 2)
    log = EpochLog(path, 2, widen=True)
    for epoch in (3, 4):
        log.append({"epoch": epoch, "loss": 0.3, "lr_new": 1e-3})
        log.write()
    log.write_digest(tmp_path)
    assert read_digest(tmp_path) == sha256_of(path)
    EpochLog(path, 4, digest=read_digest(tmp_path))  # a plain resume goes on from there
    lines = path.read_text().splitlines()
    assert lines == ["epoch,loss,val_dice,lr_new", "1,0.1,1e-09,", "2,0.2,nan,", "3,0.3,nan,0.001", "4,0.3,nan,0.001"]
    append_again = {"epoch": 5, "loss": 0.1, "val_dice": 0.5}
    log = EpochLog(path, 4)
    with pytest.raises(DataError, match=r"columns: expected .*'lr_new'"):
        log.append(append_again)
