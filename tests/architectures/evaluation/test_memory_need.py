"""What is said before of the memory that predictions take: never less than they take, and not far more."""

from __future__ import annotations

import ctypes
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from children import Child
from tiny_networks import NETWORKS
from torch import nn

from trifuse.architectures.data.layouts.open_cohort import open_images
from trifuse.architectures.data.layouts.read_case import image_size
from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.evaluation import memory_need
from trifuse.architectures.evaluation.memory_need import LIBRARIES_BYTES, NetworkNeed, batch_sizes_within
from trifuse.architectures.evaluation.predict import predict_cases
from trifuse.kernels import DataError, TrifuseError
from trifuse.kernels.testing.measuring import peak_memory_bytes

SHAPE = (320, 256, 24)


class Widening(nn.Module):
    """Logits of 9 classes, by way of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 9, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def write_image(folder: Path, name: str = "a", shape: tuple[int, ...] = SHAPE, slope: float = 1.0) -> None:
    folder.mkdir(exist_ok=True)
    ramp = np.arange(np.prod(shape), dtype=np.int64) % 251
    image = nib.Nifti1Image(ramp.reshape(shape).astype(np.int16), np.diag([1.0, 1.0, 1.5, 1.0]))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, folder / f"{name}.nii")


def status(field: str) -> int:
    """Return a line of this process' own status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024


PATCHES = Patches(spacing_mm=(1.25, 1.0), step=1.0)
SETTINGS = {
    "slices": (Preprocessing(channels=1, image_size=128), 1.0, 16),
    "deviations": (Preprocessing(channels=1, image_size=320, intensity="zscore", percentiles=(1, 99)), 0.5, 4),
    "windows": (Preprocessing(channels=1, image_size=128, intensity="zscore", patches=PATCHES), 1.0, 8),
}
SMALL = Preprocessing(channels=1, image_size=64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process' peak memory")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_need_that_is_told_holds_and_is_not_far_more(name, tmp_path):
    preprocessing, slope, batch_size = SETTINGS[name]
    for case in "ab":  # nothing of the first is held any more when the second is read
        write_image(tmp_path / "images", case, slope=slope)
    cohort = open_images(tmp_path / "images")
    found = tmp_path / "found"

    def measure() -> None:
        model = Widening()
        need = NetworkNeed(model, preprocessing, {}).bytes_for(image_size(cohort.cases[0]), batch_size)
        ctypes.CDLL(None).malloc_trim(0)  # what tests before have freed is not there to be taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = status("VmRSS")
        predict_cases(model, cohort, ["a", "b"], tmp_path / "out", preprocessing, batch_size=batch_size)
        found.write_text(f"{need} {status('VmHWM') - before}")

    assert Child(measure).wait(280) == 0
    need, taken = map(int, found.read_text().split())
    assert taken <= need + LIBRARIES_BYTES
    assert need <= 2 * taken


def granted(cohort, max_ram: int | None, **options: object) -> dict[str, int]:
    return batch_sizes_within(max_ram, Widening(), cohort.cases, SMALL, 8, **options)


@pytest.fixture
def cohort(tmp_path, monkeypatch):
    """Two images of 64 and of 8 slices, in a process that holds nothing yet."""
    for name, depth in (("large", 64), ("small", 8)):
        write_image(tmp_path / "images", name, (64, 64, depth))
    monkeypatch.setattr(memory_need, "held_bytes", lambda: 0)
    return open_images(tmp_path / "images")


def test_what_is_granted_decides_how_many_slices_are_predicted_at_once(cohort, capsys):
    need = {
        (case.case_id, batch): NetworkNeed(Widening(), SMALL, {}).bytes_for(image_size(case), batch)
        for case in cohort.cases
        for batch in (1, 4, 8)
    }
    assert need["small", 1] < need["small", 4] < need["large", 4] < need["large", 8]
    assert granted(cohort, None) == granted(cohort, need["large", 8]) == {"large": 8, "small": 8}
    assert capsys.readouterr().err == ""
    assert granted(cohort, need["small", 8])["small"] == 8
    assert granted(cohort, need["large", 4])["large"] == 4
    assert "smaller batches, for the memory granted: large (4)" in capsys.readouterr().err


def test_a_case_that_does_not_fit_is_refused_before_any_is_predicted(cohort):
    large, _ = cohort.cases
    least = NetworkNeed(Widening(), SMALL, {}).bytes_for(image_size(large), 1)
    assert granted(cohort, least).keys() == {"large", "small"}
    with pytest.raises(
        DataError, match=r"large\.nii: memory .* at most 0\.0\d GiB .*, got 0\.0\d GiB for 64 x 64 x 64"
    ):
        granted(cohort, least - 1)
    with pytest.raises(DataError, match="2 problems in the data"):
        granted(cohort, 1)


def test_priors_of_all_cases_count(cohort):
    least = NetworkNeed(Widening(), SMALL, {}).bytes_for(image_size(cohort.cases[0]), 1)

    class WithPrior(Widening):
        def forward(self, image, prior):
            return super().forward(image)

    with pytest.raises(DataError, match=r"large\.nii"):
        batch_sizes_within(least + 64 * 64 * 64, WithPrior(), cohort.cases, SMALL, 8, {"prior": (17, 64, 64)})


def test_a_damaged_header_is_left_to_the_reader(cohort, tmp_path):
    (tmp_path / "images" / "large.nii").write_bytes(b"nothing")
    assert granted(cohort, 1 << 30) == {"large": 8, "small": 8}


def test_a_network_that_looks_at_values_is_refused_in_words():
    class Looking(nn.Module):
        def forward(self, image):
            return image if image.sum().item() > 0 else -image

    with pytest.raises(TrifuseError, match=r"memory of Looking cannot be told .* leave out max_ram"):
        NetworkNeed(Looking(), SMALL, {}).run(2, 64)


@pytest.mark.parametrize("name", ["dino_unet", "fias", "plain_unet", "taff_unet full"])
def test_the_tensors_of_every_network_are_counted(name):
    """Without values as with them: what PyTorch allocates is followed exactly by its profiler."""
    network = NETWORKS[name]
    model, batch = network.make().eval(), network.batch(2)
    image = batch["image"]
    inputs = {key: batch[key].float() for key in ("prior", "ecg", "interval") if key in batch}
    channels, side = image.shape[1], image.shape[-1]
    patches = Patches(spacing_mm=(1.0, 1.0)) if inputs else None
    need = NetworkNeed(
        model,
        Preprocessing(channels=channels, image_size=side, patches=patches),
        {key: value.shape[1:] for key, value in inputs.items()},
    )
    compute = model if patches else getattr(model, "head_maps", model)
    with torch.inference_mode():
        taken = peak_memory_bytes(lambda: compute(image.clone(), **{k: v.clone() for k, v in inputs.items()}))
    assert taken <= need.run(2, side).at_once <= 4 * taken
