"""Bull's-eyes: every segment in its place and its colour, one scale for all, words that can be read."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.patches import Wedge

from trifuse.architectures.evaluation import bullseye
from trifuse.architectures.evaluation.bullseye import (
    COLOURS,
    SEGMENT_NAMES,
    contrast,
    draw_bullseye,
    draw_bullseyes,
    draw_ecg_bullseye,
    readable_ink,
)
from trifuse.architectures.evaluation.picture import new_figure
from trifuse.kernels import DataError, ShapeError

VALUES = np.arange(17.0)
# ring from outside, and directions in degrees anticlockwise from three o'clock
SPANS = {1: (60, 120), 2: (120, 180), 3: (180, 240), 4: (240, 300), 5: (300, 360), 6: (0, 60)}
SPANS |= {number + 6: span for number, span in SPANS.items()}
SPANS |= {13: (45, 135), 14: (135, 225), 15: (225, 315), 16: (315, 405)}


def drawn(values=VALUES, top=16.0):
    axis = new_figure(4, 4).subplots()
    draw_bullseye(axis, values, top)
    return axis, [patch for patch in axis.patches if isinstance(patch, Wedge)]


def holds(wedge: Wedge, x: float, y: float) -> bool:
    direction = (np.rad2deg(np.arctan2(y, x)) - wedge.theta1) % 360
    return wedge.r - wedge.width <= np.hypot(x, y) < wedge.r and direction < wedge.theta2 - wedge.theta1


def numbered(axis, wedges) -> dict[int, list]:
    """The texts that stand in each wedge."""
    found: dict[int, list] = {}
    for text in axis.texts:
        for place in [place for place, wedge in enumerate(wedges) if holds(wedge, *text.get_position())]:
            found.setdefault(place, []).append(text)
    return found


def test_numbering():
    """Each number stands in a wedge of its ring and direction, with its value; the wedges fill the disc."""
    axis, wedges = drawn(VALUES / 100)
    assert len(wedges) == 17
    seen = set()
    for place, texts in numbered(axis, wedges).items():
        wedge = wedges[place]
        number, value = (text.get_text() for text in texts)
        seen.add(int(number))
        assert float(value) == (int(number) - 1) / 100
        ring = 0 if int(number) < 7 else 1 if int(number) < 13 else 2 if int(number) < 17 else 3
        assert wedge.r == sorted({other.r for other in wedges}, reverse=True)[ring]
        if ring < 3:
            low, high = SPANS[int(number)]
            assert (wedge.theta1 - low) % 360 == 0
            assert wedge.theta2 - wedge.theta1 == high - low
    assert seen == set(range(1, 18))
    areas = [np.pi * (w.r**2 - (w.r - w.width) ** 2) * (w.theta2 - w.theta1) / 360 for w in wedges]
    assert sum(areas) == pytest.approx(np.pi)


def test_anterior_is_up_and_the_septum_left():
    axis, _ = drawn()
    places = {text.get_text(): text.get_position() for text in axis.texts}
    assert places["anterior"][1] > 1
    assert places["inferior"][1] < -1
    assert places["septal"][0] < -1
    assert places["lateral"][0] > 1
    for number, name in enumerate(SEGMENT_NAMES[:16], start=1):
        low, high = np.deg2rad(SPANS[number])
        x, y = np.cos((low + high) / 2), np.sin((low + high) / 2)
        assert ("sept" in name) == (x < -0.1)
        assert ("lateral" in name) == (x > 0.1)
        assert ("anter" in name) == (y > 0.1)
        assert ("infer" in name) == (y < -0.1)


def test_names():
    assert SEGMENT_NAMES[0] == "basal anterior"
    assert SEGMENT_NAMES[8] == "mid inferoseptal"
    assert SEGMENT_NAMES[13] == "apical septal"
    assert SEGMENT_NAMES[16] == "apex"
    assert len(set(SEGMENT_NAMES)) == 17


def test_colours_are_of_one_scale(monkeypatch, tmp_path):
    """The same value has the same colour in every bull's-eye, and the scale ends at the largest of all."""
    figures = []
    monkeypatch.setattr(bullseye, "save_picture", lambda figure, *rest: figures.append(figure))
    draw_bullseyes({"truth": VALUES, "ours": VALUES / 2}, tmp_path, title="Scar")
    *eyes, bar = figures[0].axes
    assert bar.get_ylim() == (0, 16)
    for eye, share in zip(eyes, (1.0, 0.5), strict=True):
        wedges = [patch for patch in eye.patches if isinstance(patch, Wedge)]
        for wedge, value in zip(wedges, VALUES, strict=True):
            assert wedge.get_facecolor() == pytest.approx(colormaps[COLOURS](value * share / 16))


