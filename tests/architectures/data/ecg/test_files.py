"""ECGs on disk: every kind of file, what files say against what callers say, and damage with the file's name."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from made_ecg import made_ecg, on_paper

from trifuse.architectures.data.ecg.files import digest_of_samples, read_ecg
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.kernels import DataError, MissingExtra

SIGNAL = made_ecg()


def put_wfdb(folder, name="rec", signal=SIGNAL, names=LEADS, rate=500, units="mV"):
    """Write a WFDB record of 16-bit samples, 1000 to the unit; return what it holds."""
    count = len(names)
    gain = 1000 if units == "mV" else 1
    wfdb.wrsamp(
        name,
        fs=rate,
        units=[units] * count,
        sig_name=list(names),
        d_signal=np.round(signal.T * gain).astype(np.int64),
        fmt=["16"] * count,
        adc_gain=[float(gain)] * count,
        baseline=[0] * count,
        write_dir=str(folder),
    )
    return np.round(signal * gain) / gain


def refused(path, *words, **options):
    with pytest.raises(DataError) as caught:
        read_ecg(path, **options)
    for word in (str(path.with_suffix("")), *words):
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ kinds


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
def test_a_wfdb_record_by_any_of_its_names(tmp_path, suffix):
    held = put_wfdb(tmp_path, names=[lead.lower() for lead in LEADS])
    record = read_ecg(tmp_path / f"rec{suffix}")
    np.testing.assert_allclose(record.signal_mv, held, atol=1e-12)
    assert (record.rate_hz, record.notes, record.name) == (500, (), str(tmp_path / f"rec{suffix}"))


def test_a_wfdb_record_with_a_dot_in_its_name(tmp_path):
    put_wfdb(tmp_path)
    (tmp_path / "rec.hea").rename(tmp_path / "rec.v1.hea")
    assert read_ecg(tmp_path / "rec.v1").usable.all()


def test_a_wfdb_record_in_microvolts_at_another_rate(tmp_path):
    put_wfdb(tmp_path, signal=SIGNAL * 1000, units="uV", rate=250)
    record = read_ecg(tmp_path / "rec")
    np.testing.assert_allclose(record.signal_mv, SIGNAL, atol=6e-4)
    assert (record.rate_hz, record.duration_s) == (250, 20)


def test_a_wfdb_record_of_two_signal_files(tmp_path):
    more = np.concatenate([SIGNAL, SIGNAL[:3]])
    put_wfdb(tmp_path, signal=more, names=[*LEADS, "vx", "vy", "vz"])
    lines = (tmp_path / "rec.hea").read_text().splitlines()
    samples = np.fromfile(tmp_path / "rec.dat", "<i2").reshape(-1, 15)
    samples[:, :12].tofile(tmp_path / "rec.dat")
    samples[:, 12:].tofile(tmp_path / "rec.xyz")
    (tmp_path / "rec.hea").write_text(
        "\n".join([*lines[:13], *(line.replace("rec.dat", "rec.xyz") for line in lines[13:])])
    )
    record = read_ecg(tmp_path / "rec")
    assert record.notes == ("ignored vx, vy, vz: not among the 12 leads",)
    np.testing.assert_allclose(record.signal_mv, SIGNAL, atol=6e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f4"])
def test_npy_either_way_round(tmp_path, transposed, dtype):
    array = SIGNAL.astype(dtype)
    np.save(tmp_path / "a.npy", array.T if transposed else array)
    record = read_ecg(tmp_path / "a.npy")
    np.testing.assert_array_equal(record.signal_mv, array.astype(np.float64))
    assert record.notes == ("no sampling rate is given: taken for 500 Hz",)


@given(length=st.integers(13, 700), transposed=st.booleans())
@settings(max_examples=15)
def test_e7_npy_of_any_length(tmp_path_factory, length, transposed):
    path = tmp_path_factory.mktemp("ecg") / "a.npy"
    signal = made_ecg(first_r_s=0.01)[:, :length]
    np.save(path, signal.T if transposed else signal)
    assert read_ecg(path, rate_hz=500).signal_mv.shape == (12, length)


def test_e7_hours_of_nothing_in_a_small_file_are_refused_before_they_take_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", signal=np.zeros((12, 8_000_000), np.int8))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    refused(tmp_path / "a.npz", "signal: expected at most", "as its file is that small")


def test_npy_with_what_the_caller_knows(tmp_path):
    order = [*range(6, 12), *range(6)]
    np.save(tmp_path / "a.npy", np.round(made_ecg(rate_hz=250)[order] * 1000).astype(np.int16))
    names = [LEADS[row] for row in order]
    record = read_ecg(tmp_path / "a.npy", rate_hz=250, units="uV", lead_names=names)
    np.testing.assert_allclose(record.signal_mv, made_ecg(rate_hz=250), atol=6e-4)
    assert (record.rate_hz, record.notes) == (250, ())


def test_npy_of_eight_leads_names_them(tmp_path):
    np.save(tmp_path / "a.npy", SIGNAL[[0, 1, *range(6, 12)]])
    refused(tmp_path / "a.npy", "8 channels", "lead_names=")
    names = ["I", "II", *LEADS[6:]]
    record = read_ecg(tmp_path / "a.npy", lead_names=names, derive=True)
    np.testing.assert_allclose(record.signal_mv, SIGNAL, atol=1e-12)


@pytest.mark.parametrize("key", ["signal", "ecg"])
def test_npz_that_knows_everything(tmp_path, key):
    order = [*range(11, -1, -1)]
    content = {key: SIGNAL[order] * 1000, "rate": 250, "leads": [LEADS[row] for row in order], "units": "uV"}
    np.savez(tmp_path / "a.npz", **content)
    record = read_ecg(tmp_path / "a.npz")
    np.testing.assert_allclose(record.signal_mv, SIGNAL)
    assert (record.rate_hz, record.notes) == (250, ())


def test_npz_of_nothing_but_samples(tmp_path):
    np.savez(tmp_path / "a.npz", ecg=SIGNAL)
    assert read_ecg(tmp_path / "a.npz", rate_hz=500).notes == ()
    np.savez(tmp_path / "b.npz", x=SIGNAL, y=SIGNAL)
    refused(tmp_path / "b.npz", "arrays x, y", "'signal' or 'ecg'")


@pytest.mark.parametrize(
    ("time", "delimiter", "unit"), [("time", ",", ""), ("Seconds", ";", " (mV)"), (None, ",", "_uV")]
)
def test_csv(tmp_path, time, delimiter, unit):
    factor = 1000 if "u" in unit else 1
    header = [*([time] if time else []), *(lead + unit for lead in LEADS)]
    columns = [*([np.arange(5000) / 250] if time else []), *(SIGNAL * factor)]
    lines = [
        delimiter.join(header),
        *(delimiter.join(repr(float(value)) for value in line) for line in np.array(columns).T),
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    record = read_ecg(tmp_path / "a.csv")
    np.testing.assert_allclose(record.signal_mv, SIGNAL)
    assert (record.rate_hz, len(record.notes)) == ((250, 0) if time else (500, 1))


def test_csv_of_paper_has_empty_cells(tmp_path):
    shown = on_paper(SIGNAL)
    lines = [",".join(LEADS), *(",".join("" if v != v else repr(float(v)) for v in line) for line in shown.T)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    record = read_ecg(tmp_path / "a.csv", rate_hz=500)
    np.testing.assert_array_equal(record.signal_mv, shown)
    assert not record.simultaneous


# ------------------------------------------------------------------------ what files say, and what callers say


def test_e2_a_rate_that_contradicts_the_file(tmp_path):
    put_wfdb(tmp_path)
    refused(tmp_path / "rec", "got 100 Hz", "500 Hz, as it says", rate_hz=100)
    assert read_ecg(tmp_path / "rec", rate_hz=500).rate_hz == 500


def test_e2_a_header_without_a_rate_that_can_be(tmp_path):
    put_wfdb(tmp_path)
    header = tmp_path / "rec.hea"
    header.write_text(header.read_text().replace(" 500 5000", " 0 5000"))
    refused(tmp_path / "rec", "rate_hz", "80 to 20000")


def test_a_header_without_lead_names(tmp_path):
    put_wfdb(tmp_path)
    header = tmp_path / "rec.hea"
    first, *lines = header.read_text().splitlines()
    header.write_text("\n".join([first, *(line.rpartition(" ")[0] for line in lines)]))
    np.testing.assert_allclose(read_ecg(tmp_path / "rec").signal_mv, SIGNAL, atol=6e-4)


# --------------------------------------------------------------------------------------------- faults, E8, D1


def test_e8_fewer_samples_than_the_header_says(tmp_path):
    put_wfdb(tmp_path)
    data = tmp_path / "rec.dat"
    for kept in (len(data.read_bytes()) - 24 * 1000, 24 * 100 + 1, 0):
        data.write_bytes(data.read_bytes()[:kept])
        refused(tmp_path / "rec", "intact ECG")


@pytest.mark.parametrize("byte", [0, 60_001, 119_999])
def test_e8_a_changed_byte(tmp_path, byte):
    put_wfdb(tmp_path)
    data = bytearray((tmp_path / "rec.dat").read_bytes())
    data[byte] ^= 1
    (tmp_path / "rec.dat").write_bytes(bytes(data))
    refused(tmp_path / "rec", "checksum", f"other samples in {LEADS[byte // 2 % 12]};")


def test_a_header_without_checksums_is_read(tmp_path):
    put_wfdb(tmp_path)
    header = tmp_path / "rec.hea"
    first, *lines = header.read_text().splitlines()
    header.write_text("\n".join([first, *(" ".join(line.split()[:5]) for line in lines)]))
    np.testing.assert_allclose(read_ecg(tmp_path / "rec", lead_names=LEADS).signal_mv, SIGNAL, atol=6e-4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\xff",
        "rec",
        "rec 12 500 5000\n",
        "rec/2 12 500 5000\na 2500\nb 2500\n",
        "rec 1 500 9\n../../x.dat 16 1\n",
    ],
)
def test_a_header_that_makes_no_sense(tmp_path, text):
    put_wfdb(tmp_path)
    (tmp_path / "rec.hea").write_text(text, encoding="latin-1")
    refused(tmp_path / "rec")


def test_a_record_without_its_samples(tmp_path):
    put_wfdb(tmp_path)
    (tmp_path / "rec.dat").unlink()
    refused(tmp_path / "rec", "rec.dat", "No such file")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.csv", "a.hea", "a"])
def test_d1_nothing_there_and_a_folder(tmp_path, name):
    refused(tmp_path / name)
    (tmp_path / name).mkdir()
    refused(tmp_path / name, "irectory" if name[1:] in (".npy", ".npz", ".csv") else "a folder")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    refused(tmp_path / "a.pdf", "another kind", ".npy")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"I,II\n1,x\n", b"PK\x03\x04rest", b"\x93NUMPY\x01\x00v\x00{"])
def test_d_damage_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize(
    "array", [np.zeros(5000), np.zeros((12, 12)), np.zeros((2, 3, 4)), np.array([["a"] * 13] * 12)]
)
def test_arrays_that_are_no_leads(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy")


class Bomb:
    def __reduce__(self):
        return (subprocess.check_call, (["touch", "exploded"],))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    array = np.empty((12, 20), object)
    array[:] = Bomb()
    np.save(tmp_path / "a.npy", array) if name == "a.npy" else np.savez(tmp_path / "a.npz", signal=array)
    refused(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("times", [[0, 0.002, 0.004, 0.02], [0, 0, 0, 0], [3, 2, 1, 0]])
def test_csv_whose_time_does_not_run_evenly(tmp_path, times):
    lines = [",".join(["time", *LEADS]), *(",".join(map(str, [t, *range(12)])) for t in times)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    refused(tmp_path / "a.csv", "time", "evenly")


def test_l6_wfdb_is_not_installed(tmp_path, monkeypatch):
    put_wfdb(tmp_path)
    np.save(tmp_path / "a.npy", SIGNAL)
    monkeypatch.setitem(sys.modules, "wfdb", None)
    with pytest.raises(MissingExtra, match=r"reading rec\.hea needs wfdb.*trifuse\[ecg\]"):
        read_ecg(tmp_path / "rec")
    assert read_ecg(tmp_path / "a.npy").usable.all()


def test_reading_prints_and_warns_nothing(tmp_path, capsys):
    put_wfdb(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_ecg(tmp_path / "rec")
    assert capsys.readouterr() == ("", "")


def test_d28_records_that_share_a_file_are_told_apart_by_their_checksums(tmp_path):
    (tmp_path / "both.dat").write_bytes(bytes(4000))
    for name, checksum in (("first", 7), ("second", 8), ("copy", 7)):
        lines = [f"{name} 2 500 1000", *(f"both.dat 16 200 16 0 0 {checksum} 0 {lead}" for lead in ("I", "II"))]
        (tmp_path / f"{name}.hea").write_text("\n".join(lines) + "\n")
    first, second, copy = (digest_of_samples(tmp_path / name) for name in ("first", "second", "copy"))
    assert first == copy != second
    assert first == digest_of_samples(tmp_path / "first.hea") == digest_of_samples(tmp_path / "first.dat")
