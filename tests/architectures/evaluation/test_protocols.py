"""Which rules of two protocols differ, in a sentence each, and what they change: held against the scores themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from trifuse.architectures.evaluation.metrics import EMPTY_MASK_SCORES, Conventions, case_metrics
from trifuse.architectures.evaluation.protocols import changed_scores, differing_rules
from trifuse.architectures.evaluation.scoring import score_case
from trifuse.architectures.runs.registry import experiments

ALL = ("dsc", "iou", "precision", "sensitivity", "volume_difference", "hd95")
STRICT, TRANSUNET = Conventions(), Conventions("transunet")
MASKS = {
    "both masks are empty": (0, 0),
    "only the truth is empty": (1, 0),
    "only the prediction is empty": (0, 1),
}


def test_each_rule_of_transunet_has_its_sentence():
    assert differing_rules(STRICT, TRANSUNET, ("dsc", "hd95")) == [
        "Where both masks are empty, `strict` scores DSC 1, and `transunet` scores DSC 0.",
        "Where only the truth is empty, `strict` scores DSC 0 and HD95 the image's diagonal, and `transunet` scores "
        "DSC 1 and HD95 0.",
        "Where only the prediction is empty, `strict` scores HD95 the image's diagonal, and `transunet` scores HD95 0.",
        "HD95 is in mm, of the true spacing under `strict`, and is in voxels, as if all were cubes of one size under "
        "`transunet`.",
    ]


@pytest.mark.parametrize(("a", "b"), [*combinations(EMPTY_MASK_SCORES, 2)])
def test_a_sentence_is_there_exactly_where_the_scores_differ(a, b):
    said = differing_rules(Conventions(a), Conventions(b), ALL)
    for words, (predicted, true) in MASKS.items():
        masks = [np.full((2, 3, 3), value, np.uint8) for value in (predicted, true)]
        one, other = (case_metrics(*masks, None, convention) for convention in (a, b))
        differs = any(one[name] != other[name] and not (math.isnan(one[name]) and math.isnan(other[name]))
                      for name in ("dsc", "iou", "precision", "sensitivity", "hd95_vox"))  # fmt: skip
        assert any(words in sentence for sentence in said) == differs, (words, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"percentile": "max"}, "the larger of the two directions"),
        ({"hd_unit": "vox"}, "in voxels, as if"),
        ({"volume": "signed"}, "is negative where the prediction is smaller"),
        ({"volume_unit": "vox"}, "The volume difference is in mL under"),
        ({"aggregation": "slice"}, "is that of one slice"),
        ({"slices": "labelled"}, "that somebody labelled"),
        ({"hd_empty": "nan"}, "leaves HD95 out of the mean"),
    ],
)
def test_every_other_rule_has_its_sentence(change, said):
    sentences = differing_rules(STRICT, replace(STRICT, **change), ALL)
    assert sentences
    assert all(said in sentence for sentence in sentences)
    assert differing_rules(STRICT, STRICT, ALL) == []


def test_rules_of_scores_that_are_not_reported_are_not_spoken_of():
    other = replace(STRICT, hd_unit="vox", volume="signed")
    assert differing_rules(STRICT, other, ("dsc", "iou")) == []


def rows_under(conventions: Conventions, *pairs):
    rows = []
    for number, (prediction, truth) in enumerate(pairs):
        labels = {"prediction": prediction, "truth": truth, "spacing_mm": (2, 1, 1), "class_names": ("bg", "a")}
        rows += score_case(**labels, conventions=conventions, case_id=f"c{number}", patient=f"c{number}")
    return rows


def test_what_changes_is_counted():
    full, empty = np.ones((2, 3, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    pairs = (full, full), (empty, empty), (full, empty)
    ours, theirs = (rows_under(each, *pairs) for each in (STRICT, TRANSUNET))
    assert changed_scores(ours, theirs, ("dsc", "hd95")) == "Of 3 rows of scores that changes DSC in 2."
    ours, theirs = (rows_under(each, *pairs[:1]) for each in (STRICT, TRANSUNET))
    assert changed_scores(ours, theirs, ("dsc", "iou")) == "Here that changes no DSC and no IoU."
    same = rows_under(Conventions("nnunet"), (empty, empty))
    assert changed_scores(same, same, ("dsc",)) == "Here that changes no DSC."  # NaN is what it was


def test_what_is_left_out_of_the_mean_is_said_apart():
    first, *_ = differing_rules(STRICT, Conventions("nnunet"), ALL)
    assert first == (
        "Where both masks are empty, `strict` scores DSC 1, IoU 1, precision 1, sensitivity 1 and HD95 0, and `nnunet` "
        "leaves DSC, IoU, precision, sensitivity and HD95 out of the mean."
    )
    truth, *_ = differing_rules(Conventions("nnunet"), Conventions("monai"), ("dsc", "sensitivity"))
    assert truth == "Where only the truth is empty, `nnunet` scores DSC 0, and `monai` leaves DSC out of the mean."


@pytest.mark.parametrize("known", experiments(), ids=lambda known: known.name)
def test_every_network_has_a_protocol_that_differs_from_strict_in_what_its_paper_reports(known):
    protocol = known.load(known.protocol)
    assert protocol.source.endswith(".")
    assert differing_rules(STRICT, protocol.conventions, protocol.metrics)
    names = protocol.conventions.metrics
    assert all(any(name.startswith(metric) for name in names) for metric in protocol.metrics)
