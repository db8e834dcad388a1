"""The phantom abdomen: decided by its seed, no prey for windows of intensity, and anatomy where anatomy belongs."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.phantoms.abdomen_anatomy import ORGANS

SMALL = (40, 40, 8)


def best_window_dice(values, truth, bins=250):
    """DSC of the best lower and upper threshold, found with the truth known: all pairs of edges are tried."""
    edges = np.linspace(0, 1 + 1e-6, bins + 1)
    chosen, hits = (
        np.subtract.outer(below, below).T
        for below in (np.r_[0, np.histogram(part, edges)[0].cumsum()] for part in (values, values[truth]))
    )
    return np.where(chosen > 0, 2 * hits / (np.maximum(chosen, 0) + truth.sum()), 0).max()


def read_test_cases(root, split):
    for case_id in split.test:
        with h5py.File(root / "test_vol_h5" / f"{case_id}.npy.h5") as file:
            yield file["image"][:], file["label"][:]


SIZES = {"small": {"cases": 4, "size": (64, 64, 16)}, "of the demo": {}}


@pytest.fixture(scope="module", params=["small", pytest.param("of the demo", marks=pytest.mark.slow)])
def cohort(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return root, write_abdomen_phantom(root, seed=0, **SIZES[request.param])


def test_best_window_knows_a_window():
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    assert best_window_dice(values, (values > 0.15) & (values < 0.35)) == 1.0
    assert best_window_dice(values, np.array([True, False, True, False, False])) == pytest.approx(0.8)


def windows_of(cases):
    images, labels = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*cases, strict=True))
    return {organ: best_window_dice(images, labels == label) for organ, label in ORGANS.items()}


def test_no_window_of_intensities_finds_an_organ(cohort):
    assert max(windows_of(read_test_cases(*cohort)).values()) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nor_with_other_seeds(tmp_path, seed):
    split = write_abdomen_phantom(tmp_path, cases=4, seed=seed, size=(64, 64, 16))
    assert max(windows_of(read_test_cases(tmp_path, split)).values()) < 0.5


def test_every_case_shows_every_organ_in_its_place(cohort):
    """Stored as one looks at it: columns to the patient's left, rows to the back, slices to the head."""
    for image, label in read_test_cases(*cohort):
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert set(np.unique(label)) == {0, *ORGANS.values()}
        head, back, left = (
            {organ: np.argwhere(label == k).mean(0)[axis] for organ, k in ORGANS.items()} for axis in range(3)
        )
        assert left["liver"] < left["aorta"] < left["spleen"]
        assert left["right kidney"] < left["pancreas"] < left["left kidney"]
        assert left["gallbladder"] < left["aorta"] < left["stomach"]
        assert max(back["stomach"], back["gallbladder"]) < back["aorta"]
        assert back["pancreas"] < min(back["left kidney"], back["right kidney"])
        assert max(head["left kidney"], head["right kidney"]) < min(head["liver"], head["spleen"])
        assert 0.02 < (label == ORGANS["liver"]).mean() < 0.08
        assert (label == ORGANS["liver"]).sum() == max((label == k).sum() for k in ORGANS.values())


def test_layout_is_the_package_s(tmp_path):
    split = write_abdomen_phantom(tmp_path, cases=6, seed=0, size=SMALL)
    listed = (tmp_path / "lists_Synapse" / "train.txt").read_text().split()
    assert listed == [f"{case}_slice{k:03d}" for case in (*split.train, *split.val) for k in range(SMALL[2])]
    assert sorted(path.stem for path in (tmp_path / "train_npz").iterdir()) == listed
    assert (tmp_path / "lists_Synapse" / "test_vol.txt").read_text().split() == list(split.test)
    with np.load(tmp_path / "train_npz" / f"{listed[0]}.npz") as file:
        assert {name: file[name].shape for name in file} == {"image": SMALL[:2], "label": SMALL[:2]}
    assert [image.shape for image, _ in read_test_cases(tmp_path, split)] == [(8, 40, 40)] * len(split.test)
    assert len({*split.train, *split.val, *split.test}) == 6


def test_test_cases_come_from_another_scanner(tmp_path):
    """The same patient looks different, and smaller, when there are so few cases that it tests."""
    last = write_abdomen_phantom(tmp_path / "3", cases=3, seed=0, size=SMALL).test[0]
    write_abdomen_phantom(tmp_path / "8", cases=8, seed=0, size=SMALL)
    trained = [np.load(path)["image"] for path in sorted((tmp_path / "8" / "train_npz").glob(f"{last}_*"))]
    with h5py.File(tmp_path / "3" / "test_vol_h5" / f"{last}.npy.h5") as file:
        tested = file["image"][:]
    assert (tested > 0).mean() < 0.97 * (np.stack(trained) > 0).mean()


def test_seed_decides_every_byte(tmp_path):
    files = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_abdomen_phantom(tmp_path / name, cases=3, seed=seed, size=SMALL)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        files[name] = [path.read_bytes() for path in paths]
    assert files["first"] == files["again"]
    assert files["first"] != files["other"]


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    for cases in (3, 5):
        write_abdomen_phantom(tmp_path / str(cases), cases=cases, seed=1, size=SMALL)
    images = [(tmp_path / cases / "train_npz/case0001_slice004.npz").read_bytes() for cases in ("3", "5")]
    assert images[0] == images[1]


def test_too_few_cases(tmp_path):
    with pytest.raises(ValueError, match=r"at least 3 cases.*got 2"):
        write_abdomen_phantom(tmp_path, cases=2)
