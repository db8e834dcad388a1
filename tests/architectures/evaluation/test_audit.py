"""An audit counts what moves: a dead mechanism is called dead, a living one is not, and every number can be checked."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.data.volumes.nifti import new_volume, write_image, write_labels
from trifuse.architectures.evaluation.audit import ALL_CLASSES, Effect, _moved, audit_network
from trifuse.architectures.evaluation.audit_report import format_audit, percent, write_audit
from trifuse.architectures.evaluation.mechanisms import (
    Mechanism,
    Watch,
    answering,
    exchanged,
    holding,
    with_constants,
    zeroed,
)
from trifuse.kernels import DataError

AS_IS = Preprocessing("as_is", channels=1, image_size=8)
TRUE = {"a": ((1, 5), (1, 5)), "b": ((2, 8), (2, 4)), "c": ((0, 2), (0, 8))}  # rows and columns of class 1


class Painter(nn.Module):
    """Class 1 where the image is 1, class 2 where it is 2; ``lost`` is dead, and ``edge`` moves one row of class 1."""

    def __init__(self):
        super().__init__()
        self.lost = nn.Conv2d(1, 1, 1)
        self.edge = nn.Identity()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, image, **inputs):
        self.lost(image)
        one = self.edge((image == 1).float()) * self.gain
        two = (image == 2).float()
        return torch.cat([0.5 - one - two, one, two], dim=1)


@pytest.fixture
def cohort(tmp_path):
    """Three cases of 8 x 8 x 2 voxels, whose images are their labels."""
    for name, (rows, columns) in TRUE.items():
        labels = np.zeros((8, 8, 2), np.uint8)
        labels[slice(*rows), slice(*columns), 0] = 1
        labels[6:, 6:, 1] = 2
        grid = new_volume(labels.astype(np.float32), np.diag([-1.0, -1.0, 5.0, 1.0]))
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / f"images/{name}.nii.gz", grid.voxels, grid)
        write_labels(tmp_path / f"labels/{name}.nii.gz", grid.voxels.astype(np.uint8), grid)
    return open_cohort(tmp_path, "plain", targets=["one=1", "two=2"])


def one_row_less(given, result):
    """Take the first row of class 1 that there is away."""
    rows = result.any(dim=3, keepdim=True).float()
    first = (rows.cumsum(dim=2) == 1) & (rows == 1)
    return torch.where(first, 0.0, result)


LOST = Mechanism("lost", "its map is zero", lambda model, means: zeroed([model.lost]))
EDGE = Mechanism("edge", "a row is lost", lambda model, means: answering([model.edge], one_row_less))
ALL = Mechanism("class 1", "it is not painted", lambda model, means: holding([(model.gain, 0.0)]))


def audit(cohort, *mechanisms, model=None, preprocessing=AS_IS, cases=tuple(TRUE), **options):
    return audit_network(model or Painter(), cohort, cases, preprocessing, mechanisms, **options)


def test_a_dead_mechanism_is_called_dead_and_a_living_one_is_not(cohort):
    found = audit(cohort, LOST, EDGE, ALL)
    assert [each.verdict for each in found.findings] == ["dead", "alive", "alive"]
    assert [each.mechanism.name for each in found.dead] == ["lost"]
    assert found.findings[0].moved[0].share == (0.0, 0.0, 0.0)
    alive = audit(cohort, EDGE)
    assert format_audit(alive).startswith("None of 1 mechanism measured is dead: each changes 1 % of a class or more.")
    assert (
        "1 of 3 mechanisms measured is dead, changing less than 1 % of the voxels of every class: lost."
        in format_audit(found)
    )


def test_the_network_is_afterwards_what_it_was(cohort):
    model = Painter().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(cohort, LOST, EDGE, ALL, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_shares_are_of_the_voxels_that_are_a_target_before_or_after(cohort):
    """Native rows are columns of the network's input or rows: either way a lost line has one side of the rectangle."""
    found = audit(cohort, EDGE, ALL)
    edge, everything = found.findings
    one = {name: (rows[1] - rows[0]) * (columns[1] - columns[0]) for name, (rows, columns) in TRUE.items()}
    lines = {"a": 4, "b": (2, 6), "c": (8, 2)}
    by_case = {each.case_id: each for each in found.effects if each.mechanism == "edge"}
    for name, effect in by_case.items():
        assert effect.voxels == {ALL_CLASSES: one[name] + 4, "one": one[name], "two": 4}
        assert effect.changed["two"] == 0
        assert effect.changed["one"] == effect.changed[ALL_CLASSES]
        assert effect.changed["one"] in np.atleast_1d(lines[name])
        kept = one[name] - effect.changed["one"]
        assert effect.scores["one"]["dsc"] == pytest.approx(2 * kept / (kept + one[name]) - 1)
        assert effect.scores["two"]["dsc"] == 0
        assert effect.scores[ALL_CLASSES]["dsc"] == pytest.approx(effect.scores["one"]["dsc"] / 2)
    moved = {each.target: each for each in edge.moved}
    changed = sum(effect.changed["one"] for effect in by_case.values())
    assert moved["one"].share.mean == pytest.approx(changed / sum(one.values()))
    assert moved[ALL_CLASSES].share.mean == pytest.approx(changed / (sum(one.values()) + 12))
    assert edge.most.target == "one"
    low, high = moved["one"].share[1:]
    assert low < moved["one"].share.mean < high
    assert {each.target: each.share.mean for each in everything.moved}["one"] == 1
    assert everything.moved[0].scores["dsc"].mean == pytest.approx(-0.5)  # class 1 from 1 to 0, class 2 as it was


