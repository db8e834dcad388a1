"""Where a volume lies, that it is written back there, and real files."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import GEOMETRY, SHAPE, save

from trifuse.architectures.data.volumes.nifti import new_volume, read_image, write_image, write_labels
from trifuse.architectures.data.volumes.volume import Volume
from trifuse.kernels.errors import DataError

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
    source = save(tmp_path / "a.nii.gz", **names)
    image = nib.load(source)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane, born 1950"))
    nib.save(image, source)
    assert gzip.decompress(source.read_bytes()).count(b"Doe") == 5
    volume = read_image(source)
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
