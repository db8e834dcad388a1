"""Every fault of a NIfTI file has its test here; files are made with nibabel, or by hand where nibabel would refuse."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.volumes import gzip_stream, nifti
from trifuse.architectures.data.volumes.nifti import new_volume, read_image, read_labels, write_image, write_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels.errors import DataError

SHAPE = (7, 6, 5)
SPACING = np.diag([1.0, 1.5, 4.0, 1.0])
GEOMETRY = (
    *("pixdim", "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def save(path, array=None, affine=SPACING, code=1, unit="mm", **fields):
    """Write a file with nibabel, then put ``fields`` into its header by force."""
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units(unit)
    block = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(block[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    block[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(block)) if path.name.endswith(".gz") else bytes(block))
    return path


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "good.nii.gz")


@pytest.fixture(scope="module")
def noisy_bytes(tmp_path_factory):
    """The bytes of a file with content that hardly compresses, so that most bytes are voxels."""
    voxels = np.random.default_rng(0).integers(0, 30000, (9, 8, 5), dtype=np.int16)
    path = save(tmp_path_factory.mktemp("noisy") / "noisy.nii.gz", voxels)
    return path.read_bytes(), read_image(path).voxels


def refused(path, *words, read=read_image, **options):
    """Assert that reading fails with a message that names the file and every word."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


def outcome(path):
    """Return the error of reading a file, or None."""
    try:
        read_image(path)
    except DataError as error:
        return error
    return None


# ------------------------------------------------------------------------------- files that are not right


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
        (bytes(128) + b"DICM" + bytes(400), "a DICOM file"),
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
    def gunzip(*args):
        raise MemoryError

    monkeypatch.setattr(nifti, "gunzip", gunzip)
    refused(good, "memory")


# ------------------------------------------------------------------------------------- headers that lie


@pytest.mark.parametrize("dim", [[3, 0, 6, 5, 1, 1, 1, 1], [3, 7, -6, 5, 1, 1, 1, 1]])
def test_d10_zero_or_negative_dimension(tmp_path, dim):
    refused(save(tmp_path / "a.nii.gz", dim=dim), "dim", "at least one voxel")


@pytest.mark.parametrize("count", [0, 8, -1])
def test_d10_number_of_dimensions(tmp_path, count):
    """Also a count that makes the byte order ambiguous ends in an error, not in a guess."""
    refused(save(tmp_path / "a.nii.gz", dim=[count, 7, 6, 5, 1, 1, 1, 1]), "dim")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_d11_pixdim(tmp_path, value):
    refused(save(tmp_path / "a.nii.gz", pixdim=[1, 1, value, 4, 0, 0, 0, 0]), "pixdim", "positive")


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [0, 0, 4, 0], [np.nan, 1.5, 0, 0], [0, np.inf, 0, 0]])
def test_d11_affine(tmp_path, row):
    refused(save(tmp_path / "a.nii.gz", srow_y=row), "affine (sform)", "independent")


def test_d11_quaternion(tmp_path):
    path = save(tmp_path / "a.nii.gz", sform_code=0, quatern_b=1, quatern_c=1, quatern_d=1)
    refused(path, "qform", "rotation")


