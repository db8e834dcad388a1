"""The package for the Hugging Face `kernels` loader: what it holds, and that it stands beside an installed trifuse."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
from ready_python import run_python

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "hub_programs.py"
MAY_IMPORT = {"torch", "triton", "xformers"} | sys.stdlib_module_names


def builder():
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of a package, built once."""
    out = tmp_path_factory.mktemp("hub") / "package"
    child = subprocess.run([sys.executable, ROOT / "hub" / "build.py", "--out", out], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"{out}: load it with")
    return out


@pytest.fixture(scope="module")
def variant(package):
    return package / "build" / "torch-universal"


def run(program: str, *arguments: object, **variables: str) -> str:
    """Run one of the programs, and return what it printed."""
    child = run_python(PROGRAM, program, *arguments, **variables)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


# ------------------------------------------------------------------------------------------------ what it holds


def test_metadata_says_what_the_loader_asks_for(package, variant):
    found = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    digest = found.pop("digest")
    assert re.fullmatch(r"_trifuse_[0-9a-f]{8}", found.pop("id"))
    assert found == {
        "name": "trifuse",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    files = [path for path in variant.rglob("*") if path.is_file() and path.name != "metadata.json"]
    digests = {path.relative_to(variant).as_posix(): hashlib.sha256(path.read_bytes()).digest() for path in files}
    assert digest["algorithm"] == "sha256"
    assert {name: b64decode(value) for name, value in digest["files"].items()} == digests
    assert {"__init__.py", "layers.py", "LICENSE", "trifuse/__init__.py", "gpu/launching.py"} <= set(digests)
    assert (package / "LICENSE").read_text(encoding="utf-8") == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_card_names_licence_and_namespace(package, variant):
    card = (package / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert f"`torch.ops.{json.loads((variant / 'metadata.json').read_text(encoding='utf-8'))['id']}`" in card


def test_it_imports_its_own_files_relatively_and_torch_and_triton_besides(variant):
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= MAY_IMPORT, f"{path.name}: {ast.unparse(node)}"


def test_the_tools_for_tests_stay_at_home(variant):
    assert not (variant / "testing").exists()
    assert not (variant / "tested_versions.py").exists()


def test_the_sources_alone_decide_its_name(variant, tmp_path):
    hub, id = builder(), json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    again = hub.build(tmp_path / "again")
    assert (again / "metadata.json").read_bytes() == (variant / "metadata.json").read_bytes()
    sources = hub.sources()
    assert hub.identifier(sources) == id
    assert hub.identifier(sources | {"forcing.py": sources["forcing.py"] + "#"}) != id


def test_it_replaces_an_older_build_and_nothing_else(tmp_path):
    hub, out = builder(), tmp_path / "package"
    stale = hub.build(out) / "stale.py"
    stale.touch()
    hub.build(out)
    assert not stale.exists()
    (out / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"an earlier build wrote, got one that holds notes\.txt; choose another"):
        hub.build(out)
    (tmp_path / "wheels" / "build" / "lib").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="got one that holds build/lib"):
        hub.build(tmp_path / "wheels")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "wheels"]


# ------------------------------------------------------------------------------------ beside an installed trifuse


@pytest.mark.parametrize("interpreted", [False, True])
def test_its_operators_are_those_of_an_installed_trifuse_in_their_own_namespace(variant, interpreted):
    variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
    assert "the same" in run("compare", variant, "triton" if interpreted else "torch", **variables)


@pytest.mark.parametrize("loader", ["older", "another_name"])
def test_older_loaders_find_the_same_package(variant, loader):
    assert "the same" in run(loader, variant)


def test_a_second_copy_shares_the_operators_of_the_first(variant, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(variant, copy)
    assert "the same" in run("twice", variant, copy)


@pytest.mark.parametrize("kind", ["DEF", "FRAGMENT"])
def test_a_namespace_that_is_taken_is_refused_at_once(variant, kind):
    assert "refused" in run("taken", variant, kind)


def test_another_build_stands_beside_it(variant, tmp_path):
    hub = builder()
    sources, written = hub.sources, hub.build
    hub.sources = lambda: sources() | {"forcing.py": sources()["forcing.py"] + "\n"}
    assert "the same" in run("several", variant, written(tmp_path / "other"))


def test_its_layers_are_forwards_that_run_on_modules_of_other_classes(variant):
    assert "the same" in run("layers", variant)


# ------------------------------------------------------------------------------------------ the loader itself


def test_the_loader_of_hugging_face_takes_it(package):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed: pip install 'trifuse[hub]'")
    assert "the same" in run("loader", package)
