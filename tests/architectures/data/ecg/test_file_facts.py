"""What an ECG's file says, does not say, or says in a form that it must not have: never a library's default."""

from __future__ import annotations

import zipfile
from functools import partial

import numpy as np
import pytest
import wfdb
from made_ecg import made_ecg
from refused_cohort import refused_by

from trifuse.architectures.data.ecg.files import read_ecg
from trifuse.architectures.data.ecg.signal import LEADS

SIGNAL = made_ecg(2)
COUNTS = np.round(SIGNAL.T * 1000).astype(np.int64)
HELD = COUNTS.T / 1000


@pytest.fixture
def record(tmp_path):
    """A WFDB record of 12 leads, 1000 counts to the millivolt; ``record(old, new)`` replaces text of its header."""
    wfdb.wrsamp(
        "rec",
        fs=500,
        units=["mV"] * 12,
        sig_name=list(LEADS),
        d_signal=COUNTS,
        fmt=["16"] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[0] * 12,
        write_dir=str(tmp_path),
    )

    def change(*pairs, times=-1):
        header = tmp_path / "rec.hea"
        text = header.read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new, times)
        header.write_text(text, newline="")
        return tmp_path / "rec"

    return change


def refused(path, *words, **options):
    refused_by(partial(read_ecg, path, **options), *words)


# ------------------------------------------------------------------------------------------------ WFDB


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ("0.5", ("500 Hz if it is in kHz",)),
        ("2", ("500 Hz if it is in milliseconds per sample",)),
        ("50", ("80 to 20000",)),
        ("1e300", ("80 to 20000",)),
        ("nan", ("rec.hea", "rate", "got nan")),
        ("inf", ("rec.hea", "got inf")),
        ("500,5", ("rec.hea", "got 500,5")),
        ("500Hz", ("rec.hea", "got 500Hz")),
    ],
)
def test_e2_a_wfdb_rate_is_read_as_it_is_written(record, rate, words):
    refused(record((" 500 ", f" {rate} ")), *words)


@pytest.mark.parametrize("rate", ["500", "500.0", "5e2", "500/250", "500/250.5(-7)"])
def test_e2_forms_of_a_wfdb_rate(record, rate):
    assert read_ecg(record((" 500 ", f" {rate} "))).rate_hz == 500


def test_e2_e12_a_wfdb_header_without_a_rate(record):
    path = record((" 500 1000", ""))
    found = read_ecg(path)
    assert (found.rate_hz, found.notes) == (250, ("no sampling rate is given: taken for 250 Hz",))
    assert (read_ecg(path, rate_hz=500).rate_hz, read_ecg(path, rate_hz=500).notes) == (500, ())


@pytest.mark.parametrize("gain", ["0(0)/mV", "0", "0.0/mV"])
def test_e3_e12_a_gain_of_zero_is_none(record, gain):
    refused(record(("1000.0(0)/mV", gain)), "rec.hea", "gain", f"of {', '.join(LEADS[:3])}", "millivolt")


def test_e3_e12_a_gain_that_is_left_out(record):
    path = record()
    first, *lines = path.with_suffix(".hea").read_text().splitlines()
    path.with_suffix(".hea").write_text("\n".join([first, *(" ".join(line.split()[:2]) for line in lines)]))
    refused(path, "gain", "signal 1, signal 2")


@pytest.mark.parametrize("gain", ["1000,0(0)/mV", "nan/mV", "x", "1000(0.5)/mV"])
def test_e3_a_gain_in_another_form(record, gain):
    refused(record(("1000.0(0)/mV", gain)), "signal 12: expected counts per unit", gain)


def test_e3_e12_a_line_without_its_gain_is_not_shifted(record):
    refused(record((" 1000.0(0)/mV 16 0", " 16 0")), "whole numbers between gain and name")


def test_e3_e12_units_that_only_some_leads_have(record):
    refused(record(("1000.0(0)/mV", "1000.0(0)"), times=1), "units: expected one of each lead, or none, got none of I")
    np.testing.assert_allclose(read_ecg(record(("/mV", ""))).signal_mv, HELD)