def test_text_is_readable_on_every_colour():
    for share in np.linspace(0, 1, 101):
        colour = colormaps[COLOURS](share)
        assert contrast(colour, to_rgb(readable_ink(colour))) > 4.5
    axis, wedges = drawn()
    for place, texts in numbered(axis, wedges).items():
        assert {text.get_color() for text in texts} == {readable_ink(wedges[place].get_facecolor())}
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)


def test_text_stays_in_its_segment():
    """Rendered, the longest value ends within its wedge; no two texts of a bull's-eye overlap."""
    figure = new_figure(4.6, 4.55)
    axis = figure.subplots()
    axis.set_axis_off()
    draw_bullseye(axis, np.full(17, 88.88), 100.0)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.shrunk(0.95, 0.7).overlaps(second.shrunk(0.95, 0.7))
    wedges = [patch for patch in axis.patches if isinstance(patch, Wedge)]
    for place, texts in numbered(axis, wedges).items():
        outline = wedges[place].get_window_extent()
        for text in texts:
            box = text.get_window_extent()
            assert outline.x0 <= box.x0 < box.x1 <= outline.x1


def test_colours_keep_their_order_in_grey():
    """From light to dark without a turn, whatever hues an eye tells apart."""
    greys = [contrast(colormaps[COLOURS](share), (0, 0, 0)) for share in np.linspace(0, 1, 30)]
    assert (np.diff(greys) < 0).all()


