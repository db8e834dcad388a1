"""The command, called as its entry point is, on folders in which one file is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

import checkpoint_readers
import readers
import torch
from engine import Target

from trifuse.architectures.cli import main as entry_point
from trifuse.architectures.cli.main import build_parser, main
from trifuse.architectures.plain_unet.model import PlainUNet, PlainUNetConfig

_parser_built_once = cache(build_parser)  # which is most of the time that a command takes here


def _main(words: list[str]) -> int:
    with patch.object(entry_point, "build_parser", _parser_built_once):
        return main(words)


def _command(*words: str, above: int = 0) -> Callable[[Path], object]:
    """Return what calls the command with those words, ``@`` being the target's folder and ``@file`` the damaged file.

    Args:
        words: of the command line.
        above: how many folders the damaged file lies below the target's.
    """

    def call(path: Path) -> object:
        folder = path.parents[above]
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").unlink(missing_ok=True)
        given = [word.replace("@file", str(path)).replace("@", str(folder)) for word in words]
        code = _main(given)
        if (escaped := folder.parent / "escaped").exists():
            shutil.rmtree(escaped) if escaped.is_dir() else escaped.unlink()
            raise AssertionError("wrote outside of its folder")
        return code

    return call


def _scan(name: str, make: Callable[[Path], list[bytes]]) -> Callable[[Path], list[bytes]]:
    """Write a plain cohort in which another image is sound."""

    def prepared(folder: Path) -> list[bytes]:
        readers.put_volumes(folder, "images/a.nii.gz", "labels/a.nii.gz", f"labels/{name}.nii.gz")
        return make(folder)

    return prepared


def _predictions(folder: Path) -> list[bytes]:
    readers.splits(folder)
    readers.put_volumes(folder / "predicted", "c1.nii.gz", "c2.nii.gz")
    return [(folder / "labels/c0.nii.gz").read_bytes()]


def _arrays(folder: Path) -> list[bytes]:
    (folder / "train_npz").mkdir(exist_ok=True)
    content = readers.npz_slices()
    (folder / "train_npz/case1_slice001.npz").write_bytes(content)
    return [content]


def _tables(folder: Path) -> list[bytes]:
    contents = checkpoint_readers.score_tables(folder)
    (folder / "sound.csv").write_bytes(contents[0])
    return contents


_TINY = PlainUNetConfig(image_size=16, base_dim=4, max_dim=4)


def _run(folder: Path, *, damaged: str) -> list[bytes]:
    """Write a run that can predict, and an image; return the file of it that is damaged."""
    if not (folder / "image.nii.gz").exists():
        torch.manual_seed(0)
        readers.put_volumes(folder, "image.nii.gz")
        PlainUNet(_TINY).save_pretrained(folder / "run/best")
        described = checkpoint_readers.run_description()
        described["config"]["data"]["preprocessing"]["image_size"] = 16
        (folder / "run/run.json").write_text(json.dumps(described))
        shutil.copytree(folder / "run", folder / "sound")
    return [(folder / "sound" / damaged).read_bytes()]


def _predict(path: Path) -> object:
    folder = next(parent for parent in path.parents if (parent / "image.nii.gz").exists())
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = ("--out", folder / "out", "--device", "cpu")
    return _main([str(word) for word in ("predict", folder / "run", folder / "image.nii.gz", *words)])


_CHECK = ("data", "check", "@")
_CONVERT = ("data", "convert", "@", "--to", "nnunet", "--out", "@/out")
_TRAIN = ("train", "plain_unet", "@/absent", "--out", "@/out", "--config", "@file")

COMMANDS = tuple(
    Target(f"command_{name}", form, file, prepare, read, is_command=True)
    for name, form, file, prepare, read in (
        ("check_nnunet", "json", "dataset.json", readers.dataset_descriptions, _command(*_CHECK)),
        ("convert_nnunet", "json", "dataset.json", readers.dataset_descriptions, _command(*_CONVERT)),
        ("check_table", "text", "cases.csv", readers.case_tables, _command(*_CHECK)),
        ("convert_table", "text", "cases.csv", readers.case_tables, _command(*_CONVERT)),
        ("check_image", "nifti", "images/b.nii", _scan("b", readers.niftis), _command(*_CHECK, above=1)),
        ("check_digests", "json", "d.json", readers.digests, _command(*_CHECK, "--digests", "@file")),
        (
            "check_arrays",
            "zip",
            "train_npz/case1_slice000.npz",
            _arrays,
            _command(*_CHECK, "--label-space", "transunet9", above=1),
        ),
        ("check_ecg", "text", "record.hea", readers.wfdb_headers, _command("data", "check-ecg", "@")),
        ("check_ecgs", "zip", "ecg.npz", readers.ecg_archives, _command("data", "check-ecg", "@")),
        ("check_ptbxl", "text", "ptbxl_database.csv", readers.ptbxl_tables, _command("data", "check-ecg", "@")),
        (
            "evaluate",
            "gzip",
            "predicted/c0.nii.gz",
            _predictions,
            _command("evaluate", "@/predicted", "@", "--out", "@/out.csv", "--overwrite", above=1),
        ),
        ("compare", "text", "b.csv", _tables, _command("compare", "@/sound.csv", "@file")),
        ("recipe", "text", "recipe.toml", checkpoint_readers.recipes, _command(*_TRAIN)),
        ("split", "json", "split.json", readers.splits, _command(*_CONVERT, "--split", "@file")),
        (
            "convert_weights",
            "safetensors",
            "a.safetensors",
            checkpoint_readers.tensor_files,
            _command("convert", "dinov2", "@file", "--out", "@/out"),
        ),
        (
            "convert_pickled",
            "zip",
            "a.pth",
            checkpoint_readers.pickled_weights,
            _command("convert", "dinov2", "@file", "--out", "@/out"),
        ),
        ("predict_config", "json", "run/best/config.json", lambda f: _run(f, damaged="best/config.json"), _predict),
        ("predict_run", "json", "run/run.json", lambda f: _run(f, damaged="run.json"), _predict),
        (
            "predict_weights",
            "safetensors",
            "run/best/model.safetensors",
            lambda f: _run(f, damaged="best/model.safetensors"),
            _predict,
        ),
    )
)
