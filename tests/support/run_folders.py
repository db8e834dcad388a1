"""Folders of runs, as far as their names tell, without a network that was trained."""

from __future__ import annotations

from pathlib import Path

from trifuse.architectures.storage.record import write_record
from trifuse.architectures.training.run_folder import discard_replaced

RUN = {
    "split.json": '{"test": ["case_1"]}',
    "results.json": '{"files": ["figures/test/overlays.png"]}',
    "log.csv": "epoch\n1\n",
    "report.md": "# a run",
    "test_cases.csv": "case_id",
    "best/model.safetensors": "best",
    "last/training_state.json": '{"position": {"step": 9}}',
    "predictions/test/case_1.nii.gz": "labels",
    "figures/test/overlays.png": "picture",
    "cache/" + "0a" * 20 + ".npy": "slices",
}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def make_run(folder: Path, files: dict[str, str] = RUN) -> Path:
    fill(folder, files or {"log.csv": "epoch"})
    write_record(folder / "run.json", {"recipe": {}, "config": {}})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if name != ".lock"}


def begin(out: Path, *, discards: bool = True) -> None:
    """Do what a new run does up to its first checkpoint."""
    fill(out, {"split.json": "new", "last/training_state.json": '{"position": {"step": 1}}'})
    write_record(out / "run.json", {"recipe": {"new": 1}, "config": {}})
    if discards:
        discard_replaced(out)
