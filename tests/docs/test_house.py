"""The layout and the network that docs/house.md shows work, once they are added to a copy of the tree as it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from nifti_files import save
from ready_python import run_python

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/house.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(  # a paragraph that begins with the name of a file, then the file
    re.findall(r"^`(\w+\.py)`(?:(?!\n\n).)*\n\n```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
)
LAYOUT, NETWORK = "scans_segs", "my_net"
COPIED = ("kernels", "blocks", "architectures", "benchmarks", "tests/architectures/runs", "tests/support")


def put(path: Path, pattern: str, replacement: str) -> None:
    """Replace the one place of a file that matches."""
    text, places = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert places == 1, f"{path}: {pattern}"
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code to which the layout and the network of the page were added."""
    assert set(FILES) == {f"{LAYOUT}.py", "experiment.py", "model.py", "train.py"}
    tree = tmp_path_factory.mktemp("house") / "trifuse"
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results", "old_runs"))
    for name in ("tests/test_layout.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    layouts, network = tree / "architectures/data/layouts", tree / "architectures" / NETWORK
    (layouts / f"{LAYOUT}.py").write_text(FILES[f"{LAYOUT}.py"], encoding="utf-8")
    put(layouts / "__init__.py", r'( +)"lascarqs",\n', rf'\g<0>\1"{LAYOUT}",\n')
    network.mkdir()
    for name in ("experiment.py", "model.py", "train.py"):
        (network / name).write_text(FILES[name], encoding="utf-8")
    shutil.copy(tree / "architectures/plain_unet/__init__.py", network)
    put(
        network / "__init__.py",
        r"(_FILES = \{[^\n]*\n).*?\}",
        r'\1    "MyNet": "model",\n    "MyNetConfig": "model",\n}',
    )
    put(network / "__init__.py", r"__all__ = \[.*?\]", '__all__ = ["EXPERIMENT", "MyNet", "MyNetConfig"]')
    put(tree / "architectures/runs/registry.py", r'( +)"taff_unet",\n', rf'\g<0>\1"{NETWORK}",\n')
    put(tree / "pyproject.toml", r'( +)"trifuse.benchmarks",\n', rf'\1"trifuse.architectures.{NETWORK}",\n\g<0>')
    return tree


def run(tree: Path, *arguments: str) -> str:
    """Run Python on the copy, and return what it printed."""
    child = run_python(*arguments, folder=tree, PYTHONPATH=str(tree.parent), OMP_NUM_THREADS="1")
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def write_cohort(root: Path, labelled: tuple[str, ...]) -> Path:
    """Write cases a to d, no two alike, in both modalities; some have labels."""
    voxels = np.zeros((16, 16, 2), np.int16)
    voxels[4:10, 5:12] = 1
    ramp = np.arange(voxels.size, dtype=np.int16).reshape(voxels.shape)
    for folder in ("scans", "segs"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate("abcd"):
        for modality in ("ct", "mr"):
            save(root / f"scans/{name}_{modality}.nii.gz", voxels * 100 + ramp + number)
        if name in labelled:
            save(root / f"segs/{name}.nii.gz", voxels)
    return root


@pytest.mark.slow
def test_what_was_added_keeps_the_rules(tree):
    chosen = f"{NETWORK} or {LAYOUT} or packages or circle or list or arrows"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "addopts=--import-mode=importlib")
    printed = run(
        tree,
        "-m",
        "pytest",
        *options,
        "-k",
        chosen,
        "tests/test_layout.py",
        "tests/architectures/runs/test_registry.py",
    )
    assert " passed" in printed


def test_the_layout_is_opened(tree, tmp_path):
    cohort = write_cohort(tmp_path / "cohort", labelled=("a", "b"))
    script = (
        "import sys\n"
        "from trifuse.architectures.data.layouts.open_cohort import open_cohort, open_images\n"
        "for opened in (open_cohort(sys.argv[1]), open_images(sys.argv[1], modality='mr')):\n"
        "    print(opened.layout, *(f'{x.case_id} {x.image.name} {x.label and x.label.name}' for x in opened.cases))\n"
    )
    known, images = run(tree, "-c", script, str(cohort)).splitlines()
    assert known == f"{LAYOUT} a a_ct.nii.gz a.nii.gz b b_ct.nii.gz b.nii.gz c c_ct.nii.gz None d d_ct.nii.gz None"
    assert images == "images a a_mr.nii.gz None b b_mr.nii.gz None c c_mr.nii.gz None d d_mr.nii.gz None"


def test_the_network_is_trained_and_predicts_with_the_run_s_option(tree, tmp_path):
    cohort, new = write_cohort(tmp_path / "cohort", labelled=("a", "b", "c", "d")), tmp_path / "new"
    write_cohort(new, labelled=())
    for path in new.glob("scans/*_ct.nii.gz"):
        path.unlink()
    out = tmp_path / "run"
    options = ("--modality", "mr", "--epochs", "1", "--image-size", "16", "--device", "cpu")
    train = ["train", NETWORK, str(cohort), "--out", str(out), *options]
    predict = ["predict", str(out), str(new), "--out", str(tmp_path / "labels"), "--device", "cpu"]
    script = "from trifuse.architectures.cli.main import main\n"
    run(tree, "-c", script + "".join(f"assert main({words}) == 0\n" for words in (train, predict)))
    assert "MyNet on cohort" in (out / "report.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.nii.gz")) == [f"{name}.nii.gz" for name in "abcd"]
