"""Every command names a package that it lacks, with the line that installs it, before it does anything (L6)."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from command import run_main
from hugging_face import save_small_model
from tiny_networks import NETWORKS as TINY

from trifuse.architectures.cli.arguments import EXTRAS, commands_below
from trifuse.architectures.cli.main import build_parser, main
from trifuse.architectures.data.ecg import check
from trifuse.architectures.dino_unet import train as dino_unet
from trifuse.architectures.dino_unet.encoder_folder import describe_encoder
from trifuse.architectures.dino_unet.model import DinoUNetConfig
from trifuse.kernels import MissingExtra

REPORT = ("scipy", "matplotlib")
NEEDED = {  # by the command line, on data that are not there: what is looked for whatever the data are
    "demo dino_unet --out out": REPORT,
    "demo fias --out out": (*REPORT, "h5py"),
    "demo taff_unet --out out": REPORT,
    "ablate dino_unet --out out": REPORT,
    "ablate fias --out out": (*REPORT, "h5py"),
    "ablate taff_unet --out out": REPORT,
    "train dino_unet data --out out": REPORT,
    "train dino_unet data --out out --repeats 2": REPORT,
    "train fias data --out out --resume": REPORT,
    "train taff_unet data --setting full --prior gt --out out": REPORT,
    "train plain_unet data --out out --log tensorboard": (*REPORT, "tensorboard"),
    "train ecg data --out out": REPORT,
    "evaluate predictions data --out scores.csv": ("scipy",),
    "evaluate predictions data --report out": REPORT,
    "compare a b --out out.csv": ("scipy",),
    "compare a b --overlay --out out": ("matplotlib",),
    "compare a b --by interval --out out": ("matplotlib",),
    "audit run --out out": REPORT,
    "probe encoder data --out out": REPORT,
    "plot curves run --out out": ("matplotlib",),
    "plot ecg beat.npy --out out": ("matplotlib",),
    "plot bullseye labels.nii.gz --reference orientation --out out": REPORT,
    "torture --out out": REPORT,
    "bench --out out": ("pytest_benchmark",),
}
BY_FILES_ALONE = {"data check", "data check-ecg", "data convert", "predict"}
NOTHING = {"data phantom", "doctor", "convert"}


def hide(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def refused(words, package, capsys, folder):
    """Run a command, and see that it does nothing but name the package."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, said, errors = run_main(words, capsys)
    assert code == 2, errors
    assert re.search(rf" needs {package}, .*run: pip install 'trifuse\[{EXTRAS[package]}\]'\n$", errors), errors
    assert said == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("line", "package"), [(line, package) for line, packages in NEEDED.items() for package in packages]
)
def test_l6_it_is_looked_for_before_anything_else(monkeypatch, tmp_path, capsys, line, package):
    hide(monkeypatch, package)
    monkeypatch.chdir(tmp_path)
    refused(line.split(), package, capsys, tmp_path)


def test_every_command_is_among_these():
    def lines(parser, words=()):
        below = {name: each for action in parser._actions for name, each in _commands(action)}
        return [line for name, each in below.items() for line in lines(each, (*words, name))] or [" ".join(words)]

    def _commands(action):
        return action.choices.items() if isinstance(action.choices, dict) else ()

    known = {*NEEDED, *BY_FILES_ALONE}
    others = [line for line in lines(build_parser()) if not any(f"{one} ".startswith(f"{line} ") for one in known)]
    assert {line for line in others if not any(line.startswith(one) for one in NOTHING)} == set()
    for parser in commands_below(build_parser()):
        needs = parser.get_default("needs")
        assert needs is None or callable(needs) or {*needs} <= {*EXTRAS}


# --------------------------------------------------------------------------- what files call for, by their names alone


@pytest.fixture
def synapse(tmp_path, put_synapse):
    """Return a Synapse package, whose volumes are damaged: who reads one says so."""
    put_synapse(root=tmp_path / "data")
    for path in (tmp_path / "data" / "test_vol_h5").iterdir():
        path.write_bytes(b"damaged")
    (tmp_path / "predictions").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "data check data",
        "data convert data --to nnunet --out out",
        "evaluate predictions data --out scores.csv",
        "train fias data --out out",
        "train fias data --out out --repeats 2",
    ],
)
def test_l6_volumes_of_the_synapse_package(monkeypatch, synapse, capsys, line):
    hide(monkeypatch, "h5py")
    monkeypatch.chdir(synapse)
    refused([*line.split(), "--label-space", "transunet9"], "h5py", capsys, synapse)


