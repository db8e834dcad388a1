"""The phantom of scar: decided by its seed, no prey for thresholds, its ECGs tell scar from what looks like it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trifuse.architectures.data.ecg.median_beat import load_beat
from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.cohort import Split
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.split import verify_split
from trifuse.architectures.data.phantoms.ecg import synthetic_ecg
from trifuse.architectures.data.phantoms.heart_anatomy import Bright, Heart, segment_of
from trifuse.architectures.data.phantoms.scar import INTERVAL_BINS_DAYS, write_scar_phantom
from trifuse.architectures.taff_unet.aha17 import aha17_labels

TINY = (32, 32, 6)
CASES = 24
TERRITORY_OF = np.array([0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0, 0, 1, 2, 0])  # of segments 0 (none) to 17


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    split = write_scar_phantom(root, cases=CASES, seed=0, size=(64, 64, 8))
    cohort = open_cohort(root)
    return cohort, split, {case.case_id: load_case(cohort, case) for case in cohort.cases}


def segments_of(case, image, labels, reference):
    marks = {
        f"rv_{name}": image.geometry.display_point(point)
        for name, point in (("anterior", case.clinical.rv_anterior), ("inferior", case.clinical.rv_inferior))
    }
    return aha17_labels(labels.voxels, image.geometry.display_affine, reference=reference, **marks)


def scarred_territory(case, image, labels):
    segments = segments_of(case, image, labels, "landmarks")
    return np.bincount(TERRITORY_OF[segments[labels.voxels == 3]], minlength=3).argmax()


def best_dice(voxels, truth):
    """DSC of the best threshold, found with the truth known."""
    order = np.argsort(voxels, axis=None)[::-1]
    hits = np.cumsum(truth.ravel()[order])
    return (2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())).max()


def test_the_cohort_is_whole(phantom):
    cohort, split, cases = phantom
    assert (cohort.layout, cohort.split) == ("lge_ecg", split)
    assert verify_split(cohort, split) is split
    assert [len(part) for part in (split.train, split.val, split.test)] == [17, 2, 5]
    for case_id, (image, labels) in cases.items():
        assert image.notes == labels.notes == ()
        assert image.voxels.shape == (8, 64, 64), "slices are shown as such, whatever the file's order"
        assert image.spacing_mm[0] == pytest.approx(8)
        wall = (labels.voxels >= 2).sum()
        assert 0.03 < (labels.voxels == 3).sum() / wall < 0.45, case_id
        assert (labels.voxels == 1).sum() > 300, case_id
    findings = check_folder(cohort.root)
    assert findings.errors == ()
    assert [warning for warning in findings.warnings if "no ECG" not in warning] == []


def test_patients_differ(phantom):
    _, _, cases = phantom
    assert len({image.spacing_mm for image, _ in cases.values()}) == CASES
    assert len({(image.geometry.axes, image.geometry.flips) for image, _ in cases.values()}) == 3


def test_intervals_fill_their_bins_and_ecgs_come_in_all_forms(phantom):
    cohort, _, _ = phantom
    clinical = [case.clinical for case in cohort.cases]
    days = [each.interval_days for each in clinical if each.ecg is not None]
    found = Counter(next(i for i, (low, high) in enumerate(INTERVAL_BINS_DAYS) if low <= day <= high) for day in days)
    assert min(found[index] for index in range(6)) >= 3
    assert Counter(each.ecg is None for each in clinical) == {False: 23, True: 1}
    with_ecg = [each for each in clinical if each.ecg is not None]
    assert {(each.ecg.suffix, each.ecg_rate_hz) for each in with_ecg} == {(".npy", 500.0), (".npz", None)}
    beats = [load_beat(each.ecg, rate_hz=each.ecg_rate_hz) for each in with_ecg]
    assert all(beat.usable.all() for beat in beats)
    assert min(Counter(beat.beats > 1 for beat in beats).values()) >= 7
    lines = [line.split(",") for line in (cohort.root / "cases.csv").read_text().splitlines()[1:]]
    first = {line[7] < line[6] for line in lines if line[7]}
    assert first == {True, False}, "some ECGs come before their MRI, some after it"


def test_thresholds_fail(phantom):
    """No threshold finds scar, not even in a wall that is known, where scar cannot be told from artefacts."""
    _, _, cases = phantom
    inside, anywhere = [], []
    for case_id, (image, labels) in cases.items():
        truth, wall = labels.voxels == 3, labels.voxels >= 2
        anywhere.append(best_dice(image.voxels, truth))
        assert anywhere[-1] < 0.66, case_id
        inside.append(best_dice(image.voxels[wall], truth[wall]))
    assert np.mean(anywhere) < 0.4
    assert 0.55 < np.mean(inside) < 0.9


def test_the_septum_lies_where_the_landmarks_and_the_patient_say(phantom):
    """Segments from the landmarks, and from the image's orientation, agree on most of the wall."""
    cohort, _, cases = phantom
    agreement = []
    for case in cohort.cases:
        image, labels = cases[case.case_id]
        marks, patient = (segments_of(case, image, labels, reference) for reference in ("landmarks", "orientation"))
        agreement.append((marks == patient)[labels.voxels >= 2].mean())
        assert image.geometry.display_point(case.clinical.rv_anterior)[0] < 64
    assert np.mean(agreement) > 0.8
    assert min(agreement) > 0.6


