"""Which mechanisms of a trained network do anything: each is switched off, exchanged or held, and pixels are counted.

Every case is predicted as the network is, and once more for each mechanism, nothing else being changed. What counts is
the share of voxels whose label changes, of those that are a target before or after, and by how much the scores change.
A mechanism that moves less than a threshold is dead, whatever its weights may look like.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from trifuse.architectures.data.layouts.cohort import Case, Cohort
from trifuse.architectures.data.layouts.read_case import load_case, load_image
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.side_inputs import SideInputs, side_inputs_of
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.architectures.storage.text import listed, repeated

from .mechanisms import Context, Means, Mechanism, together
from .metrics import Conventions, case_metrics, dice
from .predict import predict_labels
from .scoring import find_cases
from .statistics import bootstrap_interval
from .summary import mean_of_defined

THRESHOLD = 0.01  # of the voxels: a mechanism that moves less is dead
ALL_CLASSES = "all classes"
SAME_EVERYWHERE = "no two of these cases have one that differs; take more cases"
SATURATED = 0.05  # a weight in [0, 1] that is closer to an end than this

Labels = NDArray[np.uint8]


class Interval(NamedTuple):
    """A mean over cases, and the 95 % interval that resampling patients gives it; NaN where there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """What a mechanism does to one case.

    Attributes:
        mechanism: its name.
        case_id, patient: the case.
        voxels: by target, how many voxels are it before or after: all classes together, and each where there are more.
        changed: by target, how many of these are it only before, or only after; of all classes, change their label.
        scores: by target and score, the change; NaN where a score is undefined, for all classes the mean over them.
    """

    mechanism: str
    case_id: str
    patient: str
    voxels: Mapping[str, int]
    changed: Mapping[str, int]
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Moved:
    """What a mechanism does to a target, over cases: the share of its voxels that change, and the change of scores."""

    target: str
    share: Interval
    scores: Mapping[str, Interval]


@dataclass(frozen=True)
class Finding:
    """What is known of a mechanism: what it moves of all classes, then of each; and whether it is dead.

    ``dead`` is None where it was not measured, for the reason ``unmeasured``.
    """

    mechanism: Mechanism
    cases: int
    moved: tuple[Moved, ...]
    dead: bool | None
    unmeasured: str = ""

    @property
    def verdict(self) -> str:
        """``"dead"``, ``"alive"`` or ``"not measured"``."""
        return {None: "not measured", True: "dead", False: "alive"}[self.dead]

    @property
    def most(self) -> Moved:
        """The target that it moves most."""
        return max(self.moved, key=lambda moved: -1.0 if math.isnan(moved.share.mean) else moved.share.mean)


@dataclass(frozen=True)
class Spread:
    """How what was watched varies over images.

    Attributes:
        name: what was watched.
        images: how many passes were seen: slices or windows, each mirroring counted.
        mean: over images, channels and positions.
        sd: over images, its mean over channels and positions: 0 for what is the same for every image.
        low, high: the smallest and the largest value.
        saturated: the share of values below 0.05 or above 0.95.
    """

    name: str
    images: int
    mean: float
    sd: float
    low: float
    high: float
    saturated: float


@dataclass(frozen=True)
class Audit:
    """All that an audit found; ``threshold`` is the share of voxels below which a mechanism is dead."""

    findings: tuple[Finding, ...]
    spreads: tuple[Spread, ...]
    effects: tuple[Effect, ...]
    metrics: tuple[str, ...]
    threshold: float

    @property
    def dead(self) -> tuple[Finding, ...]:
        """The mechanisms that do nothing to speak of."""
        return tuple(finding for finding in self.findings if finding.dead)


