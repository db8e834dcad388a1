"""Arrays in NumPy and HDF5 files: every fault named by file and array, and nothing in them executed."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import zipfile
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.volumes import arrays as arrays_module
from trifuse.architectures.data.volumes.arrays import read_array_image, read_array_labels
from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.data.volumes.nifti import read_labels, write_labels
from trifuse.kernels import DataError, MissingExtra

IMAGE = np.random.default_rng(0).random((3, 5, 4), dtype=np.float32)
LABEL = np.random.default_rng(1).integers(0, 9, (3, 5, 4)).astype(np.float32)


def save(path, **arrays):
    """Write arrays by the ending of the name."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def read(path):
    arrays = Arrays((path,))
    image = read_array_image(arrays)
    return image, read_array_labels(arrays, like=image)


def refused(path, *words):
    with pytest.raises(DataError) as caught:
        read(path)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


@pytest.fixture(params=["volume.npz", "volume.npy.h5"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_volumes_come_as_they_are(path):
    image, labels = read(save(path, image=IMAGE, label=LABEL))
    np.testing.assert_array_equal(image.voxels, IMAGE)
    np.testing.assert_array_equal(labels.voxels, LABEL)
    assert (image.voxels.dtype, labels.voxels.dtype) == (np.float32, np.uint8)
    assert (image.spacing_mm, image.notes) == ((1, 1, 1), ())


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 5, 4), (3, 1, 4), (3, 5, 1), (1, 1, 4)])
def test_predictions_on_them_are_read_back_as_they_were(tmp_path, shape):
    """A volume without a grid of its own still gets one to be written on, whatever its shape."""
    labels = np.random.default_rng(2).integers(0, 9, shape).astype(np.uint8)
    image = read_array_image(Arrays((save(tmp_path / "case.npz", image=labels * 2.0),)))
    write_labels(tmp_path / "case.nii.gz", labels, like=image)
    np.testing.assert_array_equal(read_labels(tmp_path / "case.nii.gz", like=image).voxels, labels)


def test_slices_are_stacked_in_the_order_of_their_files(tmp_path):
    files = [save(tmp_path / f"{n}.npz", image=IMAGE[n], label=LABEL[n]) for n in range(3)]
    arrays = Arrays((files[2], files[0]), sliced=True)
    image = read_array_image(arrays)
    np.testing.assert_array_equal(image.voxels, IMAGE[[2, 0]])
    np.testing.assert_array_equal(read_array_labels(arrays, like=image).voxels, LABEL[[2, 0]])


def test_slices_of_different_sizes(tmp_path):
    files = tuple(save(tmp_path / f"{n}.npz", image=IMAGE[0, :, :n]) for n in (4, 3))
    with pytest.raises(DataError, match=r"3\.npz: image: expected \(5, 4\), as in 4\.npz, got shape \(5, 3\)"):
        read_array_image(Arrays(files, sliced=True))


@pytest.mark.parametrize("name", ["image", "label"])
def test_d32_missing_array(path, name):
    arrays = {"image": IMAGE, "label": LABEL}
    del arrays[name]
    refused(save(path, **arrays, seg=LABEL), f"{name}: expected an array named '{name}'", "seg")


@pytest.mark.parametrize("name", ["image", "label"])
@pytest.mark.parametrize("shape", [(5, 4), (1, 3, 5, 4), (3, 0, 4)])
def test_d32_wrong_dimensions(path, name, shape):
    arrays = {"image": IMAGE, "label": LABEL} | {name: np.zeros(shape)}
    refused(save(path, **arrays), f"{name}: expected (slices, rows, columns)", f"shape {shape}")


def test_d15_shapes_that_differ(path):
    refused(save(path, image=IMAGE, label=LABEL[:2]), "label: expected (3, 5, 4), as the image, got shape (2, 5, 4)")


def test_d22_nan(path):
    spoilt = IMAGE.copy()
    spoilt[1, 2, 3] = np.nan
    refused(save(path, image=spoilt, label=LABEL), "1 NaN or infinite", "(1, 2, 3)")
    assert read_array_image(Arrays((path,)), nonfinite="zero").voxels[1, 2, 3] == 0


def test_d18_labels_between_integers(path):
    refused(save(path, image=IMAGE, label=LABEL + 0.4), "labels: expected integers")


def test_d23_constant_image_is_noted(path):
    (note,) = read(save(path, image=np.full((3, 5, 4), 7.0), label=LABEL))[0].notes
    assert "same value, 7" in note.text


class Bomb:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize("name", ["image", "label"])
def test_d32_pickles_are_never_loaded(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arrays = {"image": IMAGE, "label": LABEL} | {name: np.array([Bomb()], dtype=object)}
    refused(save(tmp_path / "a.npz", **arrays), name, "object", "pickles")
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Bomb())).close()
    assert (tmp_path / "canary").exists(), "the bomb is a dud: this test shows nothing"


