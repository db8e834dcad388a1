"""The twelve leads on ECG paper: what is drawn is what the CSV says, and leads that cannot be used are marked."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from matplotlib.image import imread

from trifuse.architectures.data.ecg.median_beat import Beat, load_beat
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.evaluation.ecg_figures import draw_ecg
from trifuse.architectures.evaluation.picture import INK, VERMILION


def made_beat(usable=12, notes=(), height=1.0, beats=9):
    time = np.arange(600) / 500 - 0.4
    signal = np.linspace(-height, height, 12)[:, None] * np.exp(-0.5 * (time / 0.02) ** 2)
    used = np.arange(12) < usable
    rate = 61.4 if beats > 1 else None
    return Beat(np.where(used[:, None], signal, 0).astype(np.float32), used, beats, notes, "folder/rec7", rate)


def pixels_of(picture):
    return imread(picture.png)[..., :3]


def has(pixels, colour, tolerance=0.06):
    """Return which pixels have a colour, more or less."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.abs(pixels - wanted).max(-1) < tolerance


def test_the_numbers_and_the_sentence(tmp_path):
    beat = made_beat()
    picture = draw_ecg(beat, tmp_path, name="rec7")
    assert (picture.png.name, picture.csv.name) == ("rec7.png", "rec7.csv")
    with open(picture.csv, newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["time_s", *(f"{lead}_mV" for lead in LEADS)]
    table = np.array(lines, float)
    np.testing.assert_array_equal(table[:, 1:].T.astype(np.float32), beat.signal_mv)
    np.testing.assert_allclose(table[[0, 200, -1], 0], [-0.4, 0, 0.798])
    assert picture.title == "rec7: median of 9 beats, 61/min, 12 of 12 leads usable"
    assert picture.alt.endswith("The tallest QRS is in I, -1.00 mV.")
    assert has(pixels_of(picture), INK).mean() > 0.003
    assert not has(pixels_of(picture), VERMILION).any()


def test_the_numbers_are_an_ecg_again(tmp_path):
    time = np.arange(600) / 500 - 0.4
    wave = np.exp(-0.5 * (time / 0.02) ** 2).astype(np.float32)
    signal = wave * np.array([[1], [2], [1], [-1.5], [0], [1.5], *[[1]] * 6], np.float32)
    usable = signal.any(1)
    picture = draw_ecg(Beat(signal, usable, 3), tmp_path)
    beat = load_beat(picture.csv)
    np.testing.assert_array_equal(beat.signal_mv, signal)
    np.testing.assert_array_equal(beat.usable, usable)


def test_leads_that_cannot_be_used_are_marked(tmp_path):
    picture = draw_ecg(made_beat(10, beats=1), tmp_path)
    assert picture.title == "rec7: one beat, 10 of 12 leads usable"
    assert picture.alt.endswith("Not usable: V5, V6.")
    assert has(pixels_of(picture), VERMILION).any()


@pytest.mark.parametrize("more", [{"height": 4.0}, {"notes": ("a long note " * 30,)}])
def test_the_sheet_grows_with_what_it_shows(tmp_path, more):
    plain = pixels_of(draw_ecg(made_beat(), tmp_path))
    grown = pixels_of(draw_ecg(made_beat(**more), tmp_path))
    assert grown.shape[0] > plain.shape[0] + 40
    assert grown.shape[1] == plain.shape[1]


def test_a_millivolt_is_ten_millimetres(tmp_path):
    """The calibration pulse, 1 mV high and 0.2 s long, is as high as two big squares, and twice as high as long."""
    dark = has(pixels_of(draw_ecg(made_beat(), tmp_path)), INK, 0.35)[100:, :110]
    heights = dark.sum(0)
    columns = np.flatnonzero(heights > 0.8 * heights.max())
    assert heights.max() == pytest.approx(3 * 2 * (columns[-1] - columns[0]), rel=0.15)  # three rows


def test_same_bytes_for_the_same_beat(tmp_path):
    first, second = (draw_ecg(made_beat(), tmp_path / name) for name in ("a", "b"))
    assert first.png.read_bytes() == second.png.read_bytes()
    assert first.csv.read_bytes() == second.csv.read_bytes()


def test_public_records(trifuse_data, tmp_path):
    (path,) = trifuse_data.rglob("06002_hr.hea")
    picture = draw_ecg(load_beat(path), tmp_path)
    assert picture.alt.startswith(
        "Twelve-lead ECG, median of 6 beats, 41/min, 12 of 12 leads usable. The tallest QRS is in V4"
    )
