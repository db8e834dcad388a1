"""The rules of docs/house.md: where code lives, which way imports run, and what importing costs."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from trifuse import kernels
from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.runs.registry import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "blocks", "architectures")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
OTHERS = ("hub", "website", "tests")
OWN_CODE = [*SOURCES, *BENCHMARKS, *(path for name in OTHERS for path in sorted((ROOT / name).rglob("*.py")))]
LONGEST_FILE, LONGEST_FUNCTION = 400, 80
MOST_ARROWS = 52  # between folders, those from networks aside
MOST_ARROWS_OF_A_NETWORK = 11
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc", "v2"}

# What each folder may import, itself aside. A network's own files are of two kinds, see `MODEL_FILES`.
MAY_IMPORT = {
    "kernels": (),
    "blocks": ("kernels",),
    "architectures/storage": ("kernels",),
    "architectures/data": ("kernels", "architectures/storage"),
    "architectures/training": ("kernels", "blocks", "architectures/storage"),
    "architectures/evaluation": ("kernels", "blocks", "architectures/storage", "architectures/data"),
    "architectures/runs": (
        "kernels",
        "blocks",
        "architectures/storage",
        "architectures/data",
        "architectures/training",
        "architectures/evaluation",
    ),
}
MAY_IMPORT |= {f"architectures/{name}": (*MAY_IMPORT["architectures/runs"], "architectures/runs") for name in NETWORKS}
MAY_IMPORT["architectures/cli"] = tuple(MAY_IMPORT)
MODEL = ("kernels", "blocks", "architectures/storage")  # what a network itself stands on


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("trifuse", *parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (*SOURCES, *BENCHMARKS)}


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file; no garbage is looked for among the nodes of hundreds of them."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def imported_names(path: Path, *, lazily: bool = True) -> Iterator[str]:
    """Yield the absolute name of everything a file imports: when it is itself imported, and inside functions.

    Imports for type checkers alone are left out: nothing happens there.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in _statements(tree_of(path), lazily):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*start, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _statements(node: ast.AST, lazily: bool) -> Iterator[ast.AST]:
    """Yield the nodes that run when a file is imported, and those of functions where asked for."""
    for child in ast.iter_child_nodes(node):
        if not lazily and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child, lazily)


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """Return the files of trifuse that a file imports, lazily or not.

    A name that a package only passes on is counted as an import of the package.
    """
    found = {MODULES[name] for name in imported_names(path) if name in MODULES}
    packages = {name.rpartition(".")[0] for name in imported_names(path) if name in MODULES}
    return frozenset(file for file in found if file != path and module_name(file) not in packages)