@pytest.mark.parametrize(
    ("rate", "notes"), [(" 250 500", ()), ("", ("no sampling rate is given: taken for 500 Hz",))], ids=["said", "not"]
)
def test_e2_e12_rates_of_single_signals(record, tmp_path, rate, notes):
    """The rate is that of the frames, 250 where none is said, and each lead has two samples in a frame."""
    path = record()
    first, *lines = path.with_suffix(".hea").read_text().splitlines()
    frames = np.concatenate([COUNTS.reshape(500, 2, 12).transpose(0, 2, 1).reshape(500, 24), np.zeros((500, 1))], 1)
    frames.astype("<i2").tofile(tmp_path / "rec.dat")
    header = [first.replace("12 500 1000", f"13{rate}"), *(line.replace(" 16 1000", " 16x2 1000") for line in lines)]
    path.with_suffix(".hea").write_text("\n".join([*header, "rec.dat 16 0/L 16 0 0 0 0 RESP"]))
    found = read_ecg(path)
    np.testing.assert_allclose(found.signal_mv, HELD)
    assert (found.rate_hz, found.notes) == (500, ("ignored RESP: not among the 12 leads", *notes))
    header[1:3] = [line.replace("16x2", "16x3") for line in header[1:2]] + [header[2].replace("16x2", "16")]
    path.with_suffix(".hea").write_text("\n".join([*header, "rec.dat 16 0/L 16 0 0 0 0 RESP"]))
    refused(path, "samples per frame", "the same of all leads", "I 3, II 1, III 2")


def test_e8_checksums_that_are_left_out_are_said(record):
    path = record()
    first, *lines = path.with_suffix(".hea").read_text().splitlines()
    path.with_suffix(".hea").write_text("\n".join([first, *(" ".join(line.split()[:5]) for line in lines)]))
    assert read_ecg(path).notes == ("its header has no checksums: damage to the samples would go unseen",)