def test_picture_numbers_and_sentence(tmp_path):
    scar = np.zeros(17)
    scar[[3, 9]] = 2.25, 1.5
    unassigned = {"truth": 0.0, "ours $x$": 0.125}
    picture = draw_bullseyes({"truth": scar, "ours $x$": scar / 3}, tmp_path, title="Scar of a", unassigned=unassigned)
    assert imread(picture.png)[..., :3].std() > 0.02
    assert picture.png.name == "bullseye.png"
    with open(picture.csv, newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["segment", "name", "truth (mL)", "ours $x$ (mL)"]
    assert [line["segment"] for line in lines] == [*map(str, range(1, 18)), ""]
    assert [line["name"] for line in lines] == [*SEGMENT_NAMES, "unassigned"]
    assert float(lines[3]["truth (mL)"]) == 2.25
    assert float(lines[9]["ours $x$ (mL)"]) == 0.5
    assert float(lines[17]["ours $x$ (mL)"]) == 0.125
    assert "truth 3.75 mL in all, most in segment 4 (basal inferior), 2.25 mL" in picture.alt
    assert "ours $x$ 1.25 mL in all" in picture.alt


def test_sums_stand_under_each(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(bullseye, "save_picture", lambda figure, *rest: figures.append(figure))
    draw_bullseyes({"a": VALUES, "b": 0 * VALUES}, tmp_path, title="Scar", unassigned={"a": 0.001, "b": 12.34})
    draw_bullseyes({"a": VALUES}, tmp_path, title="Scar", unit="g")
    lowest = [min(axis.texts, key=lambda text: text.get_position()[1]).get_text() for axis in figures[0].axes[:2]]
    assert lowest == ["in all segments 136.0 mL\nunassigned <0.01 mL", "in all segments 0 mL\nunassigned 12.3 mL"]
    assert figures[1].axes[0].texts[-1].get_text() == "in all segments 136.0 g"


@pytest.mark.parametrize("eyes", [1, 4, 5])
def test_any_number_of_them(tmp_path, eyes):
    """In rows of four, and with names of any length."""
    picture = draw_bullseyes({f"network {i} " * 9: VALUES * i for i in range(eyes)}, tmp_path, title="Scar " * 30)
    height, width = imread(picture.png).shape[:2]
    assert height / width == pytest.approx((4.15 * -(-eyes // 4) + 0.4) / (3.6 * min(eyes, 4) + 1), abs=0.01)
    assert ("none in any segment" in picture.alt) == (eyes > 0)


def test_an_ecgs_scores_stand_beside_the_scar(monkeypatch, tmp_path):
    """Of either sign: zero is light whatever the largest is, and what is above and below differs in hue."""
    scar, scores = np.zeros(17), np.zeros(17)
    scar[3], scores[[3, 8, 10]] = 2.25, (0.5, -2.0, 1.5)
    picture = draw_ecg_bullseye({"truth": scar, "ours": scar / 3}, scores, tmp_path, title="Scar and ECG of a")
    assert picture.png.name == "ecg_bullseye.png"
    with open(picture.csv, newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["segment", "name", "truth (mL)", "ours (mL)", "ECG (score)"]
    assert [float(line["ECG (score)"]) for line in lines] == scores.tolist()
    assert [float(line["truth (mL)"]) for line in lines] == scar.tolist()
    assert "truth 2.25 mL in all, most in segment 4 (basal inferior), 2.25 mL" in picture.alt
    assert "scores segment 11 (mid inferolateral) highest, 1.50, and segment 9 (mid inferoseptal) lowest, -2.00" in (
        picture.alt
    )
    figures = []
    monkeypatch.setattr(bullseye, "save_picture", lambda figure, *rest: figures.append(figure))
    draw_ecg_bullseye({"truth": scar}, scores, tmp_path, title="Scar and ECG of a")
    colours = [patch.get_facecolor()[:3] for patch in figures[0].axes[1].patches]
    assert min(colours[0]) > 0.9  # zero
    assert colours[8][0] > colours[8][2]  # brown below it
    assert colours[10][0] < colours[10][2]  # and purple above
    limits = [axis.get_ylim() for axis in figures[0].axes[2:]]
    assert limits == [(0.0, 2.25), (-2.0, 2.0)]
    draw_ecg_bullseye({"truth": scar}, 0 * scores, tmp_path, title="An ECG that says nothing")
    for wrong in (np.nan, np.inf):
        with pytest.raises(DataError, match="'ECG': values: expected finite values, got"):
            draw_ecg_bullseye({"truth": scar}, scores + wrong, tmp_path, title="Scar")
    with pytest.raises(ShapeError, match=r"'ECG' needs 17 values"):
        draw_ecg_bullseye({"truth": scar}, scores[1:], tmp_path, title="Scar")
    with pytest.raises(DataError, match="got none"):
        draw_ecg_bullseye({}, scores, tmp_path, title="Scar")


def test_refusals(tmp_path):
    with pytest.raises(ShapeError, match=r"'truth' needs 17 values, one for each segment, got \(16,\)"):
        draw_bullseyes({"truth": VALUES[1:]}, tmp_path, title="Scar")
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(DataError, match="'ours': values: expected finite values, none below 0"):
            draw_bullseyes({"truth": VALUES, "ours": np.where(VALUES == 5, wrong, VALUES)}, tmp_path, title="Scar")
    with pytest.raises(DataError, match="got none"):
        draw_bullseyes({}, tmp_path, title="Scar")
    assert not list(tmp_path.iterdir())
