"""Every reader of data, with sound files of the kind that it reads."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from engine import Target
from made_ecg import made_ecg

from trifuse.architectures.data.ecg.files import read_ecg
from trifuse.architectures.data.ecg.ptbxl import open_ptbxl
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.data.layouts.check import check_folder
from trifuse.architectures.data.layouts.open_cohort import open_cohort, scan_cohort
from trifuse.architectures.data.layouts.split import read_split
from trifuse.architectures.data.volumes.arrays import read_array_image, read_array_labels
from trifuse.architectures.data.volumes.files import Arrays
from trifuse.architectures.data.volumes.nifti import new_volume, read_image, read_labels, unplaced_volume, write_labels

SHAPE = (6, 5, 3)


# ----------------------------------------------------------------------------------------------- volumes


def _nifti(kind: Any, dtype: str, shape: tuple[int, ...] = SHAPE) -> bytes:
    image = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 7, np.diag([1.0, 1.5, 4.0, 1.0]))
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def niftis(folder: Path) -> list[bytes]:
    """Return NIfTI files of both versions, of several types and of two, three and four dimensions."""
    volumes = [_nifti(nib.Nifti1Image, dtype) for dtype in ("u1", "<i2", "<f4", ">f4")]
    return [*volumes, _nifti(nib.Nifti2Image, "<i2"), _nifti(nib.Nifti1Image, "u1", (4, 3, 2, 1))]


def _gzipped(folder: Path) -> list[bytes]:
    return [gzip.compress(content, mtime=0) for content in niftis(folder)[:4]]


def _either(*readers: Callable[[Path], object]) -> Callable[[Path], object]:
    """Let a file be read by all readers; it counts as refused where the last of them refuses it."""

    def read(path: Path) -> object:
        for reader in readers[:-1]:
            try:
                reader(path)
            except (ValueError, OSError) as error:
                if not hasattr(error, "want") and not getattr(error, "filename", None):
                    raise
        return readers[-1](path)

    return read


_LIKE = unplaced_volume(np.zeros((3, 6, 5), np.float32), Path("image"))


def _npz(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def npz_volumes(folder: Path) -> list[bytes]:
    """Return NumPy archives with an image and labels of several types."""
    image = np.arange(90, dtype=np.float32).reshape(3, 6, 5)
    types = ((np.float32, np.uint8), (np.float64, np.float32), (np.int16, bool))
    return [_npz(image=image.astype(one), label=(image % 3).astype(other)) for one, other in types]


def npz_slices() -> bytes:
    """Return a slice of the Synapse package."""
    plane = np.arange(30, dtype=np.float32).reshape(6, 5)
    return _npz(image=plane, label=plane % 9)


def _read_arrays(path: Path) -> object:
    arrays = Arrays((path,))
    try:
        read_array_image(arrays)
    except ValueError as error:
        if not hasattr(error, "want"):
            raise
    return read_array_labels(arrays, like=_LIKE)


def h5_volumes(folder: Path) -> list[bytes]:
    """Return HDF5 files: sound ones, and ones with every kind of data set that is no volume."""
    image = np.arange(90, dtype=np.float32).reshape(3, 6, 5)
    label = (image % 3).astype(np.uint8)

    def plain(file: Any) -> None:
        file["image"], file["label"] = image, label

    def packed(file: Any) -> None:
        file.create_dataset("image", data=image, chunks=(1, 6, 5), compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("label", data=label, chunks=(3, 6, 5), compression="lzf")

    return [_h5(folder, plain), _h5(folder, packed)]


def _h5(folder: Path, fill: Callable[[Any], None]) -> bytes:
    path = folder / "made.h5"
    with h5py.File(path, "w") as file:
        fill(file)
    content = path.read_bytes()
    path.unlink()
    return content


# -------------------------------------------------------------------------------------------------- ECGs


def ecg_archives(folder: Path) -> list[bytes]:
    """Return NumPy archives of an ECG."""
    signal = made_ecg(2.0, rate_hz=100.0)
    return [_npz(signal=signal, rate=100.0, leads=np.array(LEADS), units="mV"), _npz(ecg=signal.astype(np.float32).T)]


def _ecg_arrays(folder: Path) -> list[bytes]:
    packed = io.BytesIO()
    np.save(packed, made_ecg(1.0, rate_hz=50.0).astype(np.float32))
    return [packed.getvalue()]


def ecg_tables(folder: Path) -> list[bytes]:
    """Return CSV files of an ECG, with and without a column of times."""
    samples = np.round(made_ecg(0.3, rate_hz=100.0), 3).T
    plain = "\n".join([",".join(LEADS), *(",".join(map(str, row)) for row in samples)])
    timed = [f"{index / 100};" + ";".join(map(str, row)) for index, row in enumerate(samples)]
    named = "\n".join(["time_s;" + ";".join(f"{lead}_mV" for lead in LEADS), *timed])
    return [plain.encode(), named.encode()]


def wfdb_headers(folder: Path) -> list[bytes]:
    """Write the signals of a WFDB record, and return its header in two spellings."""
    samples = np.round(made_ecg(2.0, rate_hz=100.0) * 1000).astype("<i2").T
    (folder / "record.dat").write_bytes(samples.tobytes())
    sums = samples.astype(np.int64).sum(0).astype(np.int16)
    lines = [
        f"record.dat 16 1000.0(0)/mV 16 0 {first} {total} 0 {lead}"
        for lead, first, total in zip(LEADS, samples[0], sums, strict=True)
    ]
    head = f"record 12 100 {len(samples)}"
    text = "\n".join([head, *lines]) + "\n"
    dated = "\n".join([f"{head} 10:00:00 01/02/2020", *lines, "# age: 40", "# <sex>: F"]) + "\n"
    return [text.encode(), dated.encode()]


def ptbxl_tables(folder: Path) -> list[bytes]:
    """Write two records of PTB-XL, and return its table."""
    for number in (1, 2):
        path = folder / f"records500/00000/{number:05d}_hr.hea"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    columns = "ecg_id,patient_id,age,sex,scp_codes,strat_fold,filename_lr,filename_hr"
    row = (
        "{0},{0}.0,56.0,1,\"{{'NORM': 100.0, 'SR': 0.0}}\",{0},records100/00000/{0:05d}_lr,records500/00000/{0:05d}_hr"
    )
    return ["\n".join([columns, row.format(1), row.format(2)]).encode()]


# ------------------------------------------------------------------------------------------------ cohorts


def put_volumes(folder: Path, *names: str) -> None:
    """Write small volumes of zeros and ones."""
    for number, name in enumerate(names):  # no two alike
        native = np.zeros(SHAPE, np.uint8)
        native[2:4, 2:4], native[0, 0] = 1, np.unpackbits(np.uint8(number))[-3:]
        volume = new_volume(native, np.diag([-1.0, -1.0, 3.0, 1.0]))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_labels(folder / name, volume.voxels, volume)


def dataset_descriptions(folder: Path) -> list[bytes]:
    """Write the files of an nnU-Net data set, and return descriptions of it."""
    put_volumes(folder, *(f"{part}/k{n}{end}.nii.gz" for n in (0, 1) for part, end in _NNUNET))
    plain = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lv": 1}, "numTraining": 2}
    plain["file_ending"] = ".nii.gz"
    listed = {f"k{n}": {"images": [f"imagesTr/k{n}_0000.nii.gz"], "label": f"labelsTr/k{n}.nii.gz"} for n in (0, 1)}
    return [json.dumps(plain).encode(), json.dumps({**plain, "dataset": listed}).encode()]


_NNUNET = (("imagesTr", "_0000"), ("labelsTr", ""))


def case_tables(folder: Path) -> list[bytes]:
    """Write a cohort of LGE volumes and an ECG, and return tables of it."""
    put_volumes(folder, "a.nii.gz", "a_seg.nii.gz", "b.nii.gz")
    (folder / "a.npz").write_bytes(ecg_archives(folder)[0])
    columns = (
        "case_id,lge_path,seg_path,split,ecg_path,ecg_rate_hz,mri_date,ecg_date,rv_ant_x,rv_ant_y,rv_inf_x,rv_inf_y"
    )
    lines = ["a,a.nii.gz,a_seg.nii.gz,train,a.npz,100,2020-01-01,2020-01-05,1,2,3,4", "b,b.nii.gz,,test,,,,,,,,"]
    text = "\n".join([columns, *lines]) + "\n"
    return [text.encode(), text.replace(",", ";").encode()]


def splits(folder: Path) -> list[bytes]:
    """Write a plain cohort beside the split, and return splits of it."""
    put_volumes(folder, *(f"{part}/c{n}.nii.gz" for n in range(3) for part in ("images", "labels")))
    split = {"train": ["c0"], "val": ["c1"], "test": ["c2"]}
    return [json.dumps(split).encode(), json.dumps({**split, "test": [], "unused": ["c2"]}).encode()]


def digests(folder: Path) -> list[bytes]:
    """Write a plain cohort, and return its digests."""
    splits(folder)
    check_folder(folder, digests=folder / "digests.json")
    return [(folder / "digests.json").read_bytes()]


def _phases(folder: Path) -> list[bytes]:
    put_volumes(folder, *(f"patient001/patient001_frame{n:02d}{end}.nii.gz" for n in (1, 7) for end in ("", "_gt")))
    return [b"ED: 1\nES: 7\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"]


def slice_lists(folder: Path) -> list[bytes]:
    """Write slices of the Synapse package, and return a list of them."""
    plane = np.zeros((6, 5), np.float32)
    (folder / "train_npz").mkdir(exist_ok=True)
    for number in range(2):
        (folder / f"train_npz/case0005_slice00{number}.npz").write_bytes(_npz(image=plane, label=plane))
    return [b"case0005_slice000\ncase0005_slice001\n"]


# ------------------------------------------------------------------------------------------------- the list

READERS = (
    Target("nifti", "nifti", "scan.nii", niftis, _either(read_image, read_labels)),
    Target("nifti_gz", "gzip", "scan.nii.gz", _gzipped, _either(read_image, read_labels)),
    Target("npz", "zip", "scan.npz", npz_volumes, _read_arrays),
    Target("h5", "bytes", "scan.npy.h5", h5_volumes, _read_arrays),
    Target("ecg_npz", "zip", "ecg.npz", ecg_archives, read_ecg),
    Target("ecg_npy", "numpy", "ecg.npy", _ecg_arrays, read_ecg),
    Target("ecg_csv", "text", "ecg.csv", ecg_tables, read_ecg),
    Target("wfdb", "text", "record.hea", wfdb_headers, read_ecg),
    Target("ptbxl", "text", "ptbxl_database.csv", ptbxl_tables, lambda path: open_ptbxl(path.parent)),
    Target("dataset_json", "json", "dataset.json", dataset_descriptions, lambda path: open_cohort(path.parent)),
    Target("cases_csv", "text", "cases.csv", case_tables, lambda path: open_cohort(path.parent)),
    Target("split", "json", "split.json", splits, lambda path: read_split(path, open_cohort(path.parent))),
    Target("digests", "json", "digests.json", digests, lambda path: check_folder(path.parent, digests=path)),
    Target("acdc", "text", "patient001/Info.cfg", _phases, lambda path: scan_cohort(path.parent.parent)),
    Target(
        "synapse",
        "text",
        "lists_Synapse/train.txt",
        slice_lists,
        lambda path: scan_cohort(path.parent.parent, label_space="transunet9"),
    ),
)
