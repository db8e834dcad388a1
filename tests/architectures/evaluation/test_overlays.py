"""Overlay sheets of many organs: colours and numbers that tell them apart, and a scale that claims nothing unknown."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from trifuse.architectures.evaluation import overlays
from trifuse.architectures.evaluation.overlays import CLASS_COLOURS, Tile, collect_tiles, draw_overlays
from trifuse.architectures.evaluation.scoring import evaluate_cases

ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")


def organs(count: int, spacing_mm=(1.0, 1.0)) -> Tile:
    """Return a tile with as many squares, each one pixel off in the prediction."""
    truth = np.zeros((40, 100), np.uint8)
    for k in range(count):
        truth[10:20, 10 * k + 11 : 10 * k + 19] = k + 1
    return Tile("case", "", 0, 1, truth * 1.0, truth, np.roll(truth, 1, 0), spacing_mm, 0.9)


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    drawn = []
    save = overlays.save_picture

    def keep(figure, *args):
        drawn.append(figure)
        return save(figure, *args)

    monkeypatch.setattr(overlays, "save_picture", keep)
    return drawn


def texts_on(figure) -> list[list[str]]:
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


def test_eight_organs_have_a_colour_and_a_number_each(tmp_path, figures):
    picture = draw_overlays([organs(8)], ("background", *ORGANS), tmp_path)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [*(f"{k} {name}" for k, name in enumerate(ORGANS, start=1)), "true outline, on the prediction"]
    colours = [handle.get_color() for handle in figures[0].legends[0].legend_handles[:8]]
    assert len(set(colours)) == 8
    numbers = [str(k) for k in range(1, 9)]
    image, truth, prediction = texts_on(figures[0])
    assert not set(numbers) & set(image)
    assert set(numbers) <= set(truth)
    assert set(numbers) <= set(prediction)
    assert [line["class_name"] for line in csv.DictReader(picture.csv.open())] == list(ORGANS)


def test_few_classes_need_no_numbers(tmp_path, figures):
    draw_overlays([organs(3)], ("background", *ORGANS[:3]), tmp_path)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [*ORGANS[:3], "true outline, on the prediction"]
    assert all("1" not in texts for texts in texts_on(figures[0]))


def test_a_number_stands_on_its_organ(tmp_path, figures):
    tile = organs(8)
    ring = tile.truth.copy()
    ring[12:18, 13:17] = 0  # the middle of organ 1 is no longer part of it
    draw_overlays([replace(tile, truth=ring)], ("background", *ORGANS), tmp_path)
    axis = figures[0].axes[1]
    rows, columns = overlays._window(tile)
    for text in axis.texts:
        if text.get_text().isdecimal() and text.get_text() in "12345678":
            column, row = text.get_position()
            assert ring[rows, columns][int(row), int(column)] == int(text.get_text())


def test_each_organ_has_its_own_dashed_outline(tmp_path, monkeypatch):
    drawn = []
    contour = overlays._draw_contour

    def watch(axis, mask, colour, width, style):
        drawn.append((style, int(mask.sum())))
        contour(axis, mask, colour, width, style)

    monkeypatch.setattr(overlays, "_draw_contour", watch)
    draw_overlays([organs(8)], ("background", *ORGANS), tmp_path)
    assert drawn.count(("dashed", 80)) == 8


def test_colours_differ_from_each_other_and_from_grey():
    colours = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in CLASS_COLOURS]) / 255
    for i, one in enumerate(colours):
        assert one.max() - one.min() > 0.3, CLASS_COLOURS[i]
        for other in colours[:i]:
            assert np.linalg.norm(one - other) > 0.25


@pytest.mark.parametrize(("spacing_mm", "unit"), [((2.0, 2.0), "mm"), (None, "pixels")])
def test_the_scale_is_in_pixels_where_nobody_knows_the_spacing(tmp_path, figures, spacing_mm, unit):
    draw_overlays([organs(8, spacing_mm)], ("background", *ORGANS), tmp_path)
    (scale,) = (text for text in texts_on(figures[0])[0] if text[:1].isdecimal())
    assert scale.split()[1] == unit
    (axis,) = (axis for axis in figures[0].axes if any(text.get_text() == scale for text in axis.texts))
    (words,) = (text for text in axis.texts if text.get_text() == scale)
    assert words.get_position()[1] < min(line.get_ydata()[0] for line in axis.lines)  # above its bar
    if unit == "pixels":
        assert not any("mm" in text for texts in texts_on(figures[0]) for text in texts)


def test_tiles_of_a_cohort_without_a_spacing_have_none(make_cohort, tmp_path):
    cohort = make_cohort("a")
    rows = evaluate_cases(tmp_path, cohort, ["a"])
    assert collect_tiles(tmp_path, cohort, rows)[0].spacing_mm == (1.5, 1.25)
    assert collect_tiles(tmp_path, replace(cohort, has_spacing=False), rows)[0].spacing_mm is None


def test_the_score_on_a_tile_is_the_scars_where_there_is_one(make_cohort, tmp_path, figures):
    cohort = make_cohort("a")
    (before,) = evaluate_cases(tmp_path, cohort, ["a"])
    rows = [
        replace(before, class_name=k, scores={**before.scores, "dsc": d}) for k, d in (("wall", 0.9), ("scar", 0.2))
    ]
    (tile,) = collect_tiles(tmp_path, replace(cohort, class_names=("background", "scar")), rows)
    assert (tile.dsc, tile.score_name) == (0.2, "scar DSC")
    picture = draw_overlays([tile], ("background", "scar"), tmp_path)
    assert "scar DSC of each case: a 0.200" in picture.alt
    assert any("scar DSC 0.200" in texts for texts in texts_on(figures[0]))
    (tile,) = collect_tiles(tmp_path, cohort, [replace(one, class_name=one.class_name.upper()) for one in rows])
    assert (tile.dsc, tile.score_name) == (pytest.approx(0.55), "DSC")


def test_the_slice_shows_as_many_classes_as_possible():
    labels = np.zeros((4, 10, 10), np.uint8)
    labels[0] = 1  # the largest area of all
    labels[1, :2], labels[1, 2:4] = 1, 2
    labels[2, :3], labels[2, 3:6] = 1, 2
    labels[3, :1], labels[3, 1:2] = 2, 3
    assert overlays._telling_slice(labels) == 2
    assert overlays._telling_slice(np.minimum(labels, 1)) == 0
