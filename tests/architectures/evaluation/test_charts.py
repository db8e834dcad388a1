"""Pictures: real files with the right content, their numbers beside them, a sentence for each, no global state."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from trifuse.architectures.evaluation import charts, overlays
from trifuse.architectures.evaluation.charts import draw_block_weights, draw_training_curves
from trifuse.architectures.evaluation.metrics import Conventions
from trifuse.architectures.evaluation.overlays import CLASS_COLOURS, Tile, collect_tiles, draw_overlays
from trifuse.architectures.evaluation.picture import BLUE, SKY, VERMILION
from trifuse.architectures.evaluation.scoring import Row, evaluate_cases
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.kernels import DataError, MissingExtra

STRICT = Conventions()


def write_log(path, *, epochs=6, blocks=0, columns=("lr", "loss", "val_dice", "val_iou"), start=1):
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["epoch", *columns, *(f"weight_block_{i}" for i in range(blocks)), "seconds"])
        for epoch in range(start, start + epochs):
            weights = rng.random(blocks)
            values = {"lr": 1e-3 / epoch, "loss": 2.0 / epoch, "val_dice": 0.5 + 0.05 * min(epoch, 4), "val_iou": 0.4}
            writer.writerow([epoch, *(values[c] for c in columns), *(weights / (weights.sum() or 1)), 1.5])
    return path


def read_csv(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def assert_real_png(picture, smallest=(200, 300)):
    pixels = imread(picture.png)
    assert pixels.shape[0] >= smallest[0]
    assert pixels.shape[1] >= smallest[1]
    assert pixels[..., :3].std() > 0.02  # something is drawn
    assert picture.csv.exists()
    assert len(picture.alt.split()) >= 8
    assert picture.alt.endswith(".")
    return pixels


def colour_share(pixels, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(pixels[..., :3] - wanted).max(-1) < 0.06).mean())


def tile(case_id="a", *, prediction="shifted", dsc=0.8, size=(40, 40), spacing=(1.0, 1.0), note="") -> Tile:
    truth = np.zeros(size, np.uint8)
    truth[10:30, 12:28] = 1
    image = np.random.default_rng(0).normal(0, 1, size) + 4 * truth
    predicted = {"shifted": np.roll(truth, 3, 1), "none": None, "empty": np.zeros_like(truth)}[prediction]
    return Tile(case_id, note, 4, 9, image, truth, predicted, spacing, dsc)


def test_curves(tmp_path):
    picture = draw_training_curves(write_log(tmp_path / "log.csv"), tmp_path)
    pixels = assert_real_png(picture)
    assert colour_share(pixels, BLUE) > 0
    lines = read_csv(picture.csv)
    assert [line["epoch"] for line in lines] == [f"{e}.0" for e in range(1, 7)]
    assert set(lines[0]) == {"epoch", "lr", "loss", "val_dice", "val_iou"}
    assert "6 epochs" in picture.alt
    assert "loss goes from 2 to 0.333" in picture.alt
    assert "val dice is best, 0.700, at epoch 4" in picture.alt


@pytest.mark.parametrize(
    ("best", "label"),
    [
        (None, "Epoch (best: 4, val dice 0.700)"),
        (BestEpoch(3, "iou", 0.4), "Epoch (best: 3, val iou 0.400)"),
        (BestEpoch(6, "last", None), "Epoch (last: 6, val dice 0.700)"),
        (BestEpoch(2, "gone", 0.5), "Epoch (best: 2, val dice 0.600)"),
    ],
)
def test_curves_mark_the_epoch_that_was_kept(tmp_path, monkeypatch, best, label):
    figures = []
    monkeypatch.setattr(charts, "save_picture", lambda figure, *rest: figures.append(figure))
    draw_training_curves(write_log(tmp_path / "log.csv"), tmp_path, best)
    assert [axis.get_xlabel() for axis in figures[0].axes][1] == label
    lowest, highest = figures[0].axes[1].get_ylim()
    assert -0.1 < lowest < 0 < 1 < highest < 1.1  # scores of 0 and of 1 do not lie on the frame


@pytest.mark.parametrize("columns", [("loss",), ("val_dice",), ("lr",)])
@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_of_short_and_partial_logs(tmp_path, columns, epochs):
    picture = draw_training_curves(write_log(tmp_path / "log.csv", epochs=epochs, columns=columns), tmp_path)
    assert_real_png(picture)
    assert picture.alt.startswith(f"Training curves over {'1 epoch' if epochs == 1 else '2 epochs'}: ")


def test_curves_of_a_loss_below_zero_and_of_gaps(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,val_dice\n1,0.2,nan\n2,-0.4,\n3,-0.8,nan\n")
    picture = draw_training_curves(tmp_path / "log.csv", tmp_path)
    assert_real_png(picture)
    assert "val dice has no values" in picture.alt


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no rows"), ("epoch,loss\n", "no rows"), ("loss\n1\n", "columns loss"), ("epoch,mood\n1,2\n", "mood")],
)
def test_a_log_that_cannot_be_drawn(tmp_path, text, said):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        draw_training_curves(tmp_path / "log.csv", tmp_path)
    with pytest.raises(DataError, match=r"absent\.csv"):
        draw_training_curves(tmp_path / "absent.csv", tmp_path)


def test_block_weights(tmp_path):
    log = write_log(tmp_path / "log.csv", blocks=12)
    picture = draw_block_weights(log, tmp_path, selected=(11, 7, 3, 0))
    pixels = assert_real_png(picture)
    assert colour_share(pixels, VERMILION) > 0.005  # the selected bars
    lines = read_csv(picture.csv)
    assert [line["block"] for line in lines] == [str(i) for i in range(12)]
    assert {line["block"]: line["stage"] for line in lines if line["stage"]} == {
        "11": "1",
        "7": "2",
        "3": "3",
        "0": "4",
    }
    last = [float(line["epoch_6"]) for line in lines]
    assert sum(last) == pytest.approx(1)
    assert f"block {int(np.argmax(last))} weighs most" in picture.alt
    assert "Blocks 11, 7, 3, 0 feed decoder stages 1 to 4" in picture.alt


def test_block_weights_begin_at_their_start(tmp_path):
    log = write_log(tmp_path / "log.csv", blocks=4)
    start = {f"weight_block_{index}": weight for index, weight in enumerate((0.4, 0.3, 0.2, 0.1))}
    picture = draw_block_weights(log, tmp_path, start={**start, "val_dice": 0.5})
    lines = read_csv(picture.csv)
    assert [line["epoch_0"] for line in lines] == ["0.4", "0.3", "0.2", "0.1"]
    assert list(lines[0])[2:4] == ["epoch_0", "epoch_1"]
    assert "over 6 epochs; after the last" in picture.alt


@pytest.mark.parametrize(("blocks", "epochs"), [(1, 1), (4, 1), (40, 3)])
def test_block_weights_of_any_size(tmp_path, blocks, epochs):
    log = write_log(tmp_path / "log.csv", blocks=blocks, epochs=epochs)
    assert_real_png(draw_block_weights(log, tmp_path))


def test_block_weights_need_their_columns(tmp_path):
    with pytest.raises(DataError, match="weight_block_0"):
        draw_block_weights(write_log(tmp_path / "log.csv"), tmp_path)


def test_overlays_show_the_masks_and_the_scores(tmp_path):
    tiles = [tile("case_1", dsc=0.731, note="worst"), tile("case_2", dsc=0.9)]
    picture = draw_overlays(tiles, ("background", "left atrium"), tmp_path)
    pixels = assert_real_png(picture, (500, 900))
    assert colour_share(pixels, SKY) > 0.002
    third = pixels.shape[1] // 3
    image, truth, predicted = (pixels[:, i * third : (i + 1) * third] for i in range(3))
    body = slice(60, -60)  # without headings and legend
    assert colour_share(image[body], SKY) == 0
    assert colour_share(truth[body], SKY) > 0.003
    assert colour_share(predicted[body], SKY) > 0.003
    first, second = read_csv(picture.csv)
    assert (first["case_id"], first["slice"], first["pixels_truth"], first["dsc_case"]) == (
        "case_1",
        "4",
        "320",
        "0.731",
    )
    assert float(first["dsc_slice"]) == pytest.approx(2 * 20 * 13 / 640)
    assert float(second["dsc_case"]) == 0.9
    assert "case_1 0.731, case_2 0.900" in picture.alt


def drawn_axes(monkeypatch):
    """Collect the axes of the figures that are saved."""
    axes = []
    save = overlays.save_picture

    def keep(figure, *args):
        axes.extend(figure.axes)
        return save(figure, *args)

    monkeypatch.setattr(overlays, "save_picture", keep)
    return axes


def texts_of(axes):
    return [text.get_text() for axis in axes for text in (*axis.texts, axis.title, axis._left_title)]


def test_the_dsc_stands_on_the_tile(tmp_path, monkeypatch):
    axes = drawn_axes(monkeypatch)
    tiles = [tile("a", dsc=0.7314, note="worst"), tile("b", prediction="none", dsc=0.0), tile("c", dsc=math.nan)]
    draw_overlays(tiles, ("background", "atrium"), tmp_path)
    texts = texts_of(axes)
    for said in ("DSC 0.731", "DSC 0.000", "DSC undefined", "no prediction", "a, slice 5 of 9 (worst)", "Truth"):
        assert said in texts
    assert any(text.endswith(" mm") for text in texts)


def test_overlays_of_empty_masks_and_anisotropic_pixels(tmp_path):
    nothing = tile("empty", prediction="empty")
    blank = Tile("blank", "", 0, 1, np.zeros((8, 9)), np.zeros((8, 9), np.uint8), None, (1.0, 1.0), math.nan)
    stretched = tile("tall", spacing=(3.0, 1.0))
    picture = draw_overlays([nothing, blank, stretched], ("background", "atrium"), tmp_path)
    assert_real_png(picture)
    assert [line["pixels_prediction"] for line in read_csv(picture.csv)] == ["0", "0", "320"]


def test_pixels_are_drawn_in_the_shape_they_have(tmp_path, monkeypatch):
    axes = drawn_axes(monkeypatch)
    draw_overlays([tile(spacing=(3.0, 2.0))], ("background", "atrium"), tmp_path)
    assert len(axes) == 3
    assert {axis.get_aspect() for axis in axes} == {1.5}
    for axis in axes:
        box = axis.get_window_extent()
        rows, columns = abs(np.diff(axis.get_ylim())[0]), abs(np.diff(axis.get_xlim())[0])
        assert (box.height / rows) / (box.width / columns) == pytest.approx(1.5, rel=1e-3)


def test_tiles_keep_the_aspect_of_the_patient():
    flat, tall = tile(spacing=(1.0, 1.0)), tile(spacing=(2.0, 1.0))
    for one in (flat, tall):
        rows, columns = overlays._window(one)
        shown = one.image[rows, columns].shape
        drawn = overlays._aspect(one, (rows, columns))
        assert drawn == pytest.approx(shown[0] * one.spacing_mm[0] / (shown[1] * one.spacing_mm[1]))
    assert overlays._aspect(tall, (slice(None), slice(None))) == 2.0


def test_the_window_holds_every_labelled_pixel():
    truth, prediction = np.zeros((50, 60), np.uint8), np.zeros((50, 60), np.uint8)
    truth[20:30, 20:30] = 1
    prediction[48, 58] = 1  # a false pixel far away must stay in sight
    far = Tile("a", "", 0, 1, np.zeros((50, 60)), truth, prediction, (1.0, 1.0), 0.9)
    rows, columns = overlays._window(far)
    assert prediction[rows, columns].sum() == 1
    assert truth[rows, columns].sum() == 100
    alone = Tile("a", "", 0, 1, np.zeros((50, 60)), truth, truth, (1.0, 1.0), 1.0)
    assert alone.image[overlays._window(alone)].size < 50 * 60 / 3


def test_tiles_are_the_largest_slices_of_the_worst_to_best(make_cohort, tmp_path):
    cohort = make_cohort("a", "b", "c", "d", "e", depth=5)
    predictions = tmp_path / "p"
    predictions.mkdir()
    for case in cohort.cases[1:]:
        (predictions / f"{case.case_id}.nii.gz").write_bytes(case.label.read_bytes())
    rows = evaluate_cases(predictions, cohort, [case.case_id for case in cohort.cases])
    tiles = collect_tiles(predictions, cohort, rows)
    assert [(t.case_id, t.dsc) for t in tiles] == [("a", 0), ("b", 1), ("c", 1), ("d", 1), ("e", 1)]
    assert [t.note for t in tiles] == ["worst", "", "median", "", "best"]
    assert tiles[0].prediction is None
    np.testing.assert_array_equal(tiles[1].prediction, tiles[1].truth)
    assert all(t.truth.sum() == 100 and t.slice in (1, 2, 3) and t.depth == 5 for t in tiles)
    assert tiles[0].spacing_mm == (1.5, 1.25)
    assert [t.case_id for t in collect_tiles(predictions, cohort, rows, limit=3)] == ["a", "c", "e"]
    assert {t.slice for t in collect_tiles(predictions, cohort, rows, slice_index=0)} == {0}
    picture = draw_overlays(tiles, cohort.class_names, tmp_path, title="Test cases")
    assert_real_png(picture)
    assert picture.title == "Test cases"


def test_d27_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    """Dollar signs would be read as mathematics, and a name may be longer than the row."""
    axes = drawn_axes(monkeypatch)
    picture = draw_overlays([tile("Müller $x_{$"), tile("n" * 300)], ("background", r"a$\oops$"), tmp_path)
    assert_real_png(picture)
    texts = texts_of(axes)
    assert "Müller $x_{$, slice 5 of 9" in texts
    assert "n" * 59 + "…, slice 5 of 9" in texts
    assert imread(picture.png).shape[1] < 1300


def test_l6_without_matplotlib_the_message_gives_the_command(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv", blocks=3)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: draw_training_curves(log, tmp_path),
        lambda: draw_block_weights(log, tmp_path),
        lambda: draw_overlays([tile()], ("background", "atrium"), tmp_path),
    ):
        with pytest.raises(MissingExtra, match=r"figure needs matplotlib.*pip install 'trifuse\[med\]'"):
            draw()
    assert not list(tmp_path.glob("*.png"))


def test_an_extra_prediction_has_no_tile(make_cohort, tmp_path):
    cohort = make_cohort("a")
    rows = [
        Row(name, name, "foreground", None, status, dict.fromkeys(STRICT.metrics, 0.0), STRICT)
        for name, status in (("a", "ok"), ("stranger", "extra prediction"))
    ]
    assert [t.case_id for t in collect_tiles(tmp_path, cohort, rows)] == ["a"]


def test_no_global_state_is_left(tmp_path):
    write_log(tmp_path / "log.csv", blocks=4)
    script = """