def test_one_class_that_moves_is_enough_to_be_alive(cohort):
    """A class may be a small part of all: the threshold holds for each."""
    found = audit(cohort, EDGE, threshold=0.12)
    assert found.findings[0].moved[0].share.mean < found.findings[0].most.share.mean
    (lower, higher) = sorted(each.share.mean for each in found.findings[0].moved[:2])
    for threshold, verdict in ((lower, "alive"), ((lower + higher) / 2, "alive"), (higher + 0.01, "dead")):
        assert audit(cohort, EDGE, threshold=threshold).findings[0].verdict == verdict


def test_hd95_is_measured_where_it_is_asked_for(cohort):
    assert audit(cohort, EDGE).metrics == ("dsc",)
    found = audit(cohort, LOST, EDGE, hd95=True)
    assert found.metrics == ("dsc", "hd95_mm")
    still, moved = (each.moved[0].scores["hd95_mm"].mean for each in found.findings)
    assert still == 0
    assert moved > 0


def test_cases_without_labels_count_and_have_no_scores(cohort):
    unlabelled = replace(cohort, cases=[replace(case, label=None) for case in cohort.cases])
    found = audit(unlabelled, EDGE)
    assert found.findings[0].verdict == "alive"
    assert math.isnan(found.findings[0].moved[0].scores["dsc"].mean)
    assert "nan" not in format_audit(found)


def test_a_network_that_predicts_nothing_is_no_proof(cohort, tmp_path):
    model = Painter()
    model.edge.register_forward_hook(lambda module, given, result: result * 0)
    found = audit(cohort, LOST, model=model, cases=["a"])
    assert found.findings[0].dead  # class 2 is still there
    nothing = nn.Sequential(nn.Conv2d(1, 3, 1))
    nn.init.zeros_(nothing[0].weight)
    nothing[0].bias.data = torch.tensor([1.0, 0.0, 0.0])
    switch = Mechanism("weights", "they are zero", lambda model, means: holding([(model[0].weight, 0.0)]))
    found = audit(cohort, switch, model=nothing)
    (finding,) = found.findings
    assert (finding.dead, finding.verdict, finding.moved) == (None, "not measured", ())
    reason = "not measured, because the network predicts no target, with it or without: weights"
    assert format_audit(found) == f"No mechanism could be measured.\n\n{reason}"
    assert write_audit(tmp_path / "out", found, title="Audit").png.exists()


def test_what_is_watched_is_held_at_its_mean(cohort):
    """The mean over all images is known before the first switch; its spread is reported."""
    held = []
    watch = Watch(
        "amount", lambda model, keep: answering([model.edge], lambda given, result: keep(result.mean((2, 3))))
    )

    def switch(model, means):
        held.append(means["amount"].clone())
        return answering([model.edge], lambda given, result: torch.full_like(result, float(means["amount"])))

    found = audit(cohort, Mechanism("held", "at its mean", switch, watches=(watch,)))
    shares = [(rows[1] - rows[0]) * (columns[1] - columns[0]) / 64 for rows, columns in TRUE.values()]
    values = [value for share in shares for value in (share, 0.0)]  # a slice with class 1 and one without in each case
    assert [float(each) for each in held] == pytest.approx([np.mean(values)] * 3)
    (spread,) = found.spreads
    assert (spread.name, spread.images) == ("amount", 6)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert (spread.low, spread.high) == pytest.approx((0.0, max(values)))
    assert spread.saturated == pytest.approx(np.mean([value < 0.05 or value > 0.95 for value in values]))


def test_what_was_never_seen_cannot_be_held(cohort):
    watch = Watch("nothing", lambda model, keep: zeroed([]))
    switch = lambda model, means: zeroed([model.lost])  # noqa: E731
    (finding,) = audit(cohort, Mechanism("held", "at its mean", switch, watches=(watch,))).findings
    assert (finding.verdict, finding.unmeasured) == ("not measured", "it was never seen at work")


class Shifted(nn.Module):
    """Paint class 1 where the image is above what the case brings."""

    def forward(self, image, level, lost):
        one = (image > level[:, None, None, None]).float()
        return torch.cat([0.5 - one, one, 0 * one], dim=1)


