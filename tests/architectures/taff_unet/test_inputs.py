"""What a case brings beside its image: a prior of the right labels, its ECG if there is one, no silent choice."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_ecg import made_ecg

from trifuse.architectures.data.ecg.median_beat import load_beat, network_ecg
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.architectures.runs.recipes import RecipeError
from trifuse.architectures.storage.segment_maps import ARTERY_SEGMENTS
from trifuse.architectures.taff_unet.config import TaffUNetConfig
from trifuse.architectures.taff_unet.inputs import (
    ORACLE,
    EcgInputRecipe,
    PriorRecipe,
    UndividedWall,
    case_side_inputs,
    describe_inputs,
    require_choice,
    side_input_shapes,
)
from trifuse.kernels import DataError

FULL = TaffUNetConfig("full", image_size=32, base_dim=8)
ORACLE_PRIOR = PriorRecipe("gt")


@pytest.fixture
def cohort(scar_cohort, tmp_path):
    """Return a copy of the cohort that a test may spoil."""
    return open_cohort(shutil.copytree(scar_cohort, tmp_path / "cohort"))


def without_ecg(cohort, case_id):
    """Return the cohort as if the case's ECG had never been recorded."""
    cases = [
        replace(case, clinical=replace(case.clinical, ecg=None, interval_days=None))
        if case.case_id == case_id
        else case
        for case in cohort.cases
    ]
    return replace(cohort, cases=tuple(cases))


def test_the_prior_divides_the_wall_of_its_labels(cohort):
    side_inputs = case_side_inputs(cohort, ["case001", "case002"], FULL, ORACLE_PRIOR, EcgInputRecipe())
    for case_id, extra in side_inputs.items():
        _, labels = load_case(cohort, cohort.case(case_id))
        np.testing.assert_array_equal(extra.prior > 0, labels.voxels >= 2)
        assert set(np.unique(extra.prior)) <= set(range(18))
        assert extra.prior.max() >= 12


def test_a_predicted_prior_is_not_that_of_the_reference(cohort, tmp_path):
    case = cohort.case("case001")
    _, truth = load_case(cohort, case)
    predicted = np.where(truth.voxels == 3, 2, truth.voxels).astype(np.uint8)
    predicted[:, :3, :3] = 2  # an island far from the heart
    predicted[0] = 0
    write_labels(tmp_path / "case001.nii.gz", predicted, like=truth)
    prior = case_side_inputs(cohort, ["case001"], FULL, PriorRecipe("predicted"), EcgInputRecipe(), labels=tmp_path)[
        "case001"
    ].prior
    assert not prior[0].any()
    assert not prior[:, :3, :3].any()  # only the largest body is a heart
    np.testing.assert_array_equal(prior[1:, 3:, 3:] > 0, predicted[1:, 3:, 3:] >= 2)


@pytest.mark.parametrize("source", ["predicted", "gt"])
def test_a_prior_of_other_values_is_refused(cohort, tmp_path, source):
    _, truth = load_case(cohort, cohort.case("case001"))
    write_labels(tmp_path / "case001.nii.gz", (truth.voxels > 1) * np.uint8(255), like=truth)
    with pytest.raises(
        DataError, match=r"case001\.nii\.gz: values: expected class ids: 0 background, 1 blood.*got 255"
    ):
        case_side_inputs(cohort, ["case001"], FULL, PriorRecipe(source), EcgInputRecipe(), labels=tmp_path)


def test_e10_a_first_pass_that_found_no_wall_gives_no_prior_and_says_so(cohort, tmp_path):
    _, truth = load_case(cohort, cohort.case("case001"))
    write_labels(tmp_path / "case001.nii.gz", np.zeros_like(truth.voxels), like=truth)
    extra = case_side_inputs(cohort, ["case001"], FULL, PriorRecipe("predicted"), EcgInputRecipe(), labels=tmp_path)[
        "case001"
    ]
    assert not extra.prior.any()
    assert any("no prior, because its predicted wall cannot be divided: case001" in note for note in extra.notes)


