"""Where the autoencoder looks, and what it draws: numbers beside the pictures, one scale, sentences that are true."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from matplotlib.image import imread

from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.evaluation.ecg_attention_figures import (
    attention_received,
    draw_lead_attention,
    draw_temporal_attention,
)
from trifuse.architectures.evaluation.ecg_reconstruction_figures import draw_reconstruction, relative_errors
from trifuse.kernels import ShapeError


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).random(shape)
    return raw / raw.sum(-1, keepdims=True)


def beat(steps: int = 608) -> np.ndarray:
    time = np.arange(steps)
    scale = np.linspace(1, 2, 12)[:, None]
    return scale * (4 * np.exp(-(((time - 204) / 10) ** 2)) + np.exp(-(((time - 330) / 40) ** 2)))


def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def assert_real(picture) -> np.ndarray:
    pixels = imread(picture.png)[..., :3]
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.02
    assert picture.alt.endswith(".")
    return pixels


# -------------------------------------------------------------------------------------------------- lead attention


def test_lead_attention(tmp_path):
    first, second = weights(12, 12), weights(12, 12, seed=1)
    first[2, 7] = 0.9
    picture = draw_lead_attention({"young": first, "old": second}, tmp_path)
    assert_real(picture)
    rows = read(picture.csv)
    assert [(row["group"], row["looking_lead"]) for row in rows] == [
        (g, lead) for g in ("young", "old") for lead in LEADS
    ]
    found = np.array([[float(row[lead]) for lead in LEADS] for row in rows]).reshape(2, 12, 12)
    np.testing.assert_allclose(found, [first, second], atol=1e-6)
    most = LEADS[int(second.mean(0).argmax())]
    assert "the largest weight, 0.900, is that of III on V2" in picture.alt
    assert f"old: lead {most} is looked at most, {second.mean(0).max():.3f} on average" in picture.alt


def test_groups_share_one_colour_scale(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    scales = []
    plain = Axes.imshow

    def noted(axis, *arguments, **options):
        scales.append((options["vmin"], options["vmax"]))
        return plain(axis, *arguments, **options)

    monkeypatch.setattr(Axes, "imshow", noted)
    maps = {name: weights(12, 12, seed=seed) * (seed + 1) for seed, name in enumerate("abcd")}
    draw_lead_attention(maps, tmp_path)
    every = np.stack(list(maps.values()))
    assert scales == [(every.min(), every.max())] * 4


def test_equal_weights_can_be_drawn(tmp_path):
    assert_real(draw_lead_attention({"flat": np.full((12, 12), 1 / 12)}, tmp_path, name="flat"))
    assert_real(draw_temporal_attention(beat(), np.full((12, 19, 19), 1 / 19), tmp_path))


@pytest.mark.parametrize("groups", [{}, {"a": np.zeros((12, 11))}, {"a": np.zeros((2, 12, 12))}])
def test_refused_lead_attention(tmp_path, groups):
    with pytest.raises(ShapeError, match="draw_lead_attention: expected"):
        draw_lead_attention(groups, tmp_path)


# ---------------------------------------------------------------------------------------------- temporal attention


def test_attention_received_is_the_mean_over_the_queries():
    """Three queries, three keys, 30 samples: the columns' means, at the centres of the keys' thirds."""
    temporal = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.0, 0.9, 0.1]])
    received = attention_received(temporal, 30)
    by_key = np.array([0.2, 0.6, 0.2]) * 3
    assert received.shape == (30,)
    np.testing.assert_allclose(received[[0, 29]], by_key[[0, 2]])
    np.testing.assert_allclose((received[4] + received[5]) / 2, by_key[0], atol=0.07)
    np.testing.assert_allclose((received[14] + received[15]) / 2, by_key[1], atol=0.07)
    assert np.all(np.diff(received[5:15]) > 0)
    assert np.all(np.diff(received[15:25]) < 0)
    np.testing.assert_allclose(attention_received(np.full((2, 4, 19, 19), 1 / 19), 608), np.ones((2, 4, 608)))
    with pytest.raises(ShapeError, match=r"expected weights \(..., M, M\), got \(3, 4\)"):
        attention_received(np.zeros((3, 4)), 10)


def test_temporal_attention(tmp_path):
    temporal = np.full((12, 19, 19), 0.9 / 18)
    temporal[7, :, 6] = 0.1 + 0.9 / 18  # samples 192 to 223: round the R peak of V2
    signal = beat()
    picture = draw_temporal_attention(signal, temporal, tmp_path, title="Record 1")
    assert_real(picture)
    rows = read(picture.csv)
    assert len(rows) == 12 * 608
    of_v2 = [row for row in rows if row["lead"] == "V2"]
    strongest = max(of_v2, key=lambda row: float(row["attention_over_equal_share"]))
    assert -25 < float(strongest["time_ms"]) < 40
    assert float(rows[0]["time_ms"]) == -408.0
    assert float(of_v2[204]["time_ms"]) == 0.0
    np.testing.assert_allclose([float(row["signal"]) for row in of_v2], signal[7], rtol=1e-4, atol=1e-6)
    assert picture.alt.split("most at ")[1].startswith(("6 ms in V2", "8 ms in V2", "4 ms in V2"))


def test_leads_lie_where_a_print_has_them(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    places = {}
    plain = Axes.text

    def noted(axis, x, y, words, **options):
        box = axis.get_position()
        places[words] = (round(box.x0, 2), -round(box.y0, 2))
        return plain(axis, x, y, words, **options)

    monkeypatch.setattr(Axes, "text", noted)
    draw_temporal_attention(beat(), weights(12, 19, 19), tmp_path)
    columns = [[lead for lead in LEADS if places[lead][0] == x] for x in sorted({x for x, _ in places.values()})]
    assert columns == [["I", "II", "III"], ["aVR", "aVL", "aVF"], ["V1", "V2", "V3"], ["V4", "V5", "V6"]]
    assert sorted(columns[2], key=lambda lead: places[lead][1]) == columns[2]


@pytest.mark.parametrize(
    ("beats", "maps"), [((12, 608), (11, 19, 19)), ((11, 608), (11, 19, 19)), ((12, 9), (2, 12, 3, 3))]
)
def test_refused_temporal_attention(tmp_path, beats, maps):
    with pytest.raises(ShapeError, match=r"expected a beat \(12, T\) and weights \(12, M, M\)"):
        draw_temporal_attention(np.zeros(beats), np.zeros(maps), tmp_path)


# -------------------------------------------------------------------------------------------------- reconstruction


def test_reconstruction(tmp_path):
    signal = beat()
    usable = np.arange(12) != 4
    drawn = 0.5 * signal
    drawn[9] = signal[9]
    drawn[2] = 0
    picture = draw_reconstruction(signal, drawn, tmp_path, name="r", title="Record 7", usable=usable)
    assert_real(picture)
    assert "least in V4, 0.00, most in III, 1.00." in picture.alt
    rows = read(picture.csv)
    assert [float(row["reconstruction"]) for row in rows if row["lead"] == "V4"] == [
        float(row["signal"]) for row in rows if row["lead"] == "V4"
    ]
    with pytest.raises(ShapeError, match=r"expected two beats \(12, T\)"):
        draw_reconstruction(signal, drawn[:, :9], tmp_path, name="r", title="", usable=usable)


def test_errors_leave_padding_and_unusable_leads_out():
    signal = np.zeros((2, 12, 20))
    signal[..., 4:-4] = np.random.default_rng(0).normal(size=(2, 12, 12))
    usable = np.ones((2, 12), bool)
    usable[1, 3] = False
    drawn = np.full_like(signal, 0.25)
    errors = relative_errors(signal, drawn, usable)
    inner = signal[..., 4:-4]
    np.testing.assert_allclose(errors[usable], (((inner - 0.25) ** 2).mean(-1) / (inner**2).mean(-1))[usable])
    assert np.isnan(errors).sum() == 1
    assert np.isnan(errors[1, 3])