def test_exchanges_are_between_the_cases_and_count_those_that_differ(cohort):
    patches = Preprocessing("as_is", channels=1, image_size=8, patches=Patches(spacing_mm=(1.0, 1.0), mirror=False))
    levels = {"a": 0.5, "b": 0.5, "c": 1.5}
    inputs = {
        name: SideInputs(constants={"level": torch.tensor(level), "lost": torch.tensor(float(number))})
        for number, (name, level) in enumerate(levels.items())
    }
    seen = []

    def other(name):
        def take(own, other):
            seen.append(1)
            value = other.constants[name]
            return None if torch.equal(value, own.constants[name]) else with_constants(own, **{name: value})

        return lambda inputs: exchanged(inputs, [*inputs], take)

    rows = [
        Mechanism("level of another", "it is exchanged", exchange=other("level")),
        Mechanism("lost of another", "it is exchanged", exchange=other("lost")),
        Mechanism("nothing to exchange", "there is none", exchange=lambda inputs: {}),
        Mechanism("absent", "it is not there", unmeasured="the network has none"),
    ]
    model = Shifted()
    level, lost, nothing, absent = audit(
        cohort, *rows, model=model, preprocessing=patches, side_inputs=inputs, cases=[*levels]
    ).findings
    assert (level.verdict, level.cases) == ("alive", 2)  # two of the three have the same level as their partner
    assert (lost.verdict, lost.cases) == ("dead", 3)
    assert (nothing.verdict, nothing.unmeasured) == (
        "not measured",
        "no two of these cases have one that differs; take more cases",
    )
    assert (absent.verdict, absent.unmeasured) == ("not measured", "the network has none")


def test_wrong_arguments_are_refused(cohort):
    with pytest.raises(ValueError, match=r"threshold: expected a share .* between 0 and 1, got 1.5; 0.01 is usual"):
        audit(cohort, LOST, threshold=1.5)
    with pytest.raises(ValueError, match=r"expected a name of its own for each, got lost twice; rename one"):
        audit(cohort, LOST, LOST)
    with pytest.raises(DataError, match="expected at least one, got 0 cases"):
        audit(cohort, LOST, cases=[])
    with pytest.raises(DataError, match="no such case"):
        audit(cohort, LOST, cases=["z"])


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (6e-6, "0.0006 %"), (0.0094, "0.94 %"), (0.0507, "5.1 %"), (0.42, "42 %"), (1.0, "100 %"),
     (math.nan, "-")],
)  # fmt: skip
def test_percent_shows_that_something_moves(share, text):
    assert percent(share) == text


def test_page_chart_and_tables_hold_the_same_numbers(cohort, tmp_path):
    absent = Mechanism("absent", "it is not there", unmeasured="the network | has none")
    found = audit(cohort, LOST, EDGE, absent)
    picture = write_audit(tmp_path / "out", found, title="Audit", facts={"Run": "x"}, command=["trifuse", "audit", "x"])
    text = (tmp_path / "out/audit.md").read_text()
    for said in ("1 of 2 mechanisms measured is dead", "| lost | 3 | 0 % |", "dead |", "the network \\| has none"):
        assert said in text, said
    assert "trifuse audit x" in text
    assert picture.png.read_bytes()[:4] == b"\x89PNG"
    with picture.csv.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["mechanism"], row["target"], row["verdict"]) for row in rows] == [
        (name, target, verdict)
        for name, verdict in (("lost", "dead"), ("edge", "alive"))
        for target in (ALL_CLASSES, "one", "two")
    ]
    assert float(rows[4]["changed"]) == found.findings[1].most.share.mean
    with (tmp_path / "out/audit_cases.csv").open() as stream:
        by_case = list(csv.DictReader(stream))
    assert len(by_case) == 2 * 3 * 3
    assert sum(int(row["changed"]) for row in by_case if row["target"] == ALL_CLASSES) == sum(
        each.changed[ALL_CLASSES] for each in found.effects
    )
    assert "lost 0 %, dead" in picture.alt


def moved_of(shares, voxels, patients):
    """Return what a mechanism moves of cases with so many voxels, of these patients."""
    effects = [
        Effect("m", str(at), patient, {"one": of}, {"one": round(share * of)}, {"one": {"dsc": share}})
        for at, (share, of, patient) in enumerate(zip(shares, voxels, patients, strict=True))
    ]
    return _moved("one", effects)


def test_intervals_of_shares_weigh_cases_by_their_voxels():
    """One small case of twenty changes wholly: of all voxels hardly any, however patients are drawn."""
    share = moved_of([1.0, *[0.0] * 19], [1, *[1000] * 19], map(str, range(20))).share
    assert share.mean == pytest.approx(1 / 19_001)
    assert share.high < 0.001


def test_intervals_resample_patients_and_not_cases():
    values = [0.1, 0.9, 0.2, 0.8]
    paired, single = (moved_of(values, [100] * 4, patients) for patients in ("aabb", "abcd"))
    for narrow, wide in ((paired.share, single.share), (paired.scores["dsc"], single.scores["dsc"])):
        assert narrow.high - narrow.low < 0.01 < wide.high - wide.low
