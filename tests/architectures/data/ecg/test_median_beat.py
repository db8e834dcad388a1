"""From a record to one beat: the beats that were put in come out, faults end in an error and never in NaN."""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_ecg import made_ecg, on_paper, waves_at

from trifuse.architectures.data.ecg.files import read_ecg
from trifuse.architectures.data.ecg.median_beat import Beat, _alike, load_beat, median_beat, network_ecg
from trifuse.architectures.data.ecg.signal import LEADS, arrange_leads
from trifuse.kernels import DataError, MissingExtra

TRUTH = waves_at(np.arange(600) / 500 - 0.4)
NEXT_BEAT = 500  # samples from which the next beat is seen, at the rates used here


def record_of(signal, rate_hz=500, **options):
    return arrange_leads(signal, LEADS, rate_hz=rate_hz, name="a record", **options)


def refused(*words, signal=None, record=None, **options):
    with pytest.raises(DataError) as caught:
        median_beat(record_of(signal) if record is None else record, **options)
    for word in ("a record", *words):
        assert word in str(caught.value), str(caught.value)


def likeness(beat, rows=range(12), part=slice(80, NEXT_BEAT)):
    """Return the smallest correlation of a lead with what was put in."""
    return min(np.corrcoef(beat.signal_mv[row, part], TRUTH[row, part])[0, 1] for row in rows)


# --------------------------------------------------------------------------------------------- whole records


def test_the_beat_that_was_put_in():
    beat = median_beat(record_of(made_ecg(bpm=60)))
    assert (beat.signal_mv.shape, beat.signal_mv.dtype, beat.usable.all()) == ((12, 600), np.float32, True)
    assert (beat.beats, beat.notes, beat.name) == (9, (), "a record")
    assert beat.heart_rate_bpm == pytest.approx(60, abs=0.5)
    assert likeness(beat) > 0.98
    assert np.abs(beat.signal_mv - TRUTH)[:, 80:NEXT_BEAT].max() < 0.12
    assert beat.signal_mv[1].argmax() == 200


@pytest.mark.parametrize("rate", [100, 250, 1000])
def test_any_sampling_rate_gives_the_same_beat(rate):
    beat = median_beat(record_of(made_ecg(bpm=60, rate_hz=rate), rate))
    assert likeness(beat) > (0.9 if rate == 100 else 0.97)
    assert beat.notes == (f"resampled from {rate} to 500 Hz",)