def folder_of(path: Path) -> str:
    """Return the folder whose rules hold for a file: that of the package, in architectures the one below it."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[: 2 if parts[0] == "architectures" and len(parts) > 2 else 1])


# --------------------------------------------------------------------------------------- which way imports run


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    folder = folder_of(path)
    allowed = {folder, *MAY_IMPORT.get(folder, ())}
    assert {name for file in imported_files(path) if (name := folder_of(file)) not in allowed} == set()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_itself_knows_nothing_of_runs_and_data(network):
    """The network, and every file of its folder that it imports, can be used without all that trains and judges it."""
    folder = ROOT / "architectures" / network
    waiting, seen = [folder / "model.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        files = imported_files(path)
        assert {folder_of(file) for file in files} <= {*MODEL, f"architectures/{network}"}, path.name
        waiting += [file for file in files - seen if file.parent == folder]


@pytest.mark.parametrize(
    "room", [lambda path: path, lambda path: path.parent, folder_of], ids=("file", "folder", "part")
)
def test_there_is_no_circle(room):
    graph: dict[Path | str, set[Path | str]] = {}
    for path in SOURCES:
        graph.setdefault(room(path), set()).update({room(file) for file in imported_files(path)} - {room(path)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(map(str, error.args[1])))


def test_arrows_between_folders():
    """Every pair of folders, the first of which imports the second, is something to keep in mind."""
    arrows = {(path.parent, file.parent) for path in SOURCES for file in imported_files(path)}
    arrows = {(start, end) for start, end in arrows if start != end}
    networks = [ROOT / "architectures" / name for name in NETWORKS]
    of_networks = [sum(start == folder for start, _ in arrows) for folder in networks]
    assert max(of_networks) <= MOST_ARROWS_OF_A_NETWORK
    assert len(arrows) - sum(of_networks) <= MOST_ARROWS


def test_nothing_imports_the_command():
    command = ROOT / "architectures" / "cli"
    outside = [path for path in (*SOURCES, *BENCHMARKS) if path.parent != command]
    assert [path for path in outside if any(file.parent == command for file in imported_files(path))] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_third_party_imports_stay_where_they_belong(path):
    folder, name = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).as_posix()
    roots = {module.split(".")[0] for module in imported_names(path)}
    if not name.startswith("kernels/gpu/"):
        assert "triton" not in roots
    if not name.startswith("kernels/testing/"):
        assert not roots & {"pytest", "hypothesis"}
    if name != "architectures/data/volumes/nifti.py":
        assert "nibabel" not in roots
    if name != "architectures/dino_unet/backbone_encoder.py":
        assert "transformers" not in roots
    if not name.startswith("architectures/storage/"):
        assert "safetensors" not in roots
    if folder != "kernels":
        assert "xformers" not in roots
    if folder != "architectures":
        assert not roots & {"scipy", "matplotlib", "tensorboard", "numpy"}
    assert not roots & {"benchmarks", "tests"}


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS], ids=module_name)
def test_folders_import_relatively_inside_and_absolutely_across(path):
    """A relative import names a file of the same folder, or below it; an absolute one never does the former."""
    folder = module_name(path.parent / "__init__.py")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, ast.unparse(node)
            assert node.level or (node.module or "").rpartition(".")[0] != folder, ast.unparse(node)


# The one file for each that may use what torch keeps private, and what Triton's documentation does not promise.
INTERNALS = {"torch": ROOT / "kernels/torch_internals.py", "triton": ROOT / "kernels/gpu/triton_internals.py"}
DOCUMENTED_TRITON = {"jit", "language", "testing"}


def internal_names(path: Path) -> set[str]:
    """Return the names of torch with an underscore that a file uses, and those of Triton that are not documented."""
    known, used = {}, set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
            known |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            known |= names
            used |= set(names.values())
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            first, *others = ast.unparse(node).split(".")
            used.add(".".join((known.get(first, ""), *others)))
    return {name for name in used if _is_internal(*name.split("."))}


def _is_internal(package: str, *parts: str) -> bool:
    private = any(part.startswith("_") and not part.endswith("__") for part in parts)
    undocumented = package == "triton" and bool(parts) and parts[0] not in DOCUMENTED_TRITON
    return package in INTERNALS and (private or undocumented)


def test_internals_of_torch_and_triton_stand_in_one_file_each():
    found = {path: internal_names(path) for path in (*SOURCES, *BENCHMARKS)}
    for package, file in INTERNALS.items():
        users = [path for path, names in found.items() if any(name.split(".")[0] == package for name in names)]
        assert users == [file], {path.name: found[path] for path in users}


def test_heavy_packages_load_only_when_used():
    for path in SOURCES:
        roots = {module.split(".")[0] for module in imported_names(path, lazily=False)}
        heavy = roots & {"scipy", "matplotlib", "tensorboard", "xformers", "wfdb", "h5py", "transformers"}
        assert not heavy, f"{module_name(path)} imports {heavy} when it is imported"


# ------------------------------------------------------------------------------------------ one thing, one room


def test_listed_packages_are_the_folders():
    """A package that is missing from the list works in an editable install and is absent from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (*SOURCES, *BENCHMARKS)}
    assert sorted(settings["packages"]) == sorted(module_name(folder / "__init__.py") for folder in folders)
    assert settings["package-dir"] == {f"trifuse.{package}": package for package in (*PACKAGES, "benchmarks")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_trifuse_is_a_namespace():
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "trifuse").exists()


def test_bare_name_is_refused():
    """From the root `import kernels` finds the folder, and would register every operator a second time."""
    child = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 1
    assert "ImportError: this folder is the package 'trifuse.kernels'" in child.stderr


def test_tests_mirror_the_folders():
    mirrored = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    others = {ROOT / "tests", *(ROOT / "tests" / name for name in ("docs", "fuzz", "mutants", "versions"))}
    assert [folder for folder in mirrored - others if not (ROOT / folder.relative_to(ROOT / "tests")).is_dir()] == []


def operator_file(name: str) -> str:
    return getattr(kernels, name).__module__.rpartition(".")[2]