def audit_network(
    model: nn.Module,
    cohort: Cohort,
    case_ids: Sequence[str],
    preprocessing: Preprocessing,
    mechanisms: Sequence[Mechanism],
    *,
    side_inputs: Mapping[str, SideInputs] | None = None,
    threshold: float = THRESHOLD,
    hd95: bool = False,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> Audit:
    """Find out what each mechanism of a network does to the predictions of some cases; the network stays as it is.

    Args:
        model: the network; moved to ``device``.
        cohort: where the cases are. Cases without labels count, but have no scores.
        case_ids: the cases.
        preprocessing: as in training.
        mechanisms: the network's.
        side_inputs: what the cases bring beside their images; exchanges are among these cases.
        threshold: a mechanism that changes a smaller share of the voxels of all classes, and of each, is dead.
        hd95: whether the change of HD95 is measured beside that of the DSC, which takes longer.
        batch_size, device: see `predict_labels`.

    Raises:
        DataError: no case is given, or one is unknown or unreadable.
        NumericError: a logit is not finite.
        ValueError: a threshold that is no share, or two mechanisms of one name.
    """
    _check(mechanisms, threshold)
    cases = find_cases(cohort, case_ids)
    if device is not None:
        model.to(device)  # before a context remembers where its weights are
    own = {} if side_inputs is None else {case_id: side_inputs_of(side_inputs, case_id) for case_id in case_ids}
    swapped = {each.name: each.exchange(own) for each in mechanisms if each.exchange is not None}
    conventions = Conventions() if cohort.has_spacing else Conventions().in_voxels()
    metrics = ("dsc", conventions.hd95)[: 1 + hd95]

    def predict(image: Volume, brought: SideInputs | None) -> Labels:
        return predict_labels(model, image, preprocessing, brought, batch_size, device)

    seen: dict[str, _Seen] = {watch.name: _Seen() for each in mechanisms for watch in each.watches}
    if seen:
        with _watching(model, mechanisms, seen):
            for case in _shown(cases, "watch"):
                predict(load_image(case, nonfinite=preprocessing.nonfinite), own.get(case.case_id))
    means = {name: each.mean for name, each in seen.items() if each.images}
    effects: list[Effect] = []
    for case in _shown(cases, "audit"):
        image, truth = load_case(cohort, case, nonfinite=preprocessing.nonfinite)
        before = predict(image, own.get(case.case_id))
        judge = _Judge(case, before, truth, cohort.class_names, conventions, metrics)
        for each in mechanisms:
            brought = swapped.get(each.name, own).get(case.case_id)
            if each.unmeasured or _lacks(each, means) or (each.exchange is not None and brought is None):
                continue
            with nullcontext() if each.switch is None else each.switch(model, means):
                effects.append(judge.effect(each.name, predict(image, brought)))
    return Audit(
        tuple(_finding(each, effects, means, threshold) for each in mechanisms),
        tuple(each.spread(name) for name, each in seen.items() if each.images),
        tuple(effects),
        metrics,
        threshold,
    )


def _check(mechanisms: Sequence[Mechanism], threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a share of the voxels between 0 and 1, got {threshold}; 0.01 is usual")
    if twice := sorted(repeated(each.name for each in mechanisms)):
        raise ValueError(f"mechanisms: expected a name of its own for each, got {listed(twice)} twice; rename one")


def _shown(cases: Sequence[Case], what: str) -> Iterable[Case]:
    return tqdm(cases, desc=what, unit="case", disable=not sys.stderr.isatty())


def _lacks(mechanism: Mechanism, means: Means) -> bool:
    """Whether something that a mechanism is to be held at was never seen."""
    return any(watch.name not in means for watch in mechanism.watches)


# ---------------------------------------------------------------------------------------------- what was watched


class _Seen:
    """Mean and spread over images of values (B, ...), in float64, without keeping them."""

    def __init__(self) -> None:
        self.images, self.saturated = 0, 0
        self.low, self.high = math.inf, -math.inf
        self._mean, self._squares = torch.zeros(()), torch.zeros(())

    def keep(self, values: Tensor) -> None:
        for value in values.detach().to("cpu", torch.float64):  # Welford's sums, image by image
            self.images += 1
            away = value - self._mean
            self._mean = self._mean + away / self.images
            self._squares = self._squares + away * (value - self._mean)
            self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))
            self.saturated += int(((value < SATURATED) | (value > 1 - SATURATED)).sum())

    @property
    def mean(self) -> Tensor:
        return self._mean

    def spread(self, name: str) -> Spread:
        sd = (self._squares / max(1, self.images - 1)).sqrt()
        saturated = self.saturated / (self.images * self._mean.numel())
        return Spread(name, self.images, float(self._mean.mean()), float(sd.mean()), self.low, self.high, saturated)


