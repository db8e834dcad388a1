"""NumPy's files: what their headers may say, and what they may hold."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from trifuse.architectures.storage.numpy_file import TEXT, Limit, open_npz, read_npy
from trifuse.kernels.errors import DataError

ALL = Limit(1 << 20, "in this test")


def put(path, header: bytes, values: bytes = b"", version: bytes = b"\1\0"):
    """Write an array by its header, as it is; in an archive as ``a``."""
    array = b"\x93NUMPY" + version + len(header).to_bytes(2 if version == b"\1\0" else 4, "little") + header + values
    if path.suffix == ".npy":
        path.write_bytes(array)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", array)
    return path


def read(path, limit=ALL, **options):
    if path.suffix == ".npy":
        return read_npy(path, limit, **options)
    with open_npz(path) as archive:
        return archive.read("a", limit, **options)


def refused(path, *words, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i8", "<f2", "f4", ">f8", "<U5", ">U3", "S4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_come_as_numpy_reads_them(tmp_path, dtype, order, suffix):
    values = np.asarray(np.arange(12).reshape(3, 4), order=order).astype(dtype)
    path = tmp_path / f"a{suffix}"
    np.save(path, values) if suffix == ".npy" else np.savez_compressed(path, a=values)
    found = read(path, kinds="buif" + TEXT)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': 2}",
        b"{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        b"{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (2,)}",
        b"{'descr': '(2,)f4', 'fortran_order': False, 'shape': (2,)}",
        b"{'descr': 'S0', 'fortran_order': False, 'shape': (2,)}",
        b"{'descr': 'x', 'fortran_order': False, 'shape': (2,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % (b"9" * 5000),
        b"{'descr': '<f4', 'fortran_order': False}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n)",
        b"(" * 3000,
        b"__import__('os').system('false')",
        b"\xff\xfe",
        b" " * 10_001,
        b"",
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_d32_headers_that_cannot_be(tmp_path, header, suffix):
    refused(put(tmp_path / f"a{suffix}", header, bytes(8)), "expected an intact array")


@pytest.mark.parametrize("values", [bytes(7), bytes(9)])
def test_d3_more_or_fewer_values_than_the_header_says(tmp_path, values):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
    refused(put(tmp_path / "a.npz", header, values), "where its header says 8")


def test_d32_text_that_is_none(tmp_path):
    """Python itself fails at code points beyond the last, with an error of no kind that a program expects."""
    for point in (0x110000, 0xD800):
        header, values = b"{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", point.to_bytes(4, "little")
        refused(put(tmp_path / "a.npz", header, values), "no character", kinds=TEXT)


def test_truths_are_true_or_false(tmp_path):
    header = b"{'descr': '|b1', 'fortran_order': False, 'shape': (3,)}"
    assert read(put(tmp_path / "a.npy", header, b"\0\1\7")).sum() == 2


def test_d9_a_small_archive_of_much(tmp_path):
    """Three quarters of a megabyte could be 720 MB of zeros: refused by the header, before any is unpacked."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (90000000,)}"
    path = put(tmp_path / "a.npz", header)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.npy", bytes(750_000))
    refused(path, "720000000 bytes", "as its file is that small", limit=Limit.of_file(path))


def test_packings_that_numpy_does_not_use(tmp_path):
    packed = io.BytesIO()
    np.save(packed, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", packed.getvalue())
    refused(tmp_path / "a.npz", "packed by method 14")