def test_catalogue_is_found():
    assert set(kernels.OPERATORS) >= {"weighted_block_fusion", "memory_efficient_attention"}
    public = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - {"backend", "warm_up"}
    assert public == {*kernels.OPERATORS, *(f"{name}_reference" for name in kernels.OPERATORS)}


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_one_word_finds_every_file_of_an_operator(name):
    stem = operator_file(name)
    needed = [f"kernels/ops/{stem}.py", f"benchmarks/bench_{stem}.py"]
    if any(module.startswith(f"trifuse.kernels.gpu.{stem}") for module in imported_names(ROOT / needed[0])):
        needed += [f"kernels/gpu/{stem}.py", f"benchmarks/static_cases/{stem}.py"]
    assert [file for file in needed if not (ROOT / file).is_file()] == []
    assert list((ROOT / "tests/kernels/ops").glob(f"test_{stem}*.py"))


def test_every_public_file_of_ops_is_an_operator_s():
    files = {path.stem for path in (ROOT / "kernels/ops").glob("[a-z]*.py")}
    assert files == {operator_file(name) for name in kernels.OPERATORS} == set(kernels.OPERATORS.values())


def test_every_gpu_file_belongs_to_an_operator():
    operators = {path.stem.removeprefix("_") for path in (ROOT / "kernels/ops").glob("*.py")}
    files = {
        path.stem.removesuffix("_backward").removesuffix("_wide").removesuffix("_pairs")
        for path in (ROOT / "kernels/gpu").glob("*.py")
    }
    assert files - {"__init__", "lanes", "launching", "logit_rows", "maps", "triton_internals", "tuning"} <= operators


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_reference_is_a_twin(name):
    operator, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    assert inspect.signature(operator) == inspect.signature(reference)
    assert operator.__module__ == reference.__module__


def places_that_spell(name: str, room: Path) -> set[str]:
    """Return the files of architectures, outside a room, that hold a name as a string of its own."""
    elsewhere = [path for path in SOURCES if room not in (path, *path.parents)]
    return {
        path.relative_to(ROOT).as_posix()
        for path in elsewhere
        if path.is_relative_to(ROOT / "architectures")
        and any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree_of(path)))
    }


# nnU-Net names a layout, and also conventions of scores, a loss, an augmentation, and a format of weights
OTHER_THINGS_OF_THAT_NAME = {
    "nnunet": {
        "architectures/cli/evaluate.py",
        "architectures/cli/train.py",
        "architectures/data/samples/augmentation_recipe.py",
        "architectures/evaluation/metrics.py",
        "architectures/evaluation/protocols.py",
        "architectures/plain_unet/decisions.py",
        "architectures/plain_unet/experiment.py",
        "architectures/runs/experiment.py",
        "architectures/runs/nnunet_recipe.py",
        "architectures/runs/recipes.py",
        "architectures/training/losses.py",
    },
}
LAYOUT_LIST = "architectures/data/layouts/__init__.py"
FIRST_PASS = "architectures/taff_unet/first_pass.py"  # trains plain U-Nets to find the wall


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_spelled_in_its_room_and_in_the_list(layout):
    """No other file of architectures holds a layout's name as a string: a layout declares all that depends on it."""
    folder = ROOT / "architectures/data/layouts"
    elsewhere = places_that_spell(layout.name, folder / f"{layout.name}.py")
    assert elsewhere - OTHER_THINGS_OF_THAT_NAME.get(layout.name, set()) == {LAYOUT_LIST}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_spelled_in_its_room_and_in_the_list(name):
    """No other file of architectures holds a network's name as a string: the others reach it through the registry."""
    room = ROOT / "architectures" / name
    assert places_that_spell(name, room) - {FIRST_PASS} == {"architectures/runs/registry.py"}


# ------------------------------------------------------------------------------------------------ house style


def test_names_say_what_is_inside():
    assert [path for path in OWN_CODE if set(path.stem.strip("_").split("_")) & BANNED_NAMES] == []


def test_every_file_is_one_thought():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in OWN_CODE}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_every_function_fits_on_a_screen():
    lengths = {
        (path.relative_to(ROOT).as_posix(), node.name): node.end_lineno - node.lineno + 1
        for path in OWN_CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {where: lines for where, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", OWN_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_path_of_somebody_s_machine(path):
    found = re.findall(
        r"[\"'(= ](/(?:home/(?!someone)|root/|work/|Users/|opt/|tmp/)[\w./-]+)", path.read_text(encoding="utf-8")
    )
    assert found == []


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS], ids=module_name)
def test_every_file_opens_with_its_thought(path):
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(tree_of(path)), "the module has no docstring"