def test_d12_qform_and_sform_disagree(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", qoffset_x=30))
    (note,) = volume.notes
    assert note.field == "qform"
    assert "30 voxels apart, the sform counts" in note.text
    np.testing.assert_array_equal(volume.geometry.affine, SPACING)


def test_d12_invalid_qform_beside_a_good_sform(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", quatern_b=1, quatern_c=1, quatern_d=1)).notes
    assert note.field == "qform"


def test_d12_rule(tmp_path):
    """The sform counts where it is set, then the qform, then pixdim alone."""
    moved = {"qoffset_x": 30, "srow_x": [1, 0, 0, 99]}
    assert read_image(save(tmp_path / "a.nii.gz", **moved)).geometry.affine[0, 3] == 99
    assert read_image(save(tmp_path / "b.nii.gz", **moved, sform_code=0)).geometry.affine[0, 3] == 30
    bare = read_image(save(tmp_path / "c.nii.gz", **moved, sform_code=0, qform_code=0))
    assert bare.notes[0].field == "orientation"
    assert bare.spacing_mm == (4.0, 1.5, 1.0)


def test_d12_pixdim_disagrees(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", pixdim=[1, 1, 3, 4, 0, 0, 0, 0], qform_code=0))
    assert [note.field for note in volume.notes] == ["pixdim"]
    assert volume.spacing_mm == (4.0, 1.5, 1.0)


@pytest.mark.parametrize(
    ("unit", "scale", "expected", "field"),
    [
        ("meter", 1e-3, (4.0, 1.5, 1.0), "spacing"),
        ("micron", 1e3, (4.0, 1.5, 1.0), "spacing"),
        ("unknown", 1, (4.0, 1.5, 1.0), "units"),
        ("mm", 1e-3, (0.004, 0.0015, 0.001), "spacing"),
        ("mm", 1e3, (4000.0, 1500.0, 1000.0), "spacing"),
    ],
)
def test_d14_units_and_implausible_spacing(tmp_path, unit, scale, expected, field):
    affine = SPACING * [[scale], [scale], [scale], [1]]
    volume = read_image(save(tmp_path / "a.nii.gz", affine=affine, unit=unit))
    np.testing.assert_allclose(volume.spacing_mm, expected, rtol=1e-6)
    assert [note.field for note in volume.notes] == [field]


def test_d14_unknown_unit_code(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", xyzt_units=5)).notes
    assert note.field == "spacing"
    assert "unknown code, 5" in note.text


@pytest.mark.parametrize("field", ["scl_slope", "scl_inter"])
def test_infinite_slope(tmp_path, field):
    refused(save(tmp_path / "a.nii.gz", **{"scl_slope": 1, field: np.inf}), "scl_slope", "finite")


def test_slope_is_applied(tmp_path):
    plain = read_image(save(tmp_path / "a.nii.gz")).voxels
    scaled = read_image(save(tmp_path / "b.nii.gz", scl_slope=2, scl_inter=-5)).voxels
    np.testing.assert_array_equal(scaled, plain * 2 - 5)
    np.testing.assert_array_equal(read_image(save(tmp_path / "c.nii.gz", scl_slope=0, scl_inter=9)).voxels, plain)


def test_vox_offset(tmp_path):
    refused(save(tmp_path / "a.nii.gz", vox_offset=10), "vox_offset")
    refused(save(tmp_path / "a.nii.gz", vox_offset=np.nan), "vox_offset")
    read_image(save(tmp_path / "a.nii.gz", vox_offset=0))


@pytest.mark.parametrize("code", [128, 2304])
def test_d21_rgb(tmp_path, code):
    refused(save(tmp_path / "a.nii.gz", datatype=code), "RGB NIfTI", "grey")


@pytest.mark.parametrize("code", [0, 1, 32, 1536, 9999])
def test_other_datatypes_are_refused(tmp_path, code):
    refused(save(tmp_path / "a.nii.gz", datatype=code), "datatype", str(code))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_types_and_byte_orders(tmp_path, dtype, order):
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    header.set_xyzt_units("mm")
    path = tmp_path / "a.nii"
    nib.Nifti1Image(array, SPACING, header).to_filename(path)
    volume = read_image(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array)
    np.testing.assert_array_equal(read_labels(path).voxels, volume.voxels)


def test_nifti2(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    nib.Nifti2Image(array, SPACING).to_filename(tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz")
    write_image(tmp_path / "b.nii.gz", volume.voxels, like=volume)
    again = nib.load(tmp_path / "b.nii.gz")
    assert isinstance(again, nib.Nifti2Image)
    np.testing.assert_array_equal(again.get_fdata(), array)
    np.testing.assert_array_equal(again.affine, SPACING)


# ------------------------------------------------------------------------------------------ dimensions


def test_d20_singleton_is_dropped_with_a_note(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(*SHAPE, 1, 1)
    volume = read_image(save(tmp_path / "a.nii.gz", array))
    np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array[..., 0, 0])
    assert [note.field for note in volume.notes] == ["dim"]


def test_d20_cine_needs_a_frame(tmp_path):
    array = np.arange(np.prod(SHAPE) * 3, dtype=np.int16).reshape(*SHAPE, 3)
    path = save(tmp_path / "cine.nii.gz", array)
    refused(path, "(7, 6, 5, 3)", "frame=0 to frame=2")
    for frame in range(3):
        volume = read_image(path, frame=frame)
        np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), array[..., frame])
    for frame in (-1, 3):
        refused(path, "frame", "0 to 2", frame=frame)


def test_d20_frame_of_a_3d_file_or_of_two_time_axes(tmp_path):
    refused(save(tmp_path / "a.nii.gz"), "frame", frame=0)
    refused(save(tmp_path / "b.nii.gz", np.zeros((*SHAPE, 2, 2), np.int16)), "frame", frame=0)


def test_d24_one_slice(tmp_path):
    """The axis with one voxel is the slice axis, whatever the spacing says; with two of them the spacing decides."""
    path = save(tmp_path / "a.nii.gz", np.arange(42, dtype=np.int16).reshape(7, 1, 6), np.diag([2.0, 1, 3, 1]))
    volume = read_image(path)
    assert volume.voxels.shape == (1, 6, 7)
    assert volume.spacing_mm == (1.0, 3.0, 2.0)
    assert read_image(save(tmp_path / "b.nii.gz", np.ones((7, 1, 1), np.int16))).voxels.shape == (1, 1, 7)


# ---------------------------------------------------------------------------------------------- voxels


def test_d22_nonfinite_voxels(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    array[2, 1, 3], array[4, 0, 0] = np.nan, -np.inf
    path = save(tmp_path / "a.nii.gz", array)
    refused(path, "2 NaN or infinite voxels (0.952%)", "(2, 1, 3)", 'nonfinite="zero"')
    good = np.isfinite(array)
    for policy, fill in (("zero", 0.0), ("median", np.median(array[good]))):
        volume = read_image(path, nonfinite=policy)
        native = volume.geometry.to_native(volume.voxels)
        np.testing.assert_array_equal(native[good], array[good])
        assert set(native[~good]) == {np.float32(fill)}
        assert [note.field for note in volume.notes] == ["voxels"]


def test_d22_nothing_finite(tmp_path):
    refused(save(tmp_path / "a.nii.gz", np.full(SHAPE, np.nan, np.float32)), "100.000%", nonfinite="median")


def test_d22_beyond_float32(tmp_path):
    refused(save(tmp_path / "a.nii.gz", np.full(SHAPE, 1e300)), "infinite")


def test_d22_unknown_policy(good):
    with pytest.raises(ValueError, match="expected one of 'error', 'zero', 'median', got 'ignore'"):
        read_image(good, nonfinite="ignore")


def test_d23_constant_image(tmp_path):
    (note,) = read_image(save(tmp_path / "a.nii.gz", np.full(SHAPE, 7, np.int16))).notes
    assert "same value, 7" in note.text


# ---------------------------------------------------------------------------------------------- labels


def test_d18_slope_and_float_labels(tmp_path):
    stored = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3
    sloped = save(tmp_path / "a.nii.gz", (stored * 2).astype(np.int16), scl_slope=0.49999997, scl_inter=0)
    for path in (sloped, save(tmp_path / "b.nii.gz", stored + 9e-4)):
        labels = read_labels(path)
        np.testing.assert_array_equal(labels.geometry.to_native(labels.voxels), stored)
        assert labels.voxels.dtype == np.uint8
    wrong = stored.astype(np.float32)
    wrong[1, 2, 3] += 0.25
    refused(save(tmp_path / "c.nii.gz", wrong), "labels", "at voxel (1, 2, 3)", "0.001", read=read_labels)
    wrong[1, 2, 3] = np.nan
    refused(save(tmp_path / "d.nii.gz", wrong), "1 NaN", read=read_labels)


@pytest.mark.parametrize(
    ("dtype", "high", "written"),
    [
        (bool, 1, "u1"),
        ("i8", 255, "u1"),
        ("i8", 256, "i2"),
        ("i2", -1, "i2"),
        ("u2", 40000, "u2"),
        ("u8", 70000, "i4"),
        ("i8", -70000, "i4"),
    ],
)
def test_d19_smallest_safe_type(good, tmp_path, dtype, high, written):
    like = read_image(good)
    labels = np.zeros(like.voxels.shape, dtype)
    labels[1, 2, 3] = high
    write_labels(tmp_path / "b.nii.gz", labels, like)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.dtype(written)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii.gz", like=like).voxels, labels)


def test_d19_refusals(good, tmp_path):
    like, path = read_image(good), tmp_path / "b.nii.gz"
    for labels, word in (
        (like.voxels, "float32"),
        (np.full(like.voxels.shape, 2**40), "32 bits"),
        (np.zeros((3, 3, 3), np.uint8), "(5, 6, 7)"),
    ):
        with pytest.raises(DataError, match=str(path)) as caught:
            write_labels(path, labels, like)
        assert word in str(caught.value)
    with pytest.raises(DataError, match="expected one of uint8, int16, uint16, int32, float32, got type bool"):
        write_image(path, like.voxels > 0, like)
    with pytest.raises(DataError, match="ends in"):
        write_labels(tmp_path / "b.mha", np.zeros(like.voxels.shape, np.uint8), like)
    assert os.listdir(tmp_path) == ["good.nii.gz"]


def test_d15_labels_of_another_shape(good, tmp_path):
    other = save(tmp_path / "b.nii.gz", np.zeros((7, 6, 4), np.uint8))
    refused(other, "(4, 6, 7)", "(5, 6, 7)", "another image", read=read_labels, like=read_image(good))


@pytest.mark.parametrize(("shift", "notes"), [(0.0, 0), (0.009, 0), (0.4, 1)])
def test_d16_small_shifts_are_tolerated(good, tmp_path, shift, notes):
    affine = SPACING.copy()
    affine[0, 3] = shift
    path = save(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8), affine)
    assert len(read_labels(path, like=read_image(good)).notes) == notes


def test_d16_gross_shift(good, tmp_path):
    affine = SPACING.copy()
    affine[0, 3] = 0.6
    path = save(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8), affine)
    refused(path, "0.6 voxels away", "at most 0.5", read=read_labels, like=read_image(good))


def test_d16_labels_stored_the_other_way_round(good, tmp_path):
    """Labels in another axis order, but in the same place, are shown as their image is."""
    image = read_image(good)
    stored = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE)
    affine = SPACING.copy()
    affine[:3, 0] *= -1
    affine[0, 3] = SHAPE[0] - 1
    path = save(tmp_path / "b.nii.gz", np.ascontiguousarray(stored[::-1]).transpose(1, 0, 2), affine[:, [1, 0, 2, 3]])
    np.testing.assert_array_equal(read_labels(path, like=image).voxels, image.geometry.to_display(stored))


def test_d16_oblique_tie_is_broken_as_the_image_breaks_it(tmp_path):
    """At 45 degrees a rounding error decides which axis is shown where: the image decides for both."""
    turn = np.eye(4)
    for angle in (np.pi / 4 - 1e-5, np.pi / 4 + 1e-5):
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        save(tmp_path / f"{angle > np.pi / 4}.nii.gz", np.arange(216, dtype=np.uint8).reshape(6, 6, 6), turn @ SPACING)
    image = read_image(tmp_path / "True.nii.gz")
    assert read_image(tmp_path / "False.nii.gz").geometry.flips != image.geometry.flips
    np.testing.assert_array_equal(read_labels(tmp_path / "False.nii.gz", like=image).voxels, image.voxels)


# ------------------------------------------------------------------------------------------- geometry

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def rotation(angles):
    turns = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        turns = turn @ turns
    return turns


def assert_round_trip(folder, affine, codes=(1, 1)):
    """A file read and written again has the same grid in every field; the view inside is a pure rearrangement."""
    path = folder / "a.nii.gz"
    fields = {"sform_code": codes[0], "qform_code": codes[1], "descrip": b"name", "aux_file": b"name", "cal_max": 9}
    save(path, affine=affine, **fields)
    source = nib.load(path)
    volume = read_image(path)
    geometry = volume.geometry
    native = np.asarray(source.dataobj)
    np.testing.assert_array_equal(geometry.to_native(volume.voxels), native)
    np.testing.assert_array_equal(geometry.affine, source.affine)
    for position in itertools.product(*[(0, length - 1) for length in volume.voxels.shape]):
        where = geometry.display_affine @ [*position, 1]
        index = np.rint(np.linalg.solve(source.affine, where))[:3].astype(int)
        assert native[tuple(index)] == volume.voxels[position]
    np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(geometry.display_affine[:3, :3], axis=0), rtol=1e-6)
    for write, voxels in ((write_image, volume.voxels), (write_labels, volume.voxels.astype(np.int64))):
        write(folder / "b.nii.gz", voxels, like=volume)
        written = nib.load(folder / "b.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), native)
        np.testing.assert_array_equal(written.affine, source.affine)
        for field in GEOMETRY:
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
    return volume


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_d13_all_48_orientations(tmp_path, order, signs):
    """Upright volumes: slices follow the coarsest axis, and the view is that of a radiologist."""
    spacing = (1.0, 1.5, 4.0)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis in range(3):
        affine[order[axis], axis] = signs[axis] * spacing[axis]
    affine[:3, 3] = (-31.5, 12.25, 7)
    volume = assert_round_trip(tmp_path, affine)
    assert volume.spacing_mm[0] == 4.0
    ways = "".join(nib.aff2axcodes(volume.geometry.display_affine))
    assert ways == {2: "SPL", 1: "PIL", 0: "LIP"}[order[2]]


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 9)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    codes=st.sampled_from([(1, 1), (2, 0), (0, 1), (4, 3)]),
)
def test_d13_oblique(angles, spacing, origin, orientation, codes):
    order, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) @ np.eye(3)[:, list(order)] @ np.diag(np.array(spacing) * signs)
    affine[:3, 3] = origin
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip(Path(folder), affine, codes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_isotropic_volumes_are_shown_axially(tmp_path, order):
    volume = read_image(save(tmp_path / "a.nii.gz", affine=np.eye(4)[:, [*order, 3]]))
    assert "".join(nib.aff2axcodes(volume.geometry.display_affine)) == "SPL"


def test_pixdim_beyond_the_third_is_kept(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", pixdim=[1, 1, 1.5, 4, 0.04, 0, 3, 0]))
    write_image(tmp_path / "b.nii.gz", volume.voxels, like=volume)
    np.testing.assert_array_equal(
        nib.load(tmp_path / "b.nii.gz").header["pixdim"], np.float32([1, 1, 1.5, 4, 0.04, 0, 3, 0])
    )


def test_new_volume_refuses_a_flat_grid():
    with pytest.raises(DataError, match="new volume"):
        new_volume(np.zeros(SHAPE, np.int16), np.diag([1.0, 1, 0, 1]))


def test_volume_survives_pickling(good):
    volume = pickle.loads(pickle.dumps(read_image(good)))
    assert isinstance(volume, Volume)
    np.testing.assert_array_equal(volume.voxels, read_image(good).voxels)
    assert volume.geometry.flips == read_image(good).geometry.flips


# ---------------------------------------------------------------------------------------------- writing


def test_l14_header_text_is_not_carried_over(tmp_path):
    names = {"descrip": b"Doe^Jane", "aux_file": b"Doe", "intent_name": b"Doe", "db_name": b"Doe"}
    volume = read_image(save(tmp_path / "a.nii.gz", **names))
    write_image(tmp_path / "b.nii.gz", volume.voxels, like=volume)
    write_labels(tmp_path / "c.nii.gz", volume.voxels > 3, like=volume)
    for name in "bc":
        assert b"Doe" not in gzip.decompress((tmp_path / f"{name}.nii.gz").read_bytes())


def test_written_header_is_plain(good, tmp_path):
    volume = read_image(good)
    for name in ("b.nii", "b.nii.gz"):
        write_image(tmp_path / name, volume.voxels.astype(np.float64), like=volume)
        content = (tmp_path / name).read_bytes()
        header = nib.Nifti1Header((gzip.decompress(content) if name.endswith(".gz") else content)[:348])
        assert (header["scl_slope"], header["scl_inter"], header["vox_offset"]) == (1, 0, 352)
        assert header.get_data_dtype() == np.float32
        np.testing.assert_array_equal(read_image(tmp_path / name).voxels, volume.voxels)


def test_same_voxels_give_the_same_bytes(good, tmp_path, monkeypatch):
    """Neither the name nor the time is written into the file."""
    volume = read_image(good)
    for hour, name in enumerate(("b.nii.gz", "c.nii.gz")):
        monkeypatch.setattr(gzip.time, "time", lambda now=1e9 + 3600 * hour: now)
        write_image(tmp_path / name, volume.voxels, like=volume)
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:-1] + b"x"])
def test_a_failed_write_leaves_what_was_there(good, tmp_path, monkeypatch, damage):
    volume, before = read_image(good), good.read_bytes()
    compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", lambda *args, **options: damage(compress(*args, **options)))
    with pytest.raises(DataError, match="other bytes when read back"):
        write_image(good, volume.voxels + 1, like=volume)
    assert good.read_bytes() == before
    assert os.listdir(tmp_path) == ["good.nii.gz"]


