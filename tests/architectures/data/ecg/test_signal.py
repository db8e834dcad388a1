"""Twelve leads in order: names, units, faults of leads and of the whole, and another sampling rate."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made_ecg import made_ecg, on_paper

from trifuse.architectures.data.ecg.signal import LEADS, arrange_leads, at_rate, lead_row
from trifuse.kernels import DataError, MissingExtra

SIGNAL = made_ecg()


def arranged(signal=SIGNAL, names=LEADS, **options):
    return arrange_leads(signal, names, **{"rate_hz": 500, "name": "a record", **options})


def refused(*words, signal=SIGNAL, names=LEADS, **options):
    with pytest.raises(DataError) as caught:
        arranged(signal, names, **options)
    for word in ("a record", *words):
        assert word in str(caught.value), str(caught.value)


def test_a_sound_record_is_left_alone():
    record = arranged()
    np.testing.assert_array_equal(record.signal_mv, SIGNAL)
    assert record.usable.all()
    assert (record.rate_hz, record.duration_s, record.simultaneous, record.notes) == (500, 10, True, ())


# ------------------------------------------------------------------------------------- names and order, E1

SPELLINGS = [
    ("avr", "aVR"),
    ("AVR", "aVR"),
    ("aVr", "aVR"),
    ("LEAD II", "II"),
    ("Lead_iii", "III"),
    ("MDC_ECG_LEAD_V1", "V1"),
    ("MDC_ECG_LEAD_AVF", "aVF"),
    ("ECG aVL", "aVL"),
    ("ecg_v6", "V6"),
    (" v5 ", "V5"),
    ("DI", "I"),
]


@pytest.mark.parametrize(("spelling", "lead"), SPELLINGS)
def test_e1_usual_spellings(spelling, lead):
    assert lead_row(spelling) == LEADS.index(lead)


@pytest.mark.parametrize("spelling", ["", "V7", "vx", "-aVR", "V", "IIII", "MLII", "lead", "RESP", "1"])
def test_e1_other_channels_are_no_leads(spelling):
    assert lead_row(spelling) is None


@given(st.permutations(range(12)), st.sampled_from([str.lower, str.upper, "LEAD {}".format]))
def test_e1_any_order_is_put_right(order, spell):
    record = arranged(SIGNAL[list(order)], [spell(LEADS[row]) for row in order])
    np.testing.assert_array_equal(record.signal_mv, SIGNAL)


def test_e1_missing_leads_are_all_listed():
    rows = [0, 1, 2, 3, 4, 5, 6, 8, 10]
    refused("no V2, V4, V6", "12 leads", signal=SIGNAL[rows], names=[LEADS[row] for row in rows], derive=True)


def test_e1_limb_leads_are_computed_only_on_demand():
    rows = [0, 1, *range(6, 12)]
    names = [LEADS[row] for row in rows]
    refused("no III, aVR, aVL, aVF", "derive=True", signal=SIGNAL[rows], names=names)
    record = arranged(SIGNAL[rows], names, derive=True)
    np.testing.assert_allclose(record.signal_mv, SIGNAL, atol=1e-12)
    assert "computed III, aVR, aVL, aVF from I and II" in record.notes


def test_e1_nothing_follows_from_one_limb_lead():
    rows = [1, *range(6, 12)]
    refused("no I, III, aVR", signal=SIGNAL[rows], names=[LEADS[row] for row in rows], derive=True)


def test_e1_a_lead_named_twice():
    refused("ii and Lead II", "II once", signal=SIGNAL[[0, 1, 1]], names=["I", "ii", "Lead II"])


def test_further_channels_are_ignored_with_a_note():
    more = np.concatenate([np.full((2, SIGNAL.shape[1]), 1e6), SIGNAL])
    record = arranged(more, ["vx", "vy", *LEADS], units=["?", "?", *["mV"] * 12])
    np.testing.assert_array_equal(record.signal_mv, SIGNAL)
    assert record.notes == ("ignored vx, vy: not among the 12 leads",)


# ------------------------------------------------------------------------------------------- units, E3


@pytest.mark.parametrize(
    ("units", "factor"), [("uV", 1e3), ("µV", 1e3), ("μV", 1e3), ("mV", 1), ("V", 1e-3), ("nV", 1e6)]
)
def test_e3_units(units, factor):
    np.testing.assert_allclose(arranged(SIGNAL * factor, units=units).signal_mv, SIGNAL)


def test_e3_units_of_each_channel():
    factors = np.where(np.arange(12) % 2, 1e3, 1.0)
    units = ["uV" if factor > 1 else "mV" for factor in factors]
    np.testing.assert_allclose(arranged(SIGNAL * factors[:, None], units=units).signal_mv, SIGNAL)


def test_e3_an_unknown_unit():
    refused("'adu'", "units='mV'", units="adu")


def test_e3_microvolts_under_the_name_of_millivolts():
    refused("units='uV'", "0.02 to 20 mV", signal=SIGNAL * 1000)


def test_e3_millivolts_under_the_name_of_microvolts():
    refused("units='mV'", "0.02 to 20 mV", signal=SIGNAL, units="uV")


def test_e3_electrodes_offset_is_no_amplitude():
    arranged(SIGNAL + 300)


# ------------------------------------------------------------------------------- quality of leads, E4


def spoilt(fault, rows, signal=SIGNAL):
    signal = signal.copy()
    for row in rows:
        signal[row] = fault(signal[row])
    return signal


def cut_off(lead):
    return np.minimum(lead, 0.3 * lead.max())


FAULTS = {
    "flat": np.zeros_like,
    "flat at an offset": lambda lead: np.full_like(lead, 2.5),
    "flat most of the time": lambda lead: np.where(np.arange(lead.size) < 3000, 0.0, lead),
    "saturated": cut_off,
    "missing": lambda lead: np.where(np.arange(lead.size) < 400, np.nan, lead),
    "nothing was recorded": lambda lead: np.full_like(lead, np.nan),
    "5000 samples are missing": lambda lead: np.where(np.arange(lead.size) % 10 == 0, np.inf, lead),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_e4_a_spoilt_lead_is_masked_and_said(fault):
    record = arranged(spoilt(FAULTS[fault], [7, 9]), simultaneous=True)
    assert list(np.flatnonzero(~record.usable)) == [7, 9]
    assert not record.signal_mv[[7, 9]].any()
    assert [note.split(" is not used: ")[0] for note in record.notes] == ["V2", "V4"]
    word = "samples are missing" if "missing" in fault else fault.split()[0]
    assert all(word in note for note in record.notes)


def test_e4_a_lead_at_the_end_of_its_scale_upside_down():
    assert not arranged(spoilt(lambda lead: -cut_off(lead), [10])).usable[10]


@pytest.mark.parametrize("length", [1, 7, 20])
def test_e4_short_gaps_are_bridged(length):
    gap = slice(1000, 1000 + length)
    signal = SIGNAL.copy()
    signal[6, gap] = np.nan
    record = arranged(signal)
    assert record.usable.all()
    assert record.notes == (f"V1: bridged {length} missing samples",)
    assert SIGNAL[6, 999:1021].min() - 1e-9 <= record.signal_mv[6, gap].min()
    np.testing.assert_array_equal(np.delete(record.signal_mv, np.r_[gap], 1), np.delete(SIGNAL, np.r_[gap], 1))


def test_e4_no_lead_at_all():
    refused("a lead that shows a heart beat", "I is not used", "V6 is not used", signal=np.zeros((12, 5000)))
    refused("nothing was recorded", signal=np.full((12, 5000), np.nan))


def test_e4_a_quiet_baseline_is_neither_flat_nor_saturated():
    """Without noise a lead of upright waves rests on its lowest value between them."""
    waves = made_ecg(noise_mv=0, bpm=50) - made_ecg(noise_mv=0, bpm=1e-3)
    assert arranged(np.maximum(np.round(np.abs(waves), 3), 0.01), simultaneous=False).usable.all()


@example(3, [(100, 5)], False)
@given(st.integers(0, 11), st.lists(st.tuples(st.integers(0, 4999), st.integers(1, 1500)), max_size=4), st.booleans())
def test_e4_never_nan(row, runs, infinite):
    signal = SIGNAL.copy()
    for start, length in runs:
        signal[row, start : start + length] = np.inf if infinite else np.nan
    record = arranged(signal, simultaneous=True)
    assert np.isfinite(record.signal_mv).all()
    assert record.usable.sum() >= 11
    assert record.usable.all() or any(LEADS[row] in note for note in record.notes)


# ------------------------------------------------------------------------------------ leads against each other


def test_leads_that_break_einthovens_triangle():
    refused("I, II, III", "%", "simultaneous=False", signal=SIGNAL[[1, 0, *range(2, 12)]] * ([[1.5]] + [[1]] * 11))
    refused("I + III differs from II", signal=spoilt(np.negative, [2]))


@pytest.mark.parametrize(("share", "sound"), [(0.25, True), (0.35, False)])
def test_the_triangle_s_tolerance_is_30_percent(share, sound):
    signal = SIGNAL.copy()
    largest = max(np.linalg.norm(lead - lead.mean()) for lead in signal[:3])
    strange = np.random.default_rng(0).normal(size=5000)
    signal[2] += strange * share * largest / np.linalg.norm(strange - strange.mean())
    if sound:
        arranged(signal)
    else:
        refused("35%", "less than 30%", signal=signal)


def test_offsets_do_not_break_the_triangle():
    assert arranged(SIGNAL + np.arange(12)[:, None]).notes == ()


def test_a_triangle_with_a_masked_lead_is_not_checked():
    record = arranged(spoilt(np.zeros_like, [0]))
    assert "Einthoven's triangle not checked: a limb lead is missing" in record.notes


def test_leads_that_were_not_recorded_together_have_no_triangle():
    record = arranged(SIGNAL[[1, 0, *range(2, 12)]] * ([[1.5]] + [[1]] * 11), simultaneous=False)
    assert record.notes == ()


def test_an_inverted_avr_is_said():
    assert "Cabrera" in arranged(spoilt(np.negative, [3])).notes[0]


# ----------------------------------------------------------------------------------------- on paper, and rates


@pytest.mark.parametrize("rhythm", [True, False])
def test_paper_is_recognised(rhythm):
    shown = on_paper(SIGNAL, rhythm)
    record = arranged(shown)
    assert (record.simultaneous, record.usable.all(), record.notes) == (False, True, ())
    np.testing.assert_array_equal(record.signal_mv, shown)


@pytest.mark.parametrize(
    ("rate", "probable"),
    [
        (0.5, "500 Hz if it is in kHz or 2000 Hz if it is in milliseconds per sample"),
        (0.002, "500 Hz if it is in seconds per sample"),
        (2, "500 Hz if it is in milliseconds per sample"),
        (1, "1000 Hz if it is in kHz or 1000 Hz if it is in milliseconds per sample"),
        (500_000, "500 Hz if it is in mHz"),
        *((rate, "whoever recorded it knows its rate") for rate in (20, 50, 79.9, 0, -500, 1e300, np.nan, np.inf)),
    ],
)
def test_e2_a_rate_that_no_ecg_has(rate, probable):
    refused("rate_hz", "samples per second, 80 to 20000", probable, rate_hz=rate)


@pytest.mark.parametrize("rate", [80, 20_000])
def test_e2_the_rates_at_the_edge(rate):
    assert arranged(made_ecg(seconds=2, rate_hz=rate), rate_hz=rate).rate_hz == rate


@pytest.mark.parametrize("rate", [100, 250, 360, 1000])
def test_e2_resampling_keeps_the_waves(rate):
    record = at_rate(arranged(made_ecg(rate_hz=rate, noise_mv=0), rate_hz=rate))
    assert (record.rate_hz, record.signal_mv.shape) == (500, (12, 5000))
    assert record.notes == (f"resampled from {rate} to 500 Hz",)
    difference = record.signal_mv - made_ecg(noise_mv=0)
    assert np.abs(difference[:, 50:-50]).max() < (0.06 if rate == 100 else 0.01)


def test_e2_a_record_at_the_rate_is_returned_as_it_is():
    record = arranged()
    assert at_rate(record) is record


def test_resampling_keeps_paper_where_it_was():
    shown = on_paper(made_ecg(rate_hz=250, noise_mv=0))
    record = at_rate(arranged(shown, rate_hz=250))
    expected = on_paper(made_ecg(noise_mv=0))
    np.testing.assert_array_equal(np.isnan(record.signal_mv), np.isnan(expected))
    assert np.nanmax(np.abs(record.signal_mv - expected)) < 0.15  # at the cut ends of a lead
    assert np.nanmedian(np.abs(record.signal_mv - expected)) < 1e-3


def test_l6_resampling_without_scipy(monkeypatch):
    record = arranged(made_ecg(rate_hz=250), rate_hz=250)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(MissingExtra, match=r"resampling an ECG needs scipy.*trifuse\[med\]"):
        at_rate(record)