DATES = [
    *("05-May-2020 09:49:17", "2014-05-08 05:05:15", "09:49:17 05-May-2020", "12:33:59 12/05/2020", "13/31/2020"),
    *("9:5:3.25 1/2/2020", "05.05.2020", "2020-05-05T09:49:17Z", "0:0:0 00/00/0000", "unknown", "25:61:61 5/5/20"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("date", DATES)
def test_e13_dates_of_a_header_in_any_form(record, tmp_path, date, mark, end):
    """Nothing here needs them, and the PhysioNet Challenge of 2021 writes them as the format does not."""
    stem = record((f" 500 {len(COUNTS)}", f" 500 {len(COUNTS)} {date}"))
    header = tmp_path / "rec.hea"
    lines = ["# a line of text before the first", *header.read_text().splitlines(), "#Age: 71", "#Dx: 270492004"]
    header.write_bytes(mark + end.join([*lines, ""]).encode())
    for name in (stem, header, tmp_path / "rec.dat"):
        found = read_ecg(name)
        np.testing.assert_allclose(found.signal_mv, HELD, atol=1e-9)
        assert found.rate_hz == 500


def test_e13_a_header_of_the_challenge_of_2021(record, tmp_path):
    """Samples in a MATLAB file behind 24 bytes, millivolts in small letters."""
    stem = record((f" 500 {len(COUNTS)}", f" 500 {len(COUNTS)} 05-May-2020 09:49:17"), ("rec.dat 16", "rec.mat 16+24"))
    record(("1000.0(0)/mV", "1000/mv"))
    (tmp_path / "rec.mat").write_bytes(bytes(24) + (tmp_path / "rec.dat").read_bytes())
    (tmp_path / "rec.dat").unlink()
    for name in (stem, tmp_path / "rec.mat"):
        np.testing.assert_allclose(read_ecg(name).signal_mv, HELD, atol=1e-9)


def test_e8_a_record_with_a_date_is_looked_at_as_closely(record, tmp_path):
    stem = record((f" 500 {len(COUNTS)}", f" 500 {len(COUNTS)} 2014-05-08 05:05:15"))
    samples = bytearray((tmp_path / "rec.dat").read_bytes())
    samples[100] ^= 1
    (tmp_path / "rec.dat").write_bytes(samples)
    refused(stem, f"{tmp_path}/rec: checksum")
    (tmp_path / "rec.dat").unlink()
    refused(stem, f"{tmp_path}/rec: file", "rec.dat")


def test_e12_all_faults_of_a_header_at_once(record):
    path = record(
        (" 500 ", " nan "),
        (
            " 16 1000.0(0)/mV",
            " 16 x",
        ),
    )
    refused(path, "13 problems", "rate", "signal 1:", "signal 12:")
    assert read_ecg(record((" nan ", " 500 "), (" 16 x", " 16 1000/mV"), ("\n", "\r\n"))).rate_hz == 500


@pytest.mark.parametrize(("old", "new"), [("rec 12", "rec/2 12"), ("rec 12", "rec 11"), ("rec 12 500 1000", "rec")])
def test_a_header_of_other_signals(record, old, new):
    refused(record((old, new)), "rec.hea")


# ------------------------------------------------------------------------------------------------- CSV


def put_csv(path, columns, names=LEADS, separator=",", form=repr):
    lines = [separator.join(names), *(separator.join(form(float(v)) for v in line) for line in np.array(columns).T)]
    path.write_text("\n".join(lines) + "\n")
    return path


def with_commas(value):
    return f"{value:.6f}".replace(".", ",")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_e14_csv_with_decimal_commas(tmp_path, separator):
    path = put_csv(tmp_path / "a.csv", SIGNAL, separator=separator, form=with_commas)
    found = read_ecg(path, rate_hz=500)
    np.testing.assert_allclose(found.signal_mv, SIGNAL, atol=1e-6)
    assert found.notes == ("commas are taken for decimal points",)
    assert read_ecg(put_csv(path, SIGNAL, separator=separator), rate_hz=500).notes == ()


def test_e14_csv_whose_commas_may_separate_thousands(tmp_path):
    path = put_csv(tmp_path / "a.csv", SIGNAL * 1e6, separator=";", form=lambda value: f"{value:,.1f}")
    refused(path, "points and commas", rate_hz=500)


def test_e14_csv_with_decimal_commas_between_commas(tmp_path):
    refused(put_csv(tmp_path / "a.csv", SIGNAL, form=with_commas), "line 2", "24 cells", "by semicolons")


def test_csv_with_a_column_twice(tmp_path):
    names = ["I", *LEADS]
    refused(put_csv(tmp_path / "a.csv", SIGNAL[[0, *range(12)]], names), "I more than once")


def test_csv_with_units_of_some_leads(tmp_path):
    names = [*(f"{lead}_uV" for lead in LEADS[:6]), *LEADS[6:]]
    refused(put_csv(tmp_path / "a.csv", SIGNAL, names), "units", "none of V1, V2")
    names = [*(f"{lead}_uV" for lead in LEADS), "pulse"]
    path = put_csv(tmp_path / "a.csv", [*SIGNAL * 1000, SIGNAL[0]], names)
    np.testing.assert_allclose(read_ecg(path, rate_hz=500).signal_mv, SIGNAL)


def test_csv_with_a_time_that_is_rounded(tmp_path):
    signal = made_ecg(2, rate_hz=360)
    path = put_csv(tmp_path / "a.csv", [np.round(np.arange(720) / 360, 3), *signal], ["time", *LEADS])
    assert read_ecg(path).rate_hz == pytest.approx(360, rel=1e-3)


def test_e2_csv_with_a_time_in_milliseconds(tmp_path):
    path = put_csv(tmp_path / "a.csv", [np.arange(1000) * 2.0, *SIGNAL], ["time", *LEADS])
    refused(path, "500 Hz if it is in kHz")


def test_csv_says_in_which_line_no_number_is(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(LEADS) + "\n" + ",".join(["1"] * 12) + "\n\n" + ",".join(["1"] * 11 + ["x"]) + "\n")
    refused(path, "line 4", "'x'")
    path.write_text(",".join(LEADS) + "\n")
    refused(path, "no line of numbers")


@pytest.mark.parametrize(
    "name", ["time_ms", "Time [ms]", "ms", "t (s)", "time [s]", "Time (s)", "Zeit_s", "sec", "Zeit", "T"]
)
def test_e2_csv_with_a_time_of_any_usual_name(tmp_path, name):
    time = np.arange(SIGNAL.shape[1]) * (4.0 if "ms" in name else 0.004)
    assert read_ecg(put_csv(tmp_path / "a.csv", [time, *SIGNAL], [name, *LEADS])).rate_hz == 250


def test_e2_csv_with_a_time_of_another_name_is_refused(tmp_path):
    number = np.arange(SIGNAL.shape[1])
    for name in ("elapsed", "timestamp", "Zeit in s"):
        path = put_csv(tmp_path / "a.csv", [number * 0.004, *SIGNAL], [name, *LEADS])
        refused(path, f"column {name!r}", "values that rise by 0.004", "time_s or time_ms")
    for name, step in (("elapsed", 1), ("Sample", 2)):  # neither alone, the name or the step, makes it a count
        path = put_csv(tmp_path / "a.csv", [number * step, *SIGNAL], [name, *LEADS])
        refused(path, f"column {name!r}", f"values that rise by {step}")
    path = put_csv(tmp_path / "a.csv", [number * 0.004, number * 5, *SIGNAL], ["t", "ms", *LEADS])
    refused(path, "time: expected one rate, got t 250 Hz, ms 200 Hz")
    for name in ("", "Sample"):
        path = put_csv(tmp_path / "a.csv", [number, *SIGNAL], [name, *LEADS])
        assert read_ecg(path, rate_hz=250).rate_hz == 250


# --------------------------------------------------------------------------- NumPy, and what callers say


@pytest.mark.parametrize("rate", ["fs", "sampling_rate", "Sampling_Frequency"])
@pytest.mark.parametrize("leads", ["lead_names", "sig_name"])
def test_e1_e2_npz_that_uses_other_names(tmp_path, rate, leads):
    order = [*range(6), *range(11, 5, -1)]
    content = {rate: 250, leads: [LEADS[row] for row in order], "unit": "mV"}
    np.savez(tmp_path / "a.npz", signal=SIGNAL[order], **content)
    record = read_ecg(tmp_path / "a.npz")
    np.testing.assert_array_equal(record.signal_mv, SIGNAL)
    assert (record.rate_hz, record.notes) == (250, ())


def test_e1_e2_npz_with_arrays_that_are_not_used(tmp_path):
    np.savez(tmp_path / "a.npz", ecg=SIGNAL, elektroden=LEADS[::-1], hz=250)
    refused(tmp_path / "a.npz", "got arrays elektroden, hz", "signal, leads, rate, units")
    np.savez(tmp_path / "b.npz", ecg=SIGNAL, signal=SIGNAL * 2)
    refused(tmp_path / "b.npz", "signal: expected one array", "ecg, signal")
    np.savez(tmp_path / "c.npz", ecg=SIGNAL, rate=500, fs=250)
    refused(tmp_path / "c.npz", "rate: expected one array", "rate, fs")


def test_npz_with_rates_and_units_of_each_lead(tmp_path):
    scale = np.where(np.arange(12) < 6, 1.0, 1000.0)[:, None]
    units = ["mV"] * 6 + ["uV"] * 6
    np.savez(tmp_path / "a.npz", ecg=SIGNAL * scale, rate=[500] * 12, units=units, leads=np.array(LEADS, "S"))
    np.testing.assert_allclose(read_ecg(tmp_path / "a.npz").signal_mv, SIGNAL)
    np.savez(tmp_path / "b.npz", ecg=SIGNAL, rate=[500] * 6 + [250] * 6)
    refused(tmp_path / "b.npz", "rate", "250", "500", "of all leads")
    np.savez(tmp_path / "c.npz", ecg=SIGNAL, rate=500, units=units[:5])
    refused(tmp_path / "c.npz", "units", "12, one for each channel")


def test_npz_with_an_array_twice(tmp_path):
    np.savez(tmp_path / "a.npz", ecg=SIGNAL)
    np.save(tmp_path / "b.npy", SIGNAL * 2)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.write(tmp_path / "b.npy", "ecg.npy")
    refused(tmp_path / "a.npz", "ecg.npy, ecg.npy", "each name once")


@pytest.mark.parametrize("said", [{"units": "uV"}, {"lead_names": LEADS[::-1]}, {"rate_hz": 250}, {"rate_hz": np.nan}])
def test_e12_a_caller_who_says_otherwise_than_the_file(tmp_path, said):
    np.savez(tmp_path / "a.npz", ecg=SIGNAL, rate=500, units="mV", leads=LEADS)
    refused(tmp_path / "a.npz", *said, "as it says", **said)
    assert read_ecg(tmp_path / "a.npz", rate_hz=500, units="mV", lead_names=LEADS).rate_hz == 500
