"""The phantoms of a seed stay what they were when the tables in docs/ were made on them, to every number in them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.phantoms.ambiguous import AmbiguousPhantom, write_ambiguous_phantom
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.phantoms.scar import write_scar_phantom

AMBIGUOUS = AmbiguousPhantom(train=3, val=1, test=2, size=(40, 40, 6), beats=2)
WRITERS = {
    "left_atrium": lambda root: write_left_atrium_phantom(root, cases=3, size=(40, 40, 10)),
    "abdomen": lambda root: write_abdomen_phantom(root, cases=3, size=(48, 48, 16)),
    "scar": lambda root: write_scar_phantom(root, cases=4, size=(40, 40, 8), val=1, test=1),
    "ambiguous": lambda root: write_ambiguous_phantom(root, AMBIGUOUS),
}
GOLDEN = {
    "left_atrium": {
        "labels": [0.0398088785, 0.416275672, 0.00128242742],
        "affine": [78.1199493, 361.259335, 7.10349008],
        "image": [477.788644, 449.678428, 1.80722738],
    },
    "abdomen": {"image": [4.30186493, 6.65828816, 0.00277224123], "label": [15.832194, 43.6283506, 0.0256159583]},
    "scar": {
        "days": [738353.125, 460.477045, -172684.519],
        "signal": [0.139018876, 0.58813868, -0.00175477971],
        "rate": [500.0, 0.0, 70.560004],
        "image": [1038.2307, 835.017931, 2.83589652],
        "affine": [15.8472094, 232.532325, -5.9025625],
        "labels": [0.541640625, 1.97993364, -0.00361371853],
    },
    "ambiguous": {
        "signal": [0.191706091, 1.07573078, -0.000212077892],
        "rate": [1000.0, 0.0, 420.735492],
        "days": [677070.25, 204144.452, 177248.481],
        "image": [1838.25083, 1168.28461, 1.94882599],
        "affine": [12.1145166, 253.033349, -0.364990472],
        "labels": [1.851875, 4.18702135, -0.0101566019],
    },
}


def arrays_in(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in a file, by what they are; an image's affine is one of them, and so are the days in a table."""
    if path.name == "cases.csv":
        with path.open(newline="") as stream:
            cells = [line[name] for line in csv.DictReader(stream) for name in ("mri_date", "ecg_date")]
        yield "days", np.array([date.fromisoformat(cell).toordinal() if cell else 0 for cell in cells])
    elif path.name.endswith(".nii.gz"):
        image = nib.load(path)
        yield "labels" if "seg" in str(path).lower() else "image", np.asarray(image.dataobj)
        yield "affine", image.affine
    elif path.suffix == ".h5":
        with h5py.File(path) as file:
            yield from ((name, file[name][...]) for name in ("image", "label"))
    elif path.suffix == ".npz":
        yield from np.load(path).items()
    elif path.suffix == ".npy":
        yield "signal", np.load(path)


def fingerprint(root: Path) -> dict[str, list[float]]:
    """Mean, spread, and mean times a wave that is another at each place, added up over the files."""
    told: dict[str, np.ndarray] = {}
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        for name, array in arrays_in(path):
            values = np.asarray(array, np.float64).ravel()
            wave = np.sin(np.arange(values.size) ** 2 + number)
            told[name] = told.get(name, 0) + np.array([values.mean(), values.std(), (values * wave).mean()])
    return {name: numbers.tolist() for name, numbers in told.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_seed_gives_the_phantom_that_it_gave_before(name, tmp_path):
    WRITERS[name](tmp_path)
    assert fingerprint(tmp_path) == {what: pytest.approx(told, rel=1e-6) for what, told in GOLDEN[name].items()}