def test_an_ecg_without_a_wall_is_noted(cohort, tmp_path):
    """It joins by what it says of all positions; a case without an ECG lacks no wall, nor does one that needs none."""
    ids = ["case001", "case002"]
    for name in ids:
        truth = read_labels(cohort.case(name).label)
        write_labels(tmp_path / f"{name}.nii.gz", np.zeros_like(truth.voxels), like=truth)
    lacking = without_ecg(cohort, "case002")
    for network, noted in (
        (FULL, True),
        (replace(FULL, projection="broadcast"), False),
        (replace(FULL, setting="ap"), False),
    ):
        side_inputs = case_side_inputs(
            lacking, ids, network, PriorRecipe("predicted"), EcgInputRecipe(), labels=tmp_path
        )
        has_note = {name: any("its ECG has no wall" in note for note in side_inputs[name].notes) for name in ids}
        assert has_note == {"case001": noted, "case002": False}
    walled = case_side_inputs(cohort, ids, FULL, ORACLE_PRIOR, EcgInputRecipe())
    assert not any("its ECG has no wall" in note for name in ids for note in walled[name].notes)


def test_a_grid_is_told_how_images_are_moved(cohort):
    for options, told in (
        ({"setting": "ecg", "projection": "grid"}, True),
        ({"setting": "ecg", "projection": "grid", "grid_follows_image": False}, False),
        ({"setting": "ecg"}, False),
        ({"setting": "ap", "projection": "grid"}, False),
    ):
        network = replace(FULL, **options)
        extra = case_side_inputs(cohort, ["case001"], network, ORACLE_PRIOR, EcgInputRecipe())["case001"]
        assert extra.transform == told
        assert ("transform" in side_input_shapes(network, 64)) == told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "per segment of the prior, of rank one (segments)"),
        ({"setting": "ecg"}, "the same at every position (broadcast), rectified"),
        ({"setting": "ecg", "projection": "grid"}, "on a coarse grid (grid)"),
    ],
)
def test_a_report_says_how_the_ecg_becomes_a_map(cohort, options, said):
    network = replace(FULL, **options)
    side_inputs = case_side_inputs(cohort, ["case001"], network, ORACLE_PRIOR, EcgInputRecipe())
    facts = describe_inputs(side_inputs, network, ORACLE_PRIOR)
    assert (facts["ECG's map"], facts["ECG's leads"]) == (said, "z-scored for each lead")


def test_an_ecg_is_scaled_as_its_autoencoder_takes_it(cohort):
    network = replace(FULL, ecg=replace(FULL.ecg, lead_scaling="voltage"))
    found = {
        each.ecg.lead_scaling: case_side_inputs(cohort, ["case001"], each, ORACLE_PRIOR, EcgInputRecipe())["case001"]
        for each in (FULL, network)
    }
    scored, voltage = (found[scaling].constants["ecg"] for scaling in ("zscore", "voltage"))
    clinical = cohort.case("case001").clinical
    beat = load_beat(clinical.ecg, rate_hz=clinical.ecg_rate_hz)
    spread = torch.from_numpy(beat.signal_mv.std(1, keepdims=True)) / 0.1
    torch.testing.assert_close(voltage, scored * spread, atol=1e-4, rtol=1e-4)
    assert found["voltage"].digest() != found["zscore"].digest()
    said = describe_inputs({"case001": found["voltage"]}, network, ORACLE_PRIOR)["ECG's leads"]
    assert said == "of 0.1 mV about each lead's mean"


def test_an_ecg_is_read_at_its_rate_and_down_to_as_many_beats_as_are_asked_for(cohort, tmp_path):
    path, case = tmp_path / "short.npy", cohort.case("case001")
    np.save(path, made_ecg(seconds=2.5, rate_hz=250))
    short = replace(case, clinical=replace(case.clinical, ecg=path, ecg_rate_hz=250.0))
    of_short = replace(cohort, cases=(short,))
    for min_beats, usable in ((3, False), (1, True)):
        recipe = EcgInputRecipe(min_beats=min_beats)
        found = case_side_inputs(of_short, ["case001"], FULL, ORACLE_PRIOR, recipe)["case001"].constants
        assert found["has_ecg"] == usable
    assert torch.equal(found["ecg"], network_ecg(load_beat(path, rate_hz=250, min_beats=1)))