def test_landmarks_are_on_the_outer_face_a_septum_apart(phantom):
    cohort, _, cases = phantom
    for case in cohort.cases:
        image, labels = cases[case.case_id]
        middle = labels.voxels[2] > 0
        centre = np.argwhere(middle).mean(0)
        offsets = [
            np.array(image.geometry.display_point(point)) - centre
            for point in (case.clinical.rv_anterior, case.clinical.rv_inferior)
        ]
        radius = np.sqrt(middle.sum() / np.pi)
        for offset in offsets:
            assert np.linalg.norm(offset) == pytest.approx(radius, rel=0.25)
        angle = np.degrees(np.arccos(np.dot(*offsets) / np.prod(np.linalg.norm(offsets, axis=1))))
        assert angle == pytest.approx(120, abs=25)


def test_fresh_ecgs_know_the_territory_of_the_scar_and_old_ones_do_not(tmp_path):
    """The nearest of the territories' typical beats is the scarred one's, of most files that are young."""
    write_scar_phantom(tmp_path, cases=48, seed=2, size=TINY)
    cohort = open_cohort(tmp_path)
    typical = []
    for territory in range(3):
        scar = 0.5 * (TERRITORY_OF[1:] == territory)
        rngs = map(np.random.default_rng, range(20))
        typical.append(np.mean([normed(synthetic_ecg(rng, scar).median_beat(rng)) for rng in rngs], axis=0))
    right = {True: [], False: []}
    for case in cohort.cases:
        clinical = case.clinical
        if clinical.ecg is None or 20 < clinical.interval_days < 60:
            continue
        beat = normed(load_beat(clinical.ecg, rate_hz=clinical.ecg_rate_hz).signal_mv)
        guess = np.argmin([np.linalg.norm(beat - middle) for middle in typical])
        right[clinical.interval_days <= 20].append(guess == scarred_territory(case, *load_case(cohort, case)))
    assert len(right[True]) > 20
    assert np.mean(right[True]) > 0.7
    assert np.mean(right[False]) < np.mean(right[True]) - 0.15


def normed(beat):
    return (beat / np.abs(beat).max())[:, 150:380]


def test_an_artefact_is_as_bright_as_scar_and_no_scar():
    axes = (np.arange(-40, 40, 2.0), np.arange(-40, 40, 2.0), np.arange(2, 60, 8.0))
    position = np.stack(np.meshgrid(*axes, indexing="ij"))
    bright = Bright(degrees=120, level=0.4, half_degrees=50, half_level=0.5, transmurality=0.8, value=0.9)
    heart, artefact, scarred = (Heart(np.random.default_rng(3), position, 0.7) for _ in range(3))
    artefact.brighten(bright, is_scar=False)
    scarred.brighten(bright, is_scar=True)
    np.testing.assert_array_equal(artefact.picture, scarred.picture)
    np.testing.assert_array_equal(artefact.labels, heart.labels)
    assert not artefact.scar_shares().any()
    changed = scarred.labels != heart.labels
    assert set(heart.labels[changed]) == {2}
    assert set(scarred.labels[changed]) == {3}
    assert heart.picture[changed].mean() < 0.4 < 0.6 < scarred.picture[changed].mean()
    shares = scarred.scar_shares()
    assert set(np.flatnonzero(shares > 0.02) + 1) <= {3, 4, 5, 2, 8, 9, 10, 11, 14, 15, 16}
    assert shares[[2, 3]].min() > 0.1
    assert TERRITORY_OF[shares.argmax() + 1] == 1


def test_many_walls_have_an_artefact_in_another_territory(phantom):
    cohort, _, cases = phantom
    found = []
    for case in cohort.cases:
        image, labels = cases[case.case_id]
        segments = segments_of(case, image, labels, "landmarks")
        elsewhere = (segments > 0) & (TERRITORY_OF[segments] != scarred_territory(case, image, labels))
        healthy = elsewhere & (labels.voxels == 2)
        level = np.median(image.voxels[labels.voxels == 3])
        found.append((image.voxels[healthy] > level).mean() > 0.06)
    assert 0.3 < np.mean(found) < 0.85


def test_segments_of_positions():
    degrees = np.array([0, 59, 60, 330, 300, 299, 15, 14, 104, 105, 0])
    level = np.array([0, 0, 0.2, 0.3, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 1.2])
    assert segment_of(degrees, level).tolist() == [2, 2, 3, 1, 7, 12, 14, 13, 14, 15, 17]


def test_the_seed_decides_every_byte(tmp_path):
    folders = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_scar_phantom(tmp_path / name, cases=4, seed=seed, size=TINY)
        files = sorted(path for path in (tmp_path / name).rglob("*.*") if path.suffix != ".npz")
        assert len(files) == 1 + 4 + 4 + 3, "a table, images, labels, and ECGs"
        folders[name] = [path.read_bytes() for path in files]
        folders[name].append(np.load(tmp_path / name / "ecg/case003.npz")["signal"].tobytes())
    assert folders["first"] == folders["again"]
    assert not set(folders["first"]) & set(folders["other"])


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    for cases in (3, 5):
        write_scar_phantom(tmp_path / str(cases), cases=cases, seed=1, size=TINY)
    for file in ("lge/case001.nii.gz", "seg/case001.nii.gz", "ecg/case001.npy"):
        assert (tmp_path / "3" / file).read_bytes() == (tmp_path / "5" / file).read_bytes()


def test_parts_of_chosen_size(tmp_path):
    split = write_scar_phantom(tmp_path, cases=7, seed=1, size=TINY, val=0, test=4)
    assert split == Split(("case001", "case002", "case003"), (), ("case004", "case005", "case006", "case007"))
    assert open_cohort(tmp_path).split == split


@pytest.mark.parametrize(("cases", "parts"), [(2, {}), (5, {"val": 2, "test": 3}), (5, {"val": -1})])
def test_no_case_to_train_on(tmp_path, cases, parts):
    with pytest.raises(ValueError, match=f"more cases than.*got {cases}"):
        write_scar_phantom(tmp_path, cases=cases, **parts)
