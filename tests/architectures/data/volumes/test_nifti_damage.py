"""Files that are missing, damaged, or no NIfTI files: each fault has its test here."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nifti_files import SHAPE, outcome, refused, save

from trifuse.architectures.data.volumes import gzip_stream, nifti
from trifuse.architectures.data.volumes.nifti import read_image


@pytest.fixture(scope="module")
def noisy_bytes(tmp_path_factory):
    """The bytes of a file with content that hardly compresses, so that most bytes are voxels."""
    voxels = np.random.default_rng(0).integers(0, 30000, (9, 8, 5), dtype=np.int16)
    path = save(tmp_path_factory.mktemp("noisy") / "noisy.nii.gz", voxels)
    return path.read_bytes(), read_image(path).voxels


def test_d1_missing_and_folder(tmp_path):
    refused(tmp_path / "absent.nii.gz", "No such file")
    (tmp_path / "folder.nii.gz").mkdir()
    refused(tmp_path / "folder.nii.gz", "Is a directory")


def test_d2_empty(tmp_path):
    path = tmp_path / "empty.nii.gz"
    path.write_bytes(b"")
    refused(path, "an empty file")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=1 - 1e-9)  # all voxels are there, but not all of the checksum
def test_d3_truncated_anywhere(noisy_bytes, share):
    content, _ = noisy_bytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.nii.gz"
        path.write_bytes(content[: int(share * len(content))])
        refused(path)


@settings(max_examples=80, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_d4_flipped_byte(noisy_bytes, share, flip):
    """A flipped byte is refused, or it changed no voxel: the date in the header, or the last padding bits."""
    content, voxels = noisy_bytes
    position = int(share * len(content))
    broken = bytearray(content)
    broken[position] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flipped.nii.gz"
        path.write_bytes(bytes(broken))
        if 10 <= position < len(content) - 9 or outcome(path) is not None:
            refused(path)
        else:
            np.testing.assert_array_equal(read_image(path).voxels, voxels)


def test_d5_wrong_checksum(good):
    content = bytearray(good.read_bytes())
    content[-6] ^= 1
    good.write_bytes(bytes(content))
    refused(good, "gzip stream", "incorrect data check", "fetch it again")


def test_d5_trailing_garbage_and_padding(good):
    content, voxels = good.read_bytes(), read_image(good).voxels
    good.write_bytes(content + b"\0" * 1000)
    np.testing.assert_array_equal(read_image(good).voxels, voxels)
    good.write_bytes(content + b"garbage")
    refused(good, "gzip stream")


def test_d5_two_members_are_one_stream(good):
    voxels, content = read_image(good).voxels, gzip.decompress(good.read_bytes())
    for cut in (100, 348, 400):
        good.write_bytes(gzip.compress(content[:cut]) + gzip.compress(content[cut:]))
        np.testing.assert_array_equal(read_image(good).voxels, voxels)
    second = bytearray(gzip.compress(content[400:]))
    second[-6] ^= 1
    good.write_bytes(gzip.compress(content[:400]) + second)
    refused(good, "incorrect data check")


def test_gzip_stream_longer_than_a_chunk(tmp_path, monkeypatch):
    """Input and output are cut at every possible place against the chunks in which they are read."""
    content = save(tmp_path / "plain.nii", np.zeros((20, 10, 10), np.int16)).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))
    for chunk in (1, 2, 3, 7, 64, 352, 700, 4352):
        monkeypatch.setattr(gzip_stream, "_CHUNK_BYTES", chunk)
        assert gzip_stream.gunzip(tmp_path / "a.nii.gz", 348, lambda header: len(content)) == content


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>please log in", "HTML page"),
        (b"Dear colleague, the data is on the way.", "a text file"),
        (b"PK\x03\x04" + bytes(400), "a zip file"),
        (bytes(128) + b"DICM" + bytes(400), "a DICOM file (dcm2niix makes NIfTI files of its series)"),
    ],
)
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
def test_d7_named_for_what_it_is(tmp_path, content, kind, name):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, kind)


def test_d7_wrong_suffix(tmp_path):
    plain, zipped = save(tmp_path / "a.nii"), save(tmp_path / "b.nii.gz")
    plain.rename(tmp_path / "c.nii.gz")
    zipped.rename(tmp_path / "d.nii")
    refused(tmp_path / "c.nii.gz", "an uncompressed NIfTI file", "a gzip file")
    refused(tmp_path / "d.nii", "a gzip file")


def test_d7_gzip_of_something_else(tmp_path):
    path = tmp_path / "text.nii.gz"
    path.write_bytes(gzip.compress(b"subject;diagnosis\n" * 100))
    refused(path, "magic", "single-file NIfTI")
    path.write_bytes(gzip.compress(b"short"))
    refused(path, "magic")


def test_d7_header_of_a_pair(tmp_path):
    refused(save(tmp_path / "a.nii", magic=b"ni1"), "the header of a NIfTI pair")
    refused(save(tmp_path / "a.nii.gz", magic=b"ni1"), "magic", "convert")


@pytest.mark.parametrize("name", ["bomb.nii", "bomb.nii.gz"])
def test_d8_header_promises_more_than_the_file(tmp_path, name):
    path = save(tmp_path / name, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    assert path.stat().st_size < 1000
    refused(path, str(352 + 2 * 32767**3))


def test_d8_short_compressed_header(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    block = gzip.decompress(save(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]).read_bytes())[:352]
    path.write_bytes(gzip.compress(block))
    refused(path, "bytes, by its header")


@pytest.mark.parametrize(
    ("dim", "message"),
    [((3, *SHAPE, 1, 1, 1, 1), "was not read further"), ((3, 30000, 30000, 30000, 1, 1, 1, 1), "too few to hold that")],
)
def test_d9_gzip_bomb_needs_no_memory(tmp_path, dim, message):
    """A file of 256 KiB that inflates to 256 MiB is refused by a process that may not use as much."""
    path = save(tmp_path / "bomb.nii.gz", dim=dim)
    content = gzip.decompress(path.read_bytes())
    packer = zlib.compressobj(9, wbits=31)
    with open(path, "wb") as stream:
        stream.write(packer.compress(content))
        for _ in range(256):
            stream.write(packer.compress(bytes(1 << 20)))
        stream.write(packer.flush())
    assert path.stat().st_size < 300_000
    code = f"""
import resource
from trifuse.architectures.data.volumes.nifti import read_image
from trifuse.kernels.errors import DataError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    read_image({str(path)!r})
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert message in done.stdout, done


def test_too_little_memory_is_a_data_error(good, monkeypatch):
    def gunzip(*args, **options):
        raise MemoryError

    monkeypatch.setattr(nifti, "gunzip", gunzip)
    refused(good, "memory")