@given(bpm=st.floats(40, 110), seconds=st.floats(6, 14), first=st.floats(0, 0.9), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_rates_and_lengths(bpm, seconds, first, seed):
    beat = median_beat(record_of(made_ecg(seconds, bpm, seed=seed, first_r_s=first)))
    assert beat.heart_rate_bpm == pytest.approx(bpm, rel=0.02)
    assert abs(beat.beats - (seconds - 1.2) * bpm / 60) < 2
    assert likeness(beat, part=slice(80, 380)) > 0.95
    assert abs(int(beat.signal_mv[1, 150:250].argmax()) - 50) <= 1


def test_all_leads_are_moved_together():
    """Time between the waves of leads is information: V2's S wave comes 32 ms after R in lead II."""
    beat = median_beat(record_of(made_ecg(bpm=60)))
    for row in range(12):
        assert abs(int(np.abs(beat.signal_mv[row, 150:250]).argmax()) - int(np.abs(TRUTH[row, 150:250]).argmax())) <= 1


def test_strange_beats_are_left_out():
    signal = made_ecg(bpm=60)
    time = np.arange(5000) / 500
    for r in (3.5, 6.5):  # wide and upside down, in place of a beat
        near = np.abs(time - r) < 0.45
        signal[:, near] = -1.5 * np.exp(-0.5 * ((time[near] - r) / 0.02) ** 2) * TRUTH[:, 200:201]
    beat = median_beat(record_of(signal))
    assert beat.beats == 7
    assert likeness(beat) > 0.97


def test_beats_are_compared_from_before_the_complex_to_behind_its_wave_and_no_further():
    """From 0.2 s before R, sample 200, to 0.4 s behind it."""
    wave = np.abs(TRUTH).max() * np.exp(-0.5 * (np.arange(-40, 40) / 15) ** 2)
    for middle, kept in ((150, 19), (300, 19), (350, 19), (50, 20), (500, 20)):
        beats = np.stack([TRUTH] * 20)
        beats[0, :, middle - 40 : middle + 40] += wave
        assert len(_alike(beats)) == kept, middle


def test_the_median_shrugs_off_an_artefact():
    signal = made_ecg(bpm=60)
    signal[:, 2500:2510] += 3 * TRUTH[:, 200:201]  # 0.5 s after a beat, where beats are not compared
    assert np.abs(median_beat(record_of(signal)).signal_mv - TRUTH)[:, 80:NEXT_BEAT].max() < 0.15


def test_baseline_and_offset_are_filtered_away():
    drift = 2 * np.sin(2 * np.pi * 0.1 * np.arange(5000) / 500)
    beat = median_beat(record_of(made_ecg(bpm=60) + np.arange(12)[:, None] + drift * made_weights()))
    assert likeness(beat) > 0.97
    assert np.abs(beat.signal_mv.mean(1)).max() < 0.1


def made_weights():
    """Return what a change in I, II and the chest leads alike is in each of the leads."""
    return np.array([1, 1, 0, -1, 0.5, 0.5, 1, 1, 1, 1, 1, 1])[:, None]


def test_another_lead_finds_the_beats_where_ii_is_off():
    signal = made_ecg(bpm=60)
    signal[1] = 0
    beat = median_beat(record_of(signal))
    assert not beat.usable[1]
    assert not beat.signal_mv[1].any()
    assert sum("beats found in V" in note for note in beat.notes) == 1
    assert likeness(beat, [row for row in range(12) if row != 1]) > 0.85


def test_another_lead_finds_the_beats_where_ii_shows_none():
    signal = made_ecg(bpm=60)
    signal[1] = 0.03 * np.random.default_rng(0).normal(size=5000)
    beat = median_beat(record_unchecked(signal))
    assert any("beats found in" in note for note in beat.notes)
    assert likeness(beat, range(6, 12)) > 0.85


def record_unchecked(signal):
    """Return a record whose limb leads contradict each other."""
    return replace(record_of(signal, simultaneous=False), simultaneous=True)


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(("true_hz", "said_hz"), [(100, 500), (500, 100), (500, 2500)])
def test_e2_a_sampling_rate_that_no_heart_has(true_hz, said_hz):
    refused("rate", record=record_of(made_ecg(bpm=65, rate_hz=true_hz), said_hz))


@given(seed=st.integers(0, 999), colour=st.sampled_from(["white", "walk"]))
@settings(max_examples=15)
def test_e6_noise_gives_an_error_or_a_finite_beat(seed, colour):
    noise = np.random.default_rng(seed).normal(0, 0.3, (12, 5000))
    if colour == "walk":
        noise = np.cumsum(noise, 1) / 30
    try:
        beat = median_beat(record_unchecked(noise))
    except DataError:
        return
    assert np.isfinite(beat.signal_mv).all()


def test_e6_white_noise_has_no_heart_beat():
    refused("a record", record=record_unchecked(np.random.default_rng(0).normal(0, 0.3, (12, 5000))))


def test_e6_too_few_beats_say_how_to_go_on():
    signal = made_ecg(3, bpm=60)
    refused("at least 3", "2 of the 3", "min_beats=2", signal=signal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beat = median_beat(record_of(signal), min_beats=1)
    assert (beat.beats, beat.notes) == (2, ("a median of only 2 beats: noise is not averaged away",))
    assert likeness(beat) > 0.9
    refused("at least 1", signal=made_ecg(3, bpm=60)[:, :610], min_beats=0)


@given(length=st.integers(13, 1500))
def test_e7_short_records_end_in_a_beat_or_an_error(length):
    signal = made_ecg(bpm=80, first_r_s=0.05)[:, :length]
    record = replace(record_of(made_ecg()), signal_mv=signal)
    if length < 600:
        refused("the 1.2 s of one beat", record=record, min_beats=1)
    elif length < 1300:
        with contextlib.suppress(DataError):
            assert np.isfinite(median_beat(record, min_beats=1).signal_mv).all()
    else:
        assert likeness(median_beat(record, min_beats=1), part=slice(100, 380)) > 0.8


def test_e7_of_a_long_record_the_first_five_minutes_count():
    signal = np.concatenate([made_ecg(300, bpm=60), 0.05 * np.random.default_rng(0).normal(size=(12, 5000))], 1)
    beat = median_beat(record_unchecked(signal))
    assert 297 <= beat.beats <= 300
    assert beat.notes == ("the first 300 s of 310 s are used",)


def test_e5_swapped_arm_electrodes():
    signal = made_ecg(bpm=60)
    swapped = signal[[0, 2, 1, 4, 3, 5, *range(6, 12)]] * np.array([[-1]] + [[1]] * 11)
    beat = median_beat(record_of(swapped))
    assert any("arm electrodes swapped" in note for note in beat.notes)


@given(st.integers(0, 11), st.lists(st.tuples(st.integers(0, 4999), st.integers(1, 1500)), max_size=4))
@settings(max_examples=15)
def test_e4_never_nan(row, runs):
    signal = made_ecg(bpm=60)
    for start, length in runs:
        signal[row, start : start + length] = np.nan
    record = record_of(signal, simultaneous=True)
    beat = median_beat(record)
    assert np.isfinite(beat.signal_mv).all()
    assert network_ecg(beat).isfinite().all()
    np.testing.assert_array_equal(beat.usable, record.usable)


def test_l6_without_scipy(monkeypatch):
    record = record_of(made_ecg())
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(MissingExtra, match=r"heart beats needs scipy.*trifuse\[med\]"):
        median_beat(record)


# ------------------------------------------------------------------------------------------------- on paper


def test_paper_with_a_rhythm_strip():
    record = record_of(on_paper(made_ecg(bpm=75)))
    refused("at least 3", "min_beats=", record=record)
    beat = median_beat(record, min_beats=1)
    assert beat.usable.all()
    assert (beat.beats, beat.heart_rate_bpm) == (1, pytest.approx(75, abs=1))
    assert beat.notes[0].startswith("leads were not recorded together")
    assert beat.notes[1] == "a median of only 1 beat: noise is not averaged away"
    assert likeness(beat, part=slice(100, 400)) > 0.93
    assert abs(int(beat.signal_mv[1].argmax()) - 200) <= 1


def test_paper_without_a_rhythm_strip():
    beat = median_beat(record_of(on_paper(made_ecg(bpm=75), rhythm=False)), min_beats=1)
    assert beat.usable.all()
    assert "0.02 s apart" in beat.notes[0]
    for row in range(12):
        shifts = [
            np.corrcoef(np.roll(beat.signal_mv[row], n)[100:400], TRUTH[row, 100:400])[0, 1] for n in range(-12, 13)
        ]
        assert max(shifts) > 0.9
    limb = beat.signal_mv[:3, 100:400]  # a column stays together
    assert np.linalg.norm(limb[0] + limb[2] - limb[1]) < 0.2 * np.linalg.norm(limb[1])


def test_paper_whose_columns_begin_a_little_apart():
    shown = on_paper(made_ecg(bpm=75), rhythm=False)
    for row in range(12):
        shown[row, np.flatnonzero(np.isfinite(shown[row]))[: row % 3 * 10]] = np.nan
    beat = median_beat(record_of(shown), min_beats=1)
    assert np.ptp(beat.signal_mv[6:9, 150:300].argmin(1)) <= 2  # the S waves of V1 to V3 stay together


def test_a_column_without_a_complete_beat_is_not_used():
    shown = on_paper(made_ecg(bpm=75))
    shown[9:, :4750] = np.nan  # half a second is left of V4 to V6
    beat = median_beat(record_of(shown), min_beats=1)
    assert list(np.flatnonzero(~beat.usable)) == [9, 10, 11]
    assert "V4, V5, V6 not used: no complete beat" in beat.notes
    assert not beat.signal_mv[9:].any()


def test_a_lead_that_is_missing_on_paper_costs_no_other():
    shown = on_paper(made_ecg(bpm=75))
    shown[6] = np.nan
    beat = median_beat(record_of(shown), min_beats=1)
    assert list(np.flatnonzero(~beat.usable)) == [6]


def test_paper_without_any_beat():
    shown = on_paper(made_ecg(4, bpm=75), rhythm=False)  # one second for each lead
    refused("at least 1", record=record_of(shown), min_beats=1)


# ----------------------------------------------------------------------------------------------- files, networks


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_600_samples_are_a_median_beat_already(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "scipy.signal", None)  # which needs nothing else
    path = tmp_path / f"beat{suffix}"
    if suffix == ".npy":
        np.save(path, TRUTH.astype(np.float32))
    else:
        np.savez(path, ecg=TRUTH.astype(np.float32), rate=500)
    beat = load_beat(path)
    np.testing.assert_array_equal(beat.signal_mv, TRUTH.astype(np.float32))
    assert (beat.beats, beat.heart_rate_bpm, beat.name) == (1, None, str(path))


def test_600_samples_at_another_rate_are_a_record(tmp_path):
    np.save(tmp_path / "a.npy", made_ecg(6, bpm=60, rate_hz=100))
    beat = load_beat(tmp_path / "a.npy", rate_hz=100)
    assert beat.beats == 5
    np.testing.assert_array_equal(beat.signal_mv, median_beat(read_ecg(tmp_path / "a.npy", rate_hz=100)).signal_mv)


def test_min_beats_reaches_the_record(tmp_path):
    np.save(tmp_path / "a.npy", made_ecg(3, bpm=60))
    with pytest.raises(DataError, match="min_beats=2"):
        load_beat(tmp_path / "a.npy", rate_hz=500)
    assert load_beat(tmp_path / "a.npy", rate_hz=500, min_beats=2).beats == 2


def made_beat(signal=TRUTH, usable=None):
    return Beat(signal.astype(np.float32), np.ones(12, bool) if usable is None else usable, 5)


def test_what_the_network_sees():
    ecg = network_ecg(made_beat(TRUTH + np.arange(12)[:, None]))
    assert (ecg.shape, ecg.dtype) == ((12, 608), torch.float32)
    assert not ecg[:, :4].any()
    assert not ecg[:, -4:].any()
    inside = ecg[:, 4:-4].double()
    torch.testing.assert_close(inside.mean(1), torch.zeros(12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(inside.std(1, unbiased=False), torch.ones(12, dtype=torch.float64), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.corrcoef(inside[3], TRUTH[3])[0, 1], 1, atol=1e-5)


def test_with_the_voltage_all_leads_have_one_unit():
    """A tenth of a millivolt, about the mean of each lead, which no electrode knows."""
    ecg = network_ecg(made_beat(TRUTH + np.arange(12)[:, None]), "voltage")
    assert not ecg[:, :4].any()
    assert not ecg[:, -4:].any()
    centred = TRUTH - TRUTH.mean(1, keepdims=True)
    np.testing.assert_allclose(ecg[:, 4:-4].numpy(), centred / 0.1, atol=1e-4)


@pytest.mark.parametrize("scaling", ["zscore", "voltage"])
def test_leads_without_variance_and_unusable_ones_stay_zero(scaling):
    signal, usable = TRUTH.copy(), np.ones(12, bool)
    signal[2], usable[7] = 1.5, False
    ecg = network_ecg(made_beat(signal, usable), scaling)
    assert ecg.isfinite().all()
    assert [row for row in range(12) if not ecg[row].any()] == [2, 7]


# ------------------------------------------------------------------------------------------------- real data

BEATS = {"00001_lr": (9, 64), "06000_hr": (10, 69), "06001_hr": (12, 77), "06002_hr": (6, 41), "06004_hr": (11, 71),
         "06005_hr": (12, 86), "s0010_re": (51, 82)}  # fmt: skip


@pytest.mark.parametrize("name", BEATS)
def test_public_records(trifuse_data, name):
    (path,) = trifuse_data.rglob(f"{name}.hea")
    beat = load_beat(path)
    assert (beat.beats, round(beat.heart_rate_bpm)) == BEATS[name]
    assert beat.usable.all()
    limb = beat.signal_mv[:3, :500]  # the median keeps the triangle where beats are alike
    assert np.linalg.norm(limb[0] + limb[2] - limb[1]) < 0.15 * max(np.linalg.norm(lead) for lead in limb)
    assert not any("swapped" in note for note in beat.notes)


def test_public_records_on_paper(trifuse_data):
    """What a print shows of a record is the record's beat, lead by lead."""
    for name in ("06000_hr", "06001_hr", "06004_hr"):
        (path,) = trifuse_data.rglob(f"{name}.hea")
        record = read_ecg(path)
        whole, printed = median_beat(record), median_beat(record_of(on_paper(record.signal_mv)), min_beats=1)
        for row in range(12):
            assert np.corrcoef(whole.signal_mv[row, 100:400], printed.signal_mv[row, 100:400])[0, 1] > 0.9
