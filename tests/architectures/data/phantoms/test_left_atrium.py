"""The phantom: decided by its seed, no prey for thresholds, and usable from end to end."""

from __future__ import annotations

import numpy as np
import pytest

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.read_case import load_case
from trifuse.architectures.data.layouts.split import verify_split
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.data.samples.slice_dataset import SliceDataset
from trifuse.architectures.data.volumes.nifti import read_labels

SMALL = (48, 48, 10)


def dice(prediction, truth):
    return 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())


def otsu_threshold(voxels):
    """Otsu's threshold, written as its definition: the split with the largest variance between the classes."""
    edges = np.linspace(voxels.min(), voxels.max(), 129)[1:-1]

    def between(threshold):
        above = voxels > threshold
        share = above.mean()
        return share * (1 - share) * (voxels[above].mean() - voxels[~above].mean()) ** 2

    return max(edges, key=between)


@pytest.fixture(
    scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))], ids="seed{}".format
)
def phantom(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    split = write_left_atrium_phantom(root, cases=6, seed=request.param)
    return open_cohort(root), split


def test_thresholds_fail(phantom):
    """Neither Otsu nor the best global threshold, found with the truth known, reaches DSC 0.6 on any case."""
    cohort, _ = phantom
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        truth = labels.voxels > 0
        thresholds = np.linspace(image.voxels.min(), image.voxels.max(), 100)[:-1]
        assert max(dice(image.voxels > threshold, truth) for threshold in thresholds) < 0.6, case.case_id
        assert dice(image.voxels > otsu_threshold(image.voxels), truth) < 0.6, case.case_id


def test_cohort_is_whole(phantom):
    cohort, split = phantom
    assert cohort.layout == "lascarqs"
    assert verify_split(cohort, split) is split
    for case in cohort.cases:
        image, labels = load_case(cohort, case)
        assert image.notes == labels.notes == ()
        assert 0.005 < labels.voxels.mean() < 0.05
        scar = read_labels(case.image.with_name("scarSegImgM.nii.gz"), like=image)
        assert scar.voxels.any()
        assert not (scar.voxels.astype(bool) & labels.voxels.astype(bool)).any()


def test_test_cases_come_from_another_scanner(phantom):
    cohort, split = phantom
    spacings = {
        case_id: load_case(cohort, cohort.case(case_id))[0].spacing_mm for case_id in (*split.train, *split.test)
    }
    train, test = ({np.round(spacings[case_id], 3).tobytes() for case_id in ids} for ids in (split.train, split.test))
    assert len(train) == len(test) == 1
    assert train.isdisjoint(test)


def test_seed_decides_every_byte(tmp_path):
    folders = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_left_atrium_phantom(tmp_path / name, cases=3, seed=seed, size=SMALL)
        folders[name] = [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.nii.gz"))]
    assert folders["first"] == folders["again"]
    assert folders["first"] != folders["other"]


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    for cases in (3, 5):
        write_left_atrium_phantom(tmp_path / str(cases), cases=cases, seed=1, size=SMALL)
    images = [(tmp_path / cases / "train_data/train_1/enhanced.nii.gz").read_bytes() for cases in ("3", "5")]
    assert images[0] == images[1]


def test_too_few_cases(tmp_path):
    with pytest.raises(ValueError, match=r"at least 3 cases.*got 2"):
        write_left_atrium_phantom(tmp_path, cases=2)


def test_from_phantom_to_sample(tmp_path):
    split = write_left_atrium_phantom(tmp_path, cases=3, size=SMALL)
    samples = SliceDataset(open_cohort(tmp_path), split.train, Preprocessing(image_size=56))
    assert samples[4]["image"].shape == (3, 56, 56)
    assert samples[4]["target"].shape == (56, 56)