def test_d32_strings_in_h5(tmp_path):
    refused(save(tmp_path / "a.h5", image=["a", "b"], label=LABEL), "image", "values of type object")


@pytest.mark.parametrize("link", [h5py.SoftLink("/elsewhere"), h5py.ExternalLink("other.h5", "/image")])
def test_d30_links_in_h5(tmp_path, link):
    save(tmp_path / "other.h5", image=IMAGE)
    with h5py.File(save(tmp_path / "a.h5", label=LABEL), "a") as file:
        file["image"] = link
    refused(tmp_path / "a.h5", "image: expected an array in the file itself", "a link")


def test_d30_numbers_elsewhere(tmp_path):
    save(tmp_path / "other.h5", image=IMAGE)
    (tmp_path / "raw").write_bytes(IMAGE.tobytes())
    virtual = h5py.VirtualLayout(IMAGE.shape, "f4")
    virtual[:] = h5py.VirtualSource(tmp_path / "other.h5", "image", IMAGE.shape)
    for number in range(3):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            if number == 0:
                file.create_virtual_dataset("image", virtual)
            elif number == 1:
                file.create_dataset("image", IMAGE.shape, "f4", external=[(tmp_path / "raw", 0, IMAGE.nbytes)])
            else:
                file.create_group("image")
        refused(tmp_path / f"{number}.h5", "image: expected an array in the file itself")


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["volume.npz", "volume.h5"]))
def test_d3_truncated_anywhere(tmp_path_factory, share, name):
    path = save(tmp_path_factory.mktemp("cut") / name, image=IMAGE, label=LABEL)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_d4_flipped_byte_in_npz(tmp_path_factory, share, flip):
    """A changed voxel never passes for a good one; only bytes that mean nothing may change unnoticed."""
    path = save(tmp_path_factory.mktemp("flip") / "volume.npz", image=IMAGE, label=LABEL)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= flip
    path.write_bytes(content)
    try:
        image, labels = read(path)
    except DataError:
        refused(path)
    else:
        np.testing.assert_array_equal(image.voxels, IMAGE)
        np.testing.assert_array_equal(labels.voxels, LABEL)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "an empty file"), (b"<html>", "an HTML page"), (b"version https://git-lfs", "git-lfs"), (b"abc", "text")],
)
def test_d7_something_else(path, content, kind):
    path.write_bytes(content)
    refused(path, "content", kind)


def test_d1_missing_and_folder(path):
    refused(path, "No such file")
    path.mkdir()
    refused(path, "Is a directory")


def test_d8_arrays_that_promise_more_than_the_file(path):
    """Refused before memory is asked for: these would be 8 TB."""
    shape = (10_000, 10_000, 10_000)
    if path.suffix == ".npz":
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("image", shape, "f8", chunks=(100, 100, 100))
    refused(path, "image", "as its file is that small")


def test_l6_h5_without_h5py(tmp_path, monkeypatch):
    save(tmp_path / "a.h5", image=IMAGE)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"reading a\.h5 needs h5py.*trifuse\[h5\]"):
        read(tmp_path / "a.h5")


def test_too_little_memory_is_a_data_error(path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    save(path, image=IMAGE)
    monkeypatch.setattr(np, "asarray" if path.suffix == ".h5" else "frombuffer", full)
    refused(path, "image: expected a smaller")


def test_d32_h5_without_values(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = h5py.Empty("f4")
    refused(tmp_path / "a.h5", "image: expected numbers, got no values at all")


def test_d9_pieces_that_inflate(tmp_path):
    """HDF5 would inflate a piece of sixty numbers to 50 MB before it counts them."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        image = file.create_dataset("image", (3, 5, 4), "f4", chunks=(3, 5, 4), compression="gzip")
        image.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(50_000_000)))
    refused(tmp_path / "a.h5", "inflates to more than its size", "244 bytes at most")


def test_packed_h5_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=IMAGE, compression="gzip", shuffle=True, fletcher32=True, chunks=(1, 5, 4))
        file.create_dataset("label", data=LABEL, compression="gzip", chunks=(2, 5, 4))
    np.testing.assert_array_equal(read(tmp_path / "a.h5")[0].voxels, IMAGE)


def test_d8_labels_of_more_than_the_image(path):
    refused(save(path, image=IMAGE, label=np.zeros((300, 50, 40))), "label", "as its image has no more voxels")


def test_d32_damage_that_crashes_the_library(tmp_path, monkeypatch):
    """HDF5 ends with a segmentation fault on some damaged files; not in this process."""
    save(tmp_path / "a.h5", image=IMAGE)
    monkeypatch.setattr(arrays_module, "_from_h5", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused(tmp_path / "a.h5", "image: expected an intact HDF5 file", "ends its reader with SIGKILL")