def test_l6_volumes_of_the_synapse_package_to_be_predicted(monkeypatch, synapse, capsys):
    TINY["fias"].make().save_pretrained(synapse / "network")
    hide(monkeypatch, "h5py")
    refused(["predict", synapse / "network", synapse / "data", "--out", synapse / "out"], "h5py", capsys, synapse)


def test_l6_volumes_of_the_synapse_package_to_be_written(monkeypatch, tmp_path, put_case, capsys):
    for name in "ab":
        put_case(name, root=tmp_path / "data")
    hide(monkeypatch, "h5py")
    words = ["data", "convert", tmp_path / "data", "--to", "synapse", "--test-cases", "b", "--out", tmp_path / "out"]
    refused(words, "h5py", capsys, tmp_path)


@pytest.fixture
def hearts(tmp_path, scar_cohort):
    """Return a cohort whose ECGs are WFDB records, and damaged."""
    root = tmp_path / "data"
    shutil.copytree(scar_cohort, root)
    table = root / "cases.csv"
    table.write_text(table.read_text().replace(".npy,500,", ".hea,,"))
    for path in (root / "ecg").glob("*.npy"):
        path.with_suffix(".hea").write_text("damaged")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "data check-ecg data/ecg",
        "plot ecg data/ecg/case001.hea --out out",
        "train ecg data/ecg --out out",
        "train ecg --cohort data --out out",
        "train taff_unet data --setting full --prior gt --out out",
    ],
)
def test_l6_ecgs_that_are_wfdb_records(monkeypatch, hearts, capsys, line):
    hide(monkeypatch, "wfdb")
    monkeypatch.chdir(hearts)
    for path in (hearts / "data" / "ecg").glob("*.npy"):
        path.unlink()
    refused(line.split(), "wfdb", capsys, hearts)


@pytest.mark.parametrize("package", ["wfdb", "scipy"])
def test_l6_what_an_image_and_its_ecg_need_to_be_predicted(monkeypatch, hearts, capsys, package):
    TINY["taff_unet full"].make().save_pretrained(hearts / "network")
    hide(monkeypatch, package)
    words = ["predict", hearts / "network", hearts / "data", "--spacing", "1", "1", "--out", hearts / "out"]
    refused(words, package, capsys, hearts)


def test_l6_no_ecg_is_read_before_those_that_are_wfdb_records(monkeypatch, tmp_path, capsys):
    for name in ("a.npy", "b.hea"):
        (tmp_path / name).write_text("damaged")
    hide(monkeypatch, "wfdb")
    monkeypatch.setattr(check, "load_beat", lambda path, **_: pytest.fail(f"read {path}"))
    refused(["data", "check-ecg", tmp_path], "wfdb", capsys, tmp_path)


def test_l6_an_encoder_of_hugging_face(monkeypatch, tmp_path, capsys):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "dinov2"}')
    hide(monkeypatch, "transformers")
    monkeypatch.chdir(tmp_path)
    for words in ("train dino_unet data --encoder encoder --out out", "probe encoder data --out out"):
        refused(words.split(), "transformers", capsys, tmp_path)


def test_l6_an_encoder_of_hugging_face_that_a_recipe_describes(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    save_small_model(tmp_path, "dinov2")
    network = DinoUNetConfig(**describe_encoder(tmp_path), channels=(8, 4), bottleneck_dim=8, top_k=2)
    recipe = dino_unet.DinoUNetRecipe(network=network)
    dino_unet.check(recipe)
    hide(monkeypatch, "transformers")
    with pytest.raises(MissingExtra, match=r"transformers.*trifuse\[hf\]"):
        dino_unet.check(recipe)
    dino_unet.check(dino_unet.DinoUNetRecipe())


def test_what_needs_no_package_runs_without_any(monkeypatch, tmp_path, put_case, capsys):
    put_case("a")
    hide(monkeypatch, *EXTRAS)
    assert main(["data", "check", str(tmp_path)]) == 0
    phantom = ["data", "phantom", "--out", str(tmp_path / "phantom"), "--size", "24", "24", "3", "--beats", "2"]
    assert main([*phantom, "--train", "2", "--val", "1", "--test", "1"]) == 0
    assert "scipy" in run_main(["doctor"], capsys)[1]