import sys
from pathlib import Path
import matplotlib
before = list(dict.items(matplotlib.rcParams))  # rcParams' own way of reading would itself load pyplot
from trifuse.architectures.evaluation.charts import draw_block_weights, draw_training_curves
out = Path(sys.argv[1])
draw_training_curves(out / "log.csv", out)
draw_block_weights(out / "log.csv", out, selected=(1,))
assert list(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_a_picture_is_the_same_bytes_twice(tmp_path):
    first = draw_training_curves(write_log(tmp_path / "log.csv"), tmp_path / "one")
    second = draw_training_curves(tmp_path / "log.csv", tmp_path / "two")
    assert first.png.read_bytes() == second.png.read_bytes()
    assert first.csv.read_bytes() == second.csv.read_bytes()


def test_colours_can_be_told_apart_by_the_colour_blind():
    """Any two differ in lightness or between blue and yellow: what those see who confuse red and green."""
    for i, one in enumerate(CLASS_COLOURS[:4]):
        for other in CLASS_COLOURS[:i]:
            a, b = (np.array([int(c[k : k + 2], 16) for k in (1, 3, 5)]) / 255 for c in (one, other))
            lightness = abs((a - b) @ [0.2126, 0.7152, 0.0722])
            blue_yellow = abs((a[:2].mean() - a[2]) - (b[:2].mean() - b[2]))
            assert max(lightness, blue_yellow) > 0.15
