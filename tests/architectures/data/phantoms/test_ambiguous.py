"""The ambiguous phantom: two candidates that no image tells apart, and an ECG that does, while it is fresh."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from scipy.stats import ks_2samp

from trifuse.architectures.data.ecg.beat_dataset import BeatSource, load_beats
from trifuse.architectures.data.ecg.median_beat import load_beat
from trifuse.architectures.data.ecg.ptbxl import find_ecgs
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.split import verify_split
from trifuse.architectures.data.phantoms.ambiguous import (
    ARTERIES,
    BEATS_FOLDER,
    DECOY,
    MISSING,
    RIGHT,
    WRONG,
    AmbiguousPhantom,
    ambiguous_case,
    beat_without_image,
    read_truth,
    territory_ecg,
    write_ambiguous_phantom,
)
from trifuse.architectures.data.phantoms.ecg import synthetic_ecg
from trifuse.architectures.data.phantoms.heart_anatomy import BLOOD, MYOCARDIUM, SCAR
from trifuse.architectures.data.phantoms.scar import INTERVAL_BINS_DAYS

TINY = (16, 16, 3)  # for what the image does not matter to
SMALL = AmbiguousPhantom(train=9, val=2, test=4, size=(32, 32, 5), beats=6, missing=0.2, wrong=0.1, seed=1)
NOISE = 45.0  # SD of the scanner's noise in stored values
FACING = {"LAD": ("V1", "V2", "V3", "V4"), "RCA": ("II", "III", "aVF"), "LCX": ("I", "aVL", "V5", "V6")}
COMPLEX = slice(150, 400, 2)  # the samples that a classifier sees: QRS to T


@pytest.fixture(scope="module")
def hearts():
    """Cases at the size that they have by default, but for their slices."""
    phantom = AmbiguousPhantom(size=(48, 48, 5), seed=5)
    return [ambiguous_case(phantom, number) for number in range(160)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("ambiguous")
    return root, write_ambiguous_phantom(root, SMALL)


# ------------------------------------------------------------------------------------------------------ the image


def test_every_wall_has_two_candidates_in_territories_of_their_own(hearts):
    for case in hearts:
        found = Counter(case.scan.labels.ravel().tolist())
        assert min(found[SCAR], found[DECOY]) > 20
        assert found[SCAR] + found[DECOY] < 0.5 * (found[SCAR] + found[DECOY] + found[MYOCARDIUM])
        assert case.artery != case.other_artery
        assert case.decoy_share == pytest.approx(found[DECOY] / (found[SCAR] + found[DECOY]))
    pairs = Counter((case.artery, case.other_artery) for case in hearts)
    assert len(pairs) == 6
    assert min(pairs.values()) > 10


def test_scar_and_decoy_are_of_one_law(hearts):
    """Brightness, its spread, sizes and shapes have one distribution."""
    scar, decoy = (np.array([features(case, label)[:7] for case in hearts]) for label in (SCAR, DECOY))
    p_values = [ks_2samp(first, second).pvalue for first, second in zip(scar.T, decoy.T, strict=True)]
    assert min(p_values) > 0.01, p_values
    assert decoy[:, 0].mean() == pytest.approx(scar[:, 0].mean(), rel=0.02)


def test_no_classifier_tells_scar_from_decoy_and_any_tells_it_from_the_wall(hearts):
    train, test = hearts[:80], hearts[80:]

    def accuracy(others):
        scarred, other = (
            [np.array([features(case, label) for case in part]) for part in (train, test)] for label in (SCAR, others)
        )
        x, y = np.concatenate([scarred[0], other[0]]), np.repeat([1.0, -1.0], len(train))
        mean, sd = x.mean(0), x.std(0) + 1e-9
        score = [ridge((x - mean) / sd, y[:, None], (each - mean) / sd, 30.0) for each in (scarred[1], other[1])]
        return (score[0] > score[1]).mean()

    assert abs(accuracy(DECOY) - 0.5) < 3 * 0.5 / np.sqrt(len(test))
    assert accuracy(MYOCARDIUM) > 0.95


def test_scar_is_as_bright_as_blood(hearts):
    differences = []
    for case in hearts:
        scar, blood = (np.median(case.scan.image[core(case.scan.labels == label)]) for label in (SCAR, BLOOD))
        differences.append(scar - blood)
    differences = np.array(differences)[np.isfinite(differences)]
    assert len(differences) > 100
    assert abs(differences.mean()) < NOISE / 2
    assert np.median(np.abs(differences)) < NOISE
    wall = np.mean([np.median(case.scan.image[case.scan.labels == MYOCARDIUM]) for case in hearts])
    blood = np.mean([np.median(case.scan.image[case.scan.labels == BLOOD]) for case in hearts])
    assert wall < 0.5 * blood


def core(mask):
    """Keep the voxels whose neighbours in plane are of the mask, too."""
    axes = [axis for axis, length in enumerate(mask.shape) if length != min(mask.shape)]
    return np.logical_and.reduce([mask, *(np.roll(mask, by, axis) for axis in axes for by in (-1, 1))])


def features(case, label):
    """Return brightness, its spread and extremes, size and slices of a region, and the pixels around its middle."""
    image, labels = (np.moveaxis(a, np.argmin(a.shape), 0) for a in (case.scan.image, case.scan.labels))
    mask = labels == label
    values = image[mask] / np.median(image[labels == BLOOD])
    slices = mask.sum((1, 2))
    at = slices.argmax()
    places = np.argwhere(mask[at])
    row, column = np.clip(places[len(places) // 2], 4, image.shape[1] - 5)
    around = image[at, row - 4 : row + 5, column - 4 : column + 5].ravel() / np.median(image[labels == BLOOD])
    low, high = np.quantile(values, [0.05, 0.95])
    shape = [values.mean(), values.std(), low, high, mask.sum(), slices.max(), (slices > 0).sum()]
    return np.array([*shape, *np.sort(around)])


# -------------------------------------------------------------------------------------------------------- the ECG


def ridge(x, y, new, strength):
    """Return the predictions of a linear classifier (ridge regression on scores of the classes, in its dual form)."""
    mean, offset = x.mean(0), y.mean(0)
    x, new = x - mean, new - mean
    weights = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y - offset)
    return new @ x.T @ weights + offset


def beats(days, seed, count=240):
    """Return beats, as a classifier sees them, and the number of the territory of each."""
    found = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        ecg = territory_ecg(rng, ARTERIES[number % 3], rng.uniform(*days))
        found.append(ecg.median_beat(rng)[:, COMPLEX].ravel())
    return np.array(found, np.float64), np.arange(count) % 3


@pytest.fixture(scope="module")
def territory_of():
    """A ridge classifier of territories, trained on fresh beats."""
    x, y = beats((0, 10), seed=1)
    return lambda new: ridge(x, np.eye(3)[y], np.asarray(new, np.float64), 10.0).argmax(1)


def test_a_ridge_classifier_finds_the_territory_in_fresh_beats_alone(territory_of):
    accuracy = []
    for days in ((0, 10), (14, 20), (30, 59), (90, 90)):
        x, y = beats(days, seed=2)
        accuracy.append((territory_of(x) == y).mean())
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] > 0.9
    assert 0.5 < accuracy[2] < 0.9
    assert accuracy[3] < 0.5


def test_nobody_finds_it_in_old_beats(territory_of):
    """A classifier that was trained on old beats does not, either."""
    x, y = beats((90, 90), seed=3, count=480)
    new, truth = beats((90, 90), seed=4, count=480)
    assert (ridge(x, np.eye(3)[y], new, 10.0).argmax(1) == truth).mean() < 0.5


def test_a_beat_does_not_tell_its_age():
    """Only the interval says how far to believe it: one who tells old beats from fresh ones guesses."""
    (fresh, _), (old, _) = beats((0, 10), seed=5), beats((90, 90), seed=6)
    (new_fresh, _), (new_old, _) = beats((0, 10), seed=7), beats((90, 90), seed=8)
    age = np.repeat([0, 1], len(fresh))
    guesses = ridge(np.concatenate([fresh, old]), np.eye(2)[age], np.concatenate([new_fresh, new_old]), 10.0).argmax(1)
    assert (guesses == age).mean() < 0.6


@pytest.mark.parametrize("artery", ARTERIES)
def test_signs_are_in_the_leads_of_the_territory(artery):
    """Q waves, raised ST and turned T, mean over subjects, stand where cardiologists look for them."""
    time_s = np.arange(600) / 500 - 0.4
    scarred, healthy = (
        np.mean([draw(np.random.default_rng(seed)).at(time_s) for seed in range(40)], axis=0)
        for draw in (lambda rng: territory_ecg(rng, artery, 0.0), lambda rng: synthetic_ecg(rng, np.zeros(17)))
    )
    change = scarred - healthy
    q, st, t = (change[:, np.abs(time_s - at).argmin()] for at in (-0.017, 0.12, 0.29))
    assert LEADS[q.argmin()] in FACING[artery]
    assert LEADS[st.argmax()] in FACING[artery]
    facing = [LEADS.index(lead) for lead in FACING[artery]]
    assert q[facing].mean() < -0.1
    assert st[facing].mean() > 0.02
    assert t[facing].mean() < -0.02


def test_what_the_ecg_of_a_case_says(territory_of):
    """Fresh right ECGs say the scar's territory, wrong ones another: the decoy's, or that of neither."""
    said = {}
    for kind, shares in ((RIGHT, (0.0, 0.0)), (WRONG, (0.0, 1.0)), (MISSING, (1.0, 0.0))):
        phantom = AmbiguousPhantom(size=TINY, missing=shares[0], wrong=shares[1], seed=2)
        cases = [ambiguous_case(phantom, number) for number in range(120)]
        assert {case.ecg for case in cases} == {kind}
        said[kind] = [case for case in cases if case.interval_days <= 10]
    assert all(case.signal is None for case in said[MISSING])
    for kind, cases in said.items():
        if kind != MISSING:
            guesses = territory_of([case.signal[:, COMPLEX].ravel() for case in cases])
            right = np.array([ARTERIES[guess] == case.artery for guess, case in zip(guesses, cases, strict=True)])
            assert right.mean() > 0.9 if kind == RIGHT else right.mean() < 0.1
    assert {case.artery for case in said[WRONG]} == set(ARTERIES)


@pytest.mark.parametrize(("missing", "wrong"), [(0.1, 0.05), (0.5, 0.25), (0.0, 0.0)])
def test_shares_and_days_are_as_asked(missing, wrong):
    phantom = AmbiguousPhantom(size=TINY, missing=missing, wrong=wrong)
    cases = [ambiguous_case(phantom, number) for number in range(120)]
    kinds = Counter(case.ecg for case in cases)
    assert (kinds[MISSING], kinds[WRONG]) == (round(120 * missing), round(120 * wrong))
    bins = [sum(low <= case.interval_days <= high for case in cases) for low, high in INTERVAL_BINS_DAYS]
    assert bins == [20] * 6
    places = [next(at for at, bin in enumerate(INTERVAL_BINS_DAYS) if case.interval_days <= bin[1]) for case in cases]
    assert places[:60] != places[60:], "the order is another one in each block"
    days = {kind: [case.interval_days for case in cases if case.ecg == kind] for kind in kinds}
    assert all(np.ptp(of) > 30 for of in days.values()), "neither missing nor wrong ones are of one age"


def test_beats_without_an_image_are_many_and_differ():
    signals = np.array([beat_without_image(0, number) for number in range(40)])
    assert signals.shape == (40, 12, 600)
    assert np.isfinite(signals).all()
    assert len({signal.tobytes() for signal in signals}) == 40
    np.testing.assert_array_equal(signals[3], beat_without_image(0, 3))


# ------------------------------------------------------------------------------------------------------- on disk


def test_the_cohort_is_whole(written):
    root, split = written
    cohort = open_cohort(root)
    assert (cohort.layout, cohort.split) == ("lge_ecg", split)
    assert verify_split(cohort, split) is split
    assert [len(part) for part in (split.train, split.val, split.test)] == [9, 2, 4]
    findings = check_folder(root)
    assert findings.errors == ()
    assert [warning for warning in findings.warnings if "no ECG" not in warning] == []
    truth = read_truth(root)
    assert list(truth) == [*split.train, *split.val, *split.test]
    for number, case in enumerate(cohort.cases):
        made, said = ambiguous_case(SMALL, number), truth[case.case_id]
        assert (said["artery"], said["other_artery"], said["ecg"]) == (made.artery, made.other_artery, made.ecg)
        assert float(said["decoy_share"]) == pytest.approx(made.decoy_share, abs=1e-3)
        _, labels = load_case(cohort, case)
        assert set(np.unique(labels.voxels)) == {0, BLOOD, MYOCARDIUM, SCAR}, "a decoy is labelled as wall"
        assert (labels.voxels == SCAR).sum() == (made.scan.labels == SCAR).sum()
        assert (case.clinical.ecg is None) == (made.ecg == MISSING)
        if made.signal is not None:
            assert case.clinical.interval_days == made.interval_days == int(said["interval_days"])
            beat = load_beat(case.clinical.ecg, rate_hz=case.clinical.ecg_rate_hz)
            np.testing.assert_array_equal(beat.signal_mv, made.signal)


def test_its_beats_can_be_trained_on(written):
    root, _ = written
    paths = find_ecgs(root / BEATS_FOLDER)
    found, left_out = load_beats([BeatSource(path.stem, path) for path in paths])
    assert (len(found), left_out) == (6, [])
    assert all(beat.usable.all() and beat.notes == () for beat in found)


def test_the_seed_decides_every_byte(tmp_path):
    contents = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        phantom = replace(SMALL, train=3, val=1, test=1, size=TINY, beats=2, missing=0.0, seed=seed)
        write_ambiguous_phantom(tmp_path / name, phantom)
        files = [path for path in sorted((tmp_path / name).rglob("*.*")) if path.suffix != ".npz"]
        assert len(files) == 2 + 3 * 5
        contents[name] = [path.read_bytes() for path in files]
        beats = sorted((tmp_path / name / BEATS_FOLDER).iterdir())
        contents[name] += [np.load(path)["signal"].tobytes() for path in beats]
    assert contents["first"] == contents["again"]
    assert not set(contents["first"]) & set(contents["other"])


def test_a_case_does_not_depend_on_how_many_there_are():
    few, many = (ambiguous_case(AmbiguousPhantom(train=train, size=TINY), 7) for train in (10, 300))
    np.testing.assert_array_equal(few.scan.image, many.scan.image)
    assert (few.artery, few.ecg, few.interval_days) == (many.artery, many.ecg, many.interval_days)


def test_a_case_is_quickly_made_and_there_are_enough():
    phantom = AmbiguousPhantom()
    assert (phantom.train, phantom.test, phantom.beats) == (220, 60, 1000)

    def seconds(number):
        start = perf_counter()
        ambiguous_case(phantom, number)
        return perf_counter() - start

    assert min(seconds(number) for number in range(3)) < 0.6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": 0}, "a case to train on.*got 0, 20, 60 and 1000"),
        ({"beats": -1}, "no negative number"),
        ({"missing": 0.8, "wrong": 0.3}, "together at most 1, got 0.8 and 0.3"),
        ({"wrong": -0.1}, "are shares"),
        ({"missing": float("nan")}, "are shares.*got nan and 0.05"),
        ({"wrong": float("nan")}, "are shares.*got 0.1 and nan"),
        ({"seed": -1}, "expected a seed of 0 or more, got -1"),
    ],
)
def test_wishes_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        AmbiguousPhantom(**values)