def test_a_write_that_changes_voxels_is_noticed(good, monkeypatch):
    volume, before = read_image(good), good.read_bytes()
    compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", lambda payload, **options: compress(payload[:-1] + b"\x01", **options))
    with pytest.raises(DataError, match="other bytes when read back"):
        write_image(good, volume.voxels, like=volume)
    assert good.read_bytes() == before


# -------------------------------------------------------------------------------------------- real data


def real_files():
    root = os.environ.get("TRIFUSE_DATA")
    return sorted(Path(root).glob("*/**/*.nii.gz")) if root else []


@pytest.mark.parametrize("path", real_files() or [None], ids=lambda path: path.name if path else "none")
def test_real_files_keep_their_grid(path, tmp_path):
    if not os.environ.get("TRIFUSE_DATA"):
        pytest.skip("TRIFUSE_DATA is not set")
    assert path is not None, "TRIFUSE_DATA holds no NIfTI file"
    source = nib.load(path)
    frame = 3 if source.ndim == 4 else None
    native = np.asarray(source.dataobj) if frame is None else np.asarray(source.dataobj)[..., frame]
    volume = read_image(path, frame=frame)
    assert volume.spacing_mm[0] >= max(volume.spacing_mm) * 0.99
    np.testing.assert_array_equal(volume.geometry.to_native(volume.voxels), native.astype(np.float32))
    write_image(tmp_path / "copy.nii.gz", volume.voxels.astype(np.int16), like=volume)
    written = nib.load(tmp_path / "copy.nii.gz")
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), native)
    for field in GEOMETRY:
        assert written.header[field].tobytes() == source.header[field].tobytes(), field
