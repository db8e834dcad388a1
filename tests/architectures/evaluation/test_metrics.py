"""Scores against a brute-force distance, every cell of the empty-mask table, and units that stay what they are."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ready_python import run_python

from trifuse.architectures.evaluation.metrics import (
    Conventions,
    average_surface_distance,
    case_metrics,
    dice,
    failure_metrics,
    hausdorff95,
    image_diagonal,
    surface_dice,
)
from trifuse.kernels import MissingExtra, ShapeError

nan, inf = math.nan, math.inf


def mask(*shape: int, on: slice | None = None) -> np.ndarray:
    made = np.zeros(shape, bool)
    if on is not None:
        made[(on,) * len(shape)] = True
    return made


# Every cell: convention, empty mask, then DSC, IoU, precision, sensitivity, HD95. The diagonal of 4x5 is sqrt(41).
DIAGONAL = math.sqrt(41)
EMPTY = [
    ("strict", "both", 1, 1, 1, 1, 0),
    ("strict", "truth", 0, 0, 0, nan, DIAGONAL),
    ("strict", "prediction", 0, 0, nan, 0, DIAGONAL),
    ("transunet", "both", 0, 0, nan, nan, 0),
    ("transunet", "truth", 1, 1, 0, nan, 0),
    ("transunet", "prediction", 0, 0, nan, 0, 0),
    ("nnunet", "both", nan, nan, nan, nan, nan),
    ("nnunet", "truth", 0, 0, 0, nan, nan),
    ("nnunet", "prediction", 0, 0, nan, 0, nan),
    ("monai", "both", nan, nan, nan, nan, nan),
    ("monai", "truth", nan, nan, 0, nan, nan),
    ("monai", "prediction", 0, 0, nan, 0, nan),
]


@pytest.mark.parametrize(("convention", "empty", "dsc", "iou", "precision", "sensitivity", "hd95"), EMPTY)
def test_d25_every_cell_of_the_empty_mask_table(convention, empty, dsc, iou, precision, sensitivity, hd95):
    nothing, something = mask(4, 5), mask(4, 5, on=slice(1, 3))
    pred = nothing if empty in ("both", "prediction") else something
    truth = nothing if empty in ("both", "truth") else something
    scores = case_metrics(pred, truth, (1.0, 1.0), convention)
    want = [dsc, iou, precision, sensitivity, hd95]
    hd95_name = "hd95_vox" if convention == "transunet" else "hd95_mm"
    got = [scores[key] for key in ("dsc", "iou", "precision", "sensitivity", hd95_name)]
    assert got == pytest.approx(want, nan_ok=True)
    assert math.isfinite(scores["volume_difference_ml"])


def test_hd_empty_nan_and_the_diagonal_in_both_units():
    nothing, something = mask(4, 5), mask(4, 5, on=slice(1, 3))
    assert math.isnan(case_metrics(nothing, something, (2, 3), Conventions(hd_empty="nan"))["hd95_mm"])
    assert case_metrics(nothing, something, (2, 3))["hd95_mm"] == pytest.approx(math.hypot(8, 15))
    assert case_metrics(nothing, something, (2, 3), Conventions(hd_unit="vox"))["hd95_vox"] == pytest.approx(DIAGONAL)


def brute_force_hd95(p, t, spacing, percentile):
    def border(m):
        padded = np.pad(m, 1)
        inner = np.ones_like(m)
        for axis in range(m.ndim):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[(slice(1, -1),) * m.ndim]
        return np.argwhere(m & ~inner) * np.asarray(spacing)

    a, b = border(p), border(t)
    between = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    directed = between.min(1), between.min(0)
    if percentile == "pooled":
        return np.percentile(np.concatenate(directed), 95)
    return max(np.percentile(d, 95) for d in directed)


two_masks = st.integers(2, 3).flatmap(
    lambda ndim: st.tuples(
        *[hnp.arrays(bool, st.shared(hnp.array_shapes(min_dims=ndim, max_dims=ndim, max_side=6), key="shape"))] * 2,
        st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.25, 3.0, 8.0])] * ndim),
    )
)


@given(two_masks, st.sampled_from(["pooled", "max"]))
@settings(max_examples=150, deadline=None)
def test_hd95_equals_brute_force_with_anisotropic_spacing(masks, percentile):
    p, t, spacing = masks
    p.flat[0] = t.flat[-1] = True
    got = hausdorff95(p, t, spacing, percentile=percentile)
    assert got == pytest.approx(brute_force_hd95(p, t, spacing, percentile), rel=1e-9, abs=1e-9)
    assert got <= image_diagonal(p.shape, spacing)


@given(two_masks, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_cropping_to_the_masks_changes_no_bit(masks, margin):
    p, t, spacing = masks
    p.flat[0] = t.flat[-1] = True
    assert hausdorff95(np.pad(p, margin), np.pad(t, margin), spacing) == hausdorff95(p, t, spacing)


@given(two_masks)
@settings(max_examples=50, deadline=None)
def test_swapping_the_masks_swaps_precision_and_sensitivity(masks):
    p, t, spacing = masks
    p.flat[0] = t.flat[-1] = True
    forward, backward = case_metrics(p, t, spacing), case_metrics(t, p, spacing)
    assert forward["precision"] == backward["sensitivity"]
    for symmetric in ("dsc", "iou", "hd95_mm", "volume_difference_ml"):
        assert forward[symmetric] == pytest.approx(backward[symmetric])
    assert forward["iou"] == pytest.approx(forward["dsc"] / (2 - forward["dsc"]))


def test_monai_parity_on_random_volumes():
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(3)
    for spacing in [(1.0, 1.0, 1.0), (8.0, 1.25, 0.7)]:
        p, t = rng.random((2, 5, 9, 8)) > 0.6
        onehot = [torch.from_numpy(m)[None, None] for m in (p, t)]
        theirs = monai.compute_hausdorff_distance(*onehot, include_background=True, percentile=95, spacing=spacing)
        scores = case_metrics(p, t, spacing, "monai")
        assert scores["hd95_mm"] == pytest.approx(float(theirs), rel=2e-6)
        assert scores["dsc"] == pytest.approx(float(monai.compute_dice(*onehot)), rel=2e-6)
        for tolerance_mm in (0.0, 0.7, 1.25, 3.0):
            theirs = monai.compute_surface_dice(*onehot, [tolerance_mm], include_background=True, spacing=spacing)
            assert surface_dice(p, t, tolerance_mm, spacing) == pytest.approx(float(theirs), rel=2e-6)


def test_surface_dice_by_hand():
    """Two rows of five pixels, two apart: none of their borders is nearer than 2, and all of them at 2."""
    p, t = np.zeros((2, 6, 6), bool)
    p[1, :5] = t[3, :5] = True
    assert [surface_dice(p, t, tolerance) for tolerance in (0, 1.9, 2)] == [0, 0, 1]
    t[1, :5] = True
    assert surface_dice(p, t, 0) == pytest.approx(10 / 15)
    assert average_surface_distance(p, t, (1.5, 1.0)) == pytest.approx(5 * 3.0 / 15)
    with pytest.raises(ValueError, match="tolerance_mm must be a finite number, 0 or more; got -1"):
        surface_dice(p, t, -1)
    with pytest.raises(ShapeError, match="non-empty"):
        surface_dice(p, np.zeros_like(t), 1)


@pytest.mark.parametrize(
    ("kind", "column", "want"),
    [
        ("absolute", "volume_difference_ml", 0.004),
        ("signed", "volume_difference_ml", -0.004),
        ("relative", "volume_difference_relative", 0.5),
        ("signed_relative", "volume_difference_relative", -0.5),
    ],
)
def test_volume_difference_in_ml_relative_and_signed(kind, column, want):
    pred, truth = mask(4, 4, 4), mask(4, 4, 4, on=slice(0, 2))
    pred[0, :2, :2] = True  # 4 voxels of 1 mm3 against 8
    scores = case_metrics(pred, truth, (0.5, 2, 1), Conventions(volume=kind))
    assert scores[column] == pytest.approx(want)


def test_relative_volume_of_nothing_is_undefined_unless_it_is_right():
    nothing, something = mask(3, 3), mask(3, 3, on=slice(0, 1))
    relative = Conventions(volume="relative")
    assert math.isnan(case_metrics(something, nothing, (1, 1), relative)["volume_difference_relative"])
    assert case_metrics(nothing, nothing, (1, 1), relative)["volume_difference_relative"] == 0


@pytest.mark.parametrize("convention", ["strict", "transunet", "nnunet", "monai"])
def test_dice_alone_is_that_of_all_scores(convention):
    rng = np.random.default_rng(3)
    masks = [mask(4, 5), mask(4, 5, on=slice(1, 3)), rng.random((4, 5)) > 0.5]
    for p in masks:
        for t in masks:
            want = case_metrics(p, t, (1.0, 1.0), convention)["dsc"]
            assert dice(p, t, convention) == pytest.approx(want, nan_ok=True)
    with pytest.raises(ShapeError, match="one shape"):
        dice(masks[0], mask(4, 4))


def test_slices_know_the_volume_of_a_voxel():
    scores = case_metrics(mask(3, 3), mask(3, 3, on=slice(0, 2)), (1, 1), voxel_ml=0.25)
    assert scores["volume_difference_ml"] == 1.0


def test_without_a_spacing_everything_is_in_voxels():
    scores = case_metrics(mask(3, 3, on=slice(0, 1)), mask(3, 3, on=slice(0, 2)), None)
    assert scores["volume_difference_vox"] == 3
    assert set(scores) == {"dsc", "iou", "precision", "sensitivity", "volume_difference_vox", "hd95_vox"}


def test_each_convention_has_its_unit_and_images_without_a_spacing_have_one():
    units = {word: Conventions(word).hd_unit for word in ("strict", "transunet", "nnunet", "monai")}
    assert units == {"strict": "mm", "transunet": "vox", "nnunet": "mm", "monai": "mm"}
    assert Conventions("transunet", hd_unit="mm").metrics[-1] == "hd95_mm"
    voxels = Conventions("strict").in_voxels()
    assert voxels.metrics[-2:] == ("volume_difference_vox", "hd95_vox")
    assert Conventions.from_label(voxels.label) == voxels
    assert "mm" not in voxels.describe()
    assert "mL" not in voxels.describe()
    assert Conventions("strict", volume="relative").in_voxels().metrics[-2] == "volume_difference_relative"


@pytest.mark.parametrize("convention", ["strict", "transunet"])
def test_voxels_ignore_the_spacing_and_mm_do_not(convention):
    pred, truth = mask(9, 9), mask(9, 9, on=slice(2, 6))
    pred[2:6, 4:8] = True  # two columns beside it
    assert case_metrics(pred, truth, (1, 5), Conventions(convention, hd_unit="vox"))["hd95_vox"] == 2
    assert case_metrics(pred, truth, (1, 5), Conventions(convention, hd_unit="mm"))["hd95_mm"] > 2
    in_voxels = Conventions(convention).in_voxels()
    assert case_metrics(pred, truth, (1, 5), in_voxels) == case_metrics(pred, truth, None, convention)


def test_arguments_are_left_as_they_were():
    pred, truth = np.full((3, 3), 7, np.uint8), np.eye(3, dtype=np.int16) * 420
    before = pred.copy(), truth.copy()
    assert case_metrics(pred, truth, (1, 1))["sensitivity"] == 1  # any non-zero value is foreground
    np.testing.assert_array_equal(pred, before[0])
    np.testing.assert_array_equal(truth, before[1])


@pytest.mark.parametrize("convention", ["strict", "transunet", "nnunet", "monai"])
def test_l11_a_missing_prediction_is_the_worst_under_every_convention(convention):
    scores = failure_metrics((4, 5), (2, 3), Conventions(convention, hd_unit="mm"))
    assert [scores[key] for key in ("dsc", "iou", "precision", "sensitivity")] == [0, 0, 0, 0]
    assert scores["hd95_mm"] == pytest.approx(math.hypot(8, 15))
    assert math.isnan(failure_metrics(None, None, Conventions(convention, hd_unit="mm"))["hd95_mm"])


def test_conventions_travel_in_one_cell_and_say_what_they_are():
    chosen = Conventions("monai", hd_unit="vox", aggregation="slice", slices="labelled")
    assert chosen.percentile == "max"
    assert Conventions.from_label(chosen.label) == chosen
    sentence = chosen.describe()
    for said in ("monai", "voxels", "larger of the two", "per slice", "the slices that somebody labelled"):
        assert said in sentence
    with pytest.raises(ValueError, match="does not name the conventions"):
        Conventions.from_label("somebody's own")


def test_rejects():
    with pytest.raises(ShapeError, match=r"one shape; got \(2, 2\) and \(3, 3\)"):
        case_metrics(mask(2, 2), mask(3, 3), (1, 1))
    with pytest.raises(ShapeError, match="needs 2 spacings"):
        case_metrics(mask(2, 2), mask(2, 2), (1, 1, 1))
    for bad in (0.0, -1.0, nan, inf):
        with pytest.raises(ShapeError, match="positive and finite"):
            case_metrics(mask(2, 2), mask(2, 2), (1, bad))
    with pytest.raises(
        ValueError, match="empty_masks: expected one of 'strict', 'transunet', 'nnunet', 'monai', got 'lenient'"
    ):
        case_metrics(mask(2, 2), mask(2, 2), (1, 1), "lenient")


def test_l6_without_scipy_the_message_gives_the_command(monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(MissingExtra, match=r"HD95 needs scipy.*pip install 'trifuse\[med\]'"):
        case_metrics(mask(3, 3, on=slice(0, 1)), mask(3, 3, on=slice(0, 2)), (1, 1))


def test_importing_the_folder_needs_neither_scipy_nor_matplotlib():
    """The reader of volumes, nibabel, loads parts of scipy where it is installed, so here it is made impossible."""
    modules = ["metrics", "tables", "statistics", "charts", "overlays", "report", "predict"]
    imports = "; ".join(f"import trifuse.architectures.evaluation.{name}" for name in modules)
    barred = ("scipy", "matplotlib", "tensorboard")
    code = f"import sys; sys.modules.update(dict.fromkeys({barred})); {imports}; print('imported')"
    done = run_python("-c", code)
    assert done.stdout.strip() == "imported", done.stderr


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("values", [[0, 1, 2], [0.0, 0.2, 0.9], [0, 255, 3], [1.0, 2.0, float("nan")]])
@pytest.mark.parametrize("score", [dice, lambda p, t: case_metrics(p, t, (1, 1))], ids=["dice", "all"])
def test_what_is_no_mask_is_refused_on_either_side(score, values, which):
    """Several classes at once and probabilities would count as foreground wherever they are not 0."""
    pair = [np.array([[0, 1, 1]]), np.array([[0, 1, 1]])]
    pair[which] = np.array([values])
    with pytest.raises(
        ValueError, match=f"{('prediction', 'truth')[which]}: expected a mask, of 0 and one other value"
    ):
        score(*pair)


def test_masks_of_any_one_value_are_masks():
    for value in (True, 1, 255, -1, 0.5):
        assert dice(np.array([[0, value, value]]), np.array([[0, 1, 1]])) == 1.0