def _watching(model: nn.Module, mechanisms: Sequence[Mechanism], seen: Mapping[str, _Seen]) -> Context:
    watches = {watch.name: watch for each in mechanisms for watch in each.watches}
    return together(watch.record(model, seen[name].keep) for name, watch in watches.items())


# ---------------------------------------------------------------------------------------------------- what moves


class _Judge:
    """Compares what is predicted of one case with what the untouched network predicts, and with the truth."""

    def __init__(
        self,
        case: Case,
        before: Labels,
        truth: Volume | None,
        class_names: Sequence[str],
        conventions: Conventions,
        metrics: tuple[str, ...],
    ) -> None:
        self.case, self.before, self.truth = case, before, truth
        self.classes = dict(enumerate(class_names[1:], start=1))
        self.conventions, self.metrics = conventions, metrics
        self.scores = {name: self._scores(before, number) for number, name in self.classes.items()}

    def effect(self, mechanism: str, after: Labels) -> Effect:
        changed = self.before != after
        voxels = {ALL_CLASSES: int(((self.before > 0) | (after > 0)).sum())}
        moved = {ALL_CLASSES: int(changed.sum())}
        scores: dict[str, dict[str, float]] = {}
        for number, name in self.classes.items():
            was, now = self.before == number, after == number
            voxels[name], moved[name] = int((was | now).sum()), int((was ^ now).sum())
            found = self._scores(after, number) if moved[name] else self.scores[name]
            scores[name] = {metric: value - self.scores[name][metric] for metric, value in found.items()}
        scores[ALL_CLASSES] = {
            metric: mean_of_defined([each[metric] for each in scores.values()]) for metric in self.metrics
        }
        if len(self.classes) == 1:  # it is all classes
            for each in (voxels, moved, scores):
                del each[self.classes[1]]
        return Effect(mechanism, self.case.case_id, self.case.patient, voxels, moved, scores)

    def _scores(self, labels: Labels, number: int) -> dict[str, float]:
        if self.truth is None:
            return dict.fromkeys(self.metrics, math.nan)
        found, true = labels == number, self.truth.voxels == number
        if self.metrics == ("dsc",):  # which is had without distances
            return {"dsc": dice(found, true, self.conventions.empty_masks)}
        every = case_metrics(found, true, self.truth.spacing_mm, self.conventions)
        return {metric: every[metric] for metric in self.metrics}


def _finding(mechanism: Mechanism, effects: Sequence[Effect], means: Means, threshold: float) -> Finding:
    own = [effect for effect in effects if effect.mechanism == mechanism.name]
    if not own:
        reason = mechanism.unmeasured or ("it was never seen at work" if _lacks(mechanism, means) else SAME_EVERYWHERE)
        return Finding(mechanism, 0, (), None, reason)
    moved = tuple(_moved(target, own) for target in own[0].voxels)
    shares = [each.share.mean for each in moved if not math.isnan(each.share.mean)]
    if not shares:
        return Finding(mechanism, len(own), (), None, "the network predicts no target, with it or without")
    return Finding(mechanism, len(own), moved, max(shares) < threshold)


def _moved(target: str, effects: Sequence[Effect]) -> Moved:
    """Return the share of a target's voxels that change, pooled over cases, and the mean change of its scores."""
    patients = [effect.patient for effect in effects]
    voxels = np.array([effect.voxels[target] for effect in effects], dtype=float)
    shares = np.array([effect.changed[target] / max(1, effect.voxels[target]) for effect in effects])
    mean = float((shares * voxels).sum() / voxels.sum()) if voxels.any() else math.nan
    share = Interval(mean, *bootstrap_interval(shares, patients, weights=voxels))
    scores = {}
    for metric in effects[0].scores[target]:
        values = np.array([effect.scores[target][metric] for effect in effects])
        there = np.isfinite(values)
        of = [patient for patient, defined in zip(patients, there, strict=True) if defined]
        mean = float(values[there].mean()) if there.any() else math.nan
        scores[metric] = Interval(mean, *bootstrap_interval(values[there], of))
    return Moved(target, share, scores)