def test_e10_a_reference_without_a_wall_is_refused_with_its_case(cohort):
    case = cohort.case("case001")
    truth = read_labels(case.label)
    write_labels(case.label, np.minimum(truth.voxels, 1), like=truth)
    with pytest.raises(UndividedWall, match="case001: wall"):
        case_side_inputs(cohort, ["case001"], FULL, ORACLE_PRIOR, EcgInputRecipe())


def test_e10_missing_landmarks_name_the_case_and_the_way_out(cohort):
    cases = tuple(replace(case, clinical=replace(case.clinical, rv_inferior=None)) for case in cohort.cases)
    lacking = replace(cohort, cases=cases)
    with pytest.raises(DataError, match=r"2 problems(.|\n)*case001: insertions(.|\n)*--reference orientation"):
        case_side_inputs(lacking, ["case001", "case002"], FULL, ORACLE_PRIOR, EcgInputRecipe())
    side_inputs = case_side_inputs(
        lacking, ["case001"], FULL, PriorRecipe("gt", reference="orientation"), EcgInputRecipe()
    )
    assert side_inputs["case001"].prior.any()


def test_b9_a_case_without_an_ecg_brings_zeros_and_says_that_it_has_none(cohort):
    lacking = without_ecg(cohort, "case002")
    side_inputs = case_side_inputs(lacking, ["case001", "case002"], FULL, ORACLE_PRIOR, EcgInputRecipe())
    with_ecg, without = side_inputs["case001"].constants, side_inputs["case002"].constants
    assert with_ecg["ecg"].shape == without["ecg"].shape == (12, 608)
    assert with_ecg["has_ecg"]
    assert with_ecg["interval"] == cohort.case("case001").clinical.interval_days
    assert with_ecg["ecg"].std() > 0.5
    assert not without["has_ecg"]
    assert without["interval"] == 0
    assert not without["ecg"].any()
    facts = describe_inputs(side_inputs, FULL, ORACLE_PRIOR)
    assert facts["ECG"] == "1 case of 2 with one; without: case002"
    assert ORACLE in facts["Prior"]


def test_e6_an_ecg_without_beats_counts_as_absent_or_is_an_error(cohort):
    path = cohort.case("case001").clinical.ecg
    np.save(path.with_suffix(".npy"), np.zeros((12, 5000), np.float32))
    extra = case_side_inputs(cohort, ["case001"], FULL, ORACLE_PRIOR, EcgInputRecipe())["case001"]
    assert not extra.constants["has_ecg"]
    assert any("its ECG counts as absent" in note for note in extra.notes)
    odd = describe_inputs({"case001": extra}, FULL, ORACLE_PRIOR)["Odd about the inputs"]
    assert "its ECG counts as absent" in odd
    assert odd.endswith("(case001)")
    with pytest.raises(DataError):
        case_side_inputs(cohort, ["case001"], FULL, ORACLE_PRIOR, EcgInputRecipe(unusable="error"))


def test_networks_are_given_what_they_take(cohort):
    for setting, prior, ecg in (("baseline", False, False), ("ap", True, False), ("ecg", False, True)):
        extra = case_side_inputs(cohort, ["case001"], replace(FULL, setting=setting), ORACLE_PRIOR, EcgInputRecipe())[
            "case001"
        ]
        assert (extra.prior is not None, bool(extra.constants)) == (prior, ecg)
    assert all(isinstance(value, torch.Tensor) for value in extra.constants.values())


def test_the_source_of_the_prior_has_no_default():
    assert PriorRecipe().source is None
    with pytest.raises(RecipeError, match=r"has no default: 'predicted' \(--prior predicted\)"):
        require_choice(FULL, PriorRecipe(), strict=False)
    require_choice(replace(FULL, setting="ecg"), PriorRecipe(), strict=True)


