"""Scores against the numbers of medpy, MONAI, TransUNet, MERIT and nnU-Net, for every fixture and for aggregates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_numbers import GOLDEN
from safetensors.numpy import load_file

from trifuse.architectures.evaluation.metrics import (
    Conventions,
    average_surface_distance,
    case_metrics,
    hausdorff95,
    surface_distances,
)
from trifuse.architectures.evaluation.scoring import score_case
from trifuse.architectures.evaluation.summary import MEAN_OF_CLASSES, summarise
from trifuse.kernels import ShapeError

FOLDER = GOLDEN / "metrics"
LABEL_FIXTURES = ("labels_2d_4cls", "labels_3d_3cls")
MONAI_BOUND = 2e-6  # it returns float32


def golden_cases():
    facts, masks = read("binary_masks")
    for name, case in facts["cases"].items():
        yield name, masks[f"{name}.pred"], masks[f"{name}.ref"], case["spacing"], case["values"]
    for fixture in LABEL_FIXTURES:
        facts, maps = read(fixture)
        for k, values in facts["per_class"].items():
            yield f"{fixture}.{k}", maps["pred"] == int(k), maps["ref"] == int(k), facts["spacing"], values


def read(fixture: str) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((FOLDER / f"{fixture}.json").read_text()), load_file(FOLDER / f"{fixture}.safetensors")


GOLDEN_CASES = list(golden_cases())
each_golden_case = pytest.mark.parametrize(
    ("pred", "ref", "spacing", "values"), [case[1:] for case in GOLDEN_CASES], ids=[case[0] for case in GOLDEN_CASES]
)


def close(got: float, want: float | str, rel: float) -> bool:
    return got == pytest.approx(float(want), rel=rel, abs=1e-12, nan_ok=True)  # "nan" and "inf" are floats as well


def test_no_fixture_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.json")} == {"binary_masks", *LABEL_FIXTURES}
    assert len(GOLDEN_CASES) == 16 + 3 + 2


@each_golden_case
def test_golden_medpy(pred, ref, spacing, values):
    scores = case_metrics(pred, ref, spacing)
    if pred.any() and ref.any():
        for ours, theirs in [("dsc", "dc"), ("iou", "jc"), ("precision", "precision"), ("sensitivity", "recall")]:
            assert close(scores[ours], values[f"medpy.{theirs}"], 1e-12), ours
        assert close(scores["hd95_mm"], values["medpy.hd95"], 1e-12)
        assert close(case_metrics(pred, ref, None)["hd95_vox"], values["medpy.hd95.unit_spacing"], 1e-12)
    else:
        assert str(values["medpy.hd95"]).startswith("raises")  # the case medpy leaves open, and we do not
        with pytest.raises(ShapeError, match="non-empty"):
            hausdorff95(pred, ref, spacing)


@each_golden_case
def test_golden_distances_between_the_borders(pred, ref, spacing, values):
    if not (pred.any() and ref.any()):
        with pytest.raises(ShapeError, match="non-empty"):
            surface_distances(pred, ref, spacing)
        return
    for suffix, step in (("", spacing), (".unit_spacing", None)):
        there, back = surface_distances(pred, ref, step)
        largest = max(there.max(), back.max())
        assert close(largest, values[f"medpy.hd{suffix}"], 1e-12)
        assert close(largest, values[f"monai.hd{suffix}"], MONAI_BOUND)
        assert close(there.mean(), values[f"medpy.asd{suffix}"], 1e-12)
        assert close(average_surface_distance(pred, ref, step), values[f"medpy.assd{suffix}"], 1e-12)
        assert close(np.percentile(there, 95), values[f"monai.hd95_directed{suffix}"], MONAI_BOUND)
        if step is not None:
            assert close(average_surface_distance(pred, ref, step), values["monai.assd_symmetric"], MONAI_BOUND)


@each_golden_case
def test_golden_monai(pred, ref, spacing, values):
    scores = case_metrics(pred, ref, spacing, "monai")
    for ours, theirs in [
        ("dsc", "dice.ignore_empty"),
        ("iou", "iou.ignore_empty"),
        ("precision", "precision"),
        ("sensitivity", "sensitivity"),
        ("hd95_mm", "hd95"),
    ]:
        assert close(scores[ours], values[f"monai.{theirs}"], MONAI_BOUND), ours
    unit = case_metrics(pred, ref, spacing, Conventions("monai", hd_unit="vox"))["hd95_vox"]
    assert close(unit, values["monai.hd95.unit_spacing"], MONAI_BOUND)


@each_golden_case
def test_golden_transunet_and_merit(pred, ref, spacing, values):
    scores = case_metrics(pred, ref, spacing, "transunet")
    dice, hd95 = values["transunet.percase(dice,hd95)"]
    assert close(scores["dsc"], dice, 1e-12)
    assert close(scores["hd95_vox"], hd95, 1e-12)
    dice, hd95, jaccard, _ = values["merit.percase(dice,hd95,jc,asd)"]
    assert close(scores["dsc"], dice, 1e-12)
    assert close(scores["dsc"], values["merit.dice_percase"], 1e-12)
    assert close(scores["iou"], jaccard, 1e-12)
    assert close(scores["hd95_vox"], hd95, 1e-12)


@each_golden_case
def test_golden_nnunet(pred, ref, spacing, values):
    scores = case_metrics(pred, ref, spacing, "nnunet")
    dice, iou, *_ = values["nnunet(dice,iou,tp,fp,fn,tn)"]
    assert close(scores["dsc"], dice, 1e-12)
    assert close(scores["iou"], iou, 1e-12)


@pytest.mark.parametrize("fixture", LABEL_FIXTURES)
def test_golden_aggregates_over_classes(fixture):
    facts, maps = read(fixture)
    flat = maps["ref"].ndim == 2
    pred, ref = (maps[name][None] if flat else maps[name] for name in ("pred", "ref"))
    conventions = Conventions("monai", aggregation="slice" if flat else "volume")
    names = ("background", *facts["per_class"])
    rows = score_case(pred, ref, (1.0, *facts["spacing"])[-3:], names, conventions, case_id="a", patient="a")
    means = {s.metric: s.mean for s in summarise(rows) if s.class_name == MEAN_OF_CLASSES}
    aggregates = facts["aggregates"]
    assert close(means["dsc"], aggregates["monai.DiceMetric(no background, mean)"], MONAI_BOUND)
    assert close(means["iou"], aggregates["monai.MeanIoU(no background, mean)"], MONAI_BOUND)
    assert close(means["hd95_mm"], aggregates["monai.HausdorffDistanceMetric95(no background, mean)"], MONAI_BOUND)
