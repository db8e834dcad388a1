"""Two protocols: what a publication's scores hold under beside the strict one, and which rules differ, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trifuse.architectures.storage.text import count

from .metrics import DIAGONAL, EMPTY_MASK_SCORES, Conventions
from .scoring import Row
from .summary import METRIC_NAMES

_SITUATIONS = {
    "both": "both masks are empty",
    "truth": "only the truth is empty",
    "prediction": "only the prediction is empty",
}
_OF_EMPTY_MASKS = ("dsc", "iou", "precision", "sensitivity", "hd95")  # the columns of `EMPTY_MASK_SCORES`
_NAMES = {"dsc": "DSC", "iou": "IoU", "precision": "precision", "sensitivity": "sensitivity", "hd95": "HD95"}

# What each value of a rule means, and how the names of the scores begin that it is about: of all, an empty one.
_RULES = {
    "percentile": (
        "hd95",
        "HD95",
        {
            "pooled": "is the 95th percentile of both directions' distances together",
            "max": "is the larger of the two directions' 95th percentiles",
        },
    ),
    "hd_unit": (
        "hd95",
        "HD95",
        {"mm": "is in mm, of the true spacing", "vox": "is in voxels, as if all were cubes of one size"},
    ),
    "volume": (
        "volume_difference",
        "The volume difference",
        {
            "absolute": "has no sign",
            "signed": "is negative where the prediction is smaller",
            "relative": "is a share of the true volume, without sign",
            "signed_relative": "is a share of the true volume, negative where the prediction is smaller",
        },
    ),
    "volume_unit": ("volume_difference", "The volume difference", {"ml": "is in mL", "vox": "is in voxels"}),
    "aggregation": ("", "A score", {"volume": "is that of a whole volume", "slice": "is that of one slice"}),
    "slices": ("", "A score", {"all": "is of all slices", "labelled": "is of the slices that somebody labelled"}),
}


@dataclass(frozen=True)
class Protocol:
    """How a publication scored, as far as that is known.

    Attributes:
        conventions: what its scores hold under.
        metrics: how the names of the scores begin that it reports, such as ``("dsc", "volume_difference")``.
        source: what it says of this itself, and where the rest is taken from, in sentences.
    """

    conventions: Conventions
    metrics: tuple[str, ...]
    source: str


def nnunet_protocol(metrics: tuple[str, ...], source: str) -> Protocol:
    """Return the protocol of a publication that scores as nnU-Net does."""
    return Protocol(Conventions("nnunet"), metrics, source)


def differing_rules(ours: Conventions, theirs: Conventions, metrics: Sequence[str]) -> list[str]:
    """Return a sentence for each rule that differs between two conventions and concerns one of the scores."""
    return [*_empty_masks(ours, theirs, metrics), *_other_rules(ours, theirs, metrics)]


def changed_scores(ours: Sequence[Row], theirs: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return a sentence on how many scores of the same units differ under two conventions, those of one unit alone."""
    both = set(ours[0].conventions.metrics) & set(theirs[0].conventions.metrics)
    compared = [metric for metric in ours[0].conventions.metrics if metric in both and metric.startswith((*metrics,))]
    changed = {
        metric: sum(not _same(a.scores[metric], b.scores[metric]) for a, b in zip(ours, theirs, strict=True))
        for metric in compared
    }
    said = [f"{METRIC_NAMES[metric]} in {number}" for metric, number in changed.items() if number]
    if not said:
        return f"Here that changes no {' and no '.join(METRIC_NAMES[metric] for metric in compared)}."
    return f"Of {count(len(ours), 'row')} of scores that changes {_joined(said)}."


def _empty_masks(ours: Conventions, theirs: Conventions, metrics: Sequence[str]) -> Iterator[str]:
    for situation, words in _SITUATIONS.items():
        cells = [_cells(conventions, situation) for conventions in (ours, theirs)]
        names = [name for name in _OF_EMPTY_MASKS if name in metrics and cells[0][name] != cells[1][name]]
        if names:
            said = [_verdict(each.empty_masks, names, of) for each, of in zip((ours, theirs), cells, strict=True)]
            yield f"Where {words}, {', and '.join(said)}."


def _verdict(convention: str, names: Sequence[str], cells: Mapping[str, str]) -> str:
    """Say what a convention makes of some scores where a mask is empty."""
    scored = [f"{_NAMES[name]} {cells[name]}" for name in names if cells[name]]
    left_out = [_NAMES[name] for name in names if not cells[name]]
    said = [f"scores {_joined(scored)}"] if scored else []
    said += [f"leaves {_joined(left_out)} out of the mean"] if left_out else []
    return f"`{convention}` {' and '.join(said)}"


def _cells(conventions: Conventions, situation: str) -> dict[str, str]:
    """Return in words what each score is where masks are empty; nothing where it is undefined."""
    scores = EMPTY_MASK_SCORES[conventions.empty_masks][situation]
    far = "the image's diagonal" if conventions.hd_empty == "diagonal" else ""
    return {
        name: "" if math.isnan(score) else far if score == DIAGONAL else f"{score:g}"
        for name, score in zip(_OF_EMPTY_MASKS, scores, strict=True)
    }


def _joined(names: Sequence[str]) -> str:
    """Join names as a sentence does: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _other_rules(ours: Conventions, theirs: Conventions, metrics: Sequence[str]) -> Iterator[str]:
    for field, (concerned, subject, words) in _RULES.items():
        a, b = getattr(ours, field), getattr(theirs, field)
        if a != b and any(metric.startswith(concerned) for metric in metrics):
            yield f"{subject} {words[a]} under `{ours.empty_masks}`, and {words[b]} under `{theirs.empty_masks}`."


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