def test_e11_strict_refuses_an_oracle():
    require_choice(FULL, ORACLE_PRIOR, strict=False)
    require_choice(FULL, PriorRecipe("predicted"), strict=True)
    with pytest.raises(RecipeError, match="oracle prior, refused because of --strict"):
        require_choice(FULL, ORACLE_PRIOR, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"angle_deg": 30.0}, "angle_deg is for prior.reference='fixed_angle'"),
        ({"reference": "fixed_angle"}, "angle_deg is for prior.reference='fixed_angle'"),
    ],
)
def test_priors_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PriorRecipe(**options)


def test_an_ecg_needs_a_beat():
    with pytest.raises(ValueError, match="min_beats must be at least 1, got 0"):
        EcgInputRecipe(min_beats=0)


# ------------------------------------------------------------------------------------------- an artery that is known


def with_arteries(cohort, lines):
    table = cohort.root / "arteries.csv"
    table.write_text("case_id,artery\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return PriorRecipe("gt", arteries=str(table))


def test_the_prior_of_a_known_artery_holds_its_segments_alone(cohort):
    whole = case_side_inputs(cohort, ["case001", "case002"], FULL, ORACLE_PRIOR, EcgInputRecipe())
    prior = with_arteries(cohort, ["case001,RCA", "case002,LAD", "case009,LCX"])
    known = case_side_inputs(cohort, ["case001", "case002"], FULL, prior, EcgInputRecipe())
    for case_id, artery in (("case001", "RCA"), ("case002", "LAD")):
        segments = whole[case_id].prior
        kept = known[case_id].prior
        assert kept.dtype == np.uint8
        assert set(np.unique(kept)) == {0, *ARTERY_SEGMENTS[artery]} & {0, *np.unique(segments)}
        np.testing.assert_array_equal(kept > 0, np.isin(segments, ARTERY_SEGMENTS[artery]))
    facts = describe_inputs(known, FULL, prior)
    assert facts["Prior"].startswith("oracle prior of the given artery: AHA-17 of the reference annotation")
    assert "of the artery in arteries.csv alone" in facts["Prior"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_d27_an_artery_is_found_by_either_form_of_a_name(form, cohort):
    name, line = "Müller_é", f"{unicodedata.normalize(form, 'Müller_é')},LAD"
    cohort = replace(cohort, cases=(replace(cohort.case("case001"), case_id=name),))
    inputs = case_side_inputs(cohort, [name], FULL, with_arteries(cohort, [line]), EcgInputRecipe())
    assert {*np.unique(inputs[name].prior)} <= {0, *ARTERY_SEGMENTS["LAD"]}
    with pytest.raises(DataError, match=f"each case once, got {name} more than once"):
        case_side_inputs(cohort, [name], FULL, with_arteries(cohort, [line, f"{name},RCA"]), EcgInputRecipe())


def test_the_arteries_divide_the_segments():
    assert sorted(segment for of in ARTERY_SEGMENTS.values() for segment in of) == [*range(1, 18)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["case001,RCA"], "case002: artery: expected one of LAD, RCA, LCX, got none; add its line to the table"),
        (["case001,RCA", "case002,LM"], "artery of case002: expected LAD, RCA, LCX, got LM"),
        (["case001,RCA", "case002,LAD", "case001,LAD"], "case_id: expected each case once, got case001 more than once"),
        (["case001,RCA", "case002,"], "artery of case002: expected LAD, RCA, LCX, got nothing"),
    ],
)
def test_an_artery_that_is_not_told_is_refused(cohort, lines, message):
    with pytest.raises(DataError, match=message):
        case_side_inputs(cohort, ["case001", "case002"], FULL, with_arteries(cohort, lines), EcgInputRecipe())


@pytest.mark.parametrize("content", [None, b"case,vessel\nx,LAD\n", b"\xff\xfe"])
def test_a_table_of_arteries_that_cannot_be_read(cohort, content):
    table = cohort.root / "arteries.csv"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(DataError, match="arteries: expected a CSV file with the columns case_id and artery, got"):
        case_side_inputs(cohort, ["case001"], FULL, PriorRecipe("gt", arteries=str(table)), EcgInputRecipe())
