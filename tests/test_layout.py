"""The rules of the house: where code lives, which way imports run, and what importing costs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trifuse import kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "blocks", "architectures")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OWN_CODE = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
LONGEST_FILE = 400
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc", "v2"}
PARTS = ("data", "training", "evaluation")
# What every part of architectures stands on; the other files beside them belong to the command and may join everything.
FOUNDATIONS = tuple(
    f"trifuse.architectures.{name}"
    for name in ("files", "run_log", "spelling", "weights_file", "config_json", "pretrained", "published_weights")
)
COMMAND_FILES = tuple(
    name
    for path in (ROOT / "architectures").glob("*.py")
    if (name := f"trifuse.architectures.{path.stem}") not in FOUNDATIONS
)
# the only files of a network that know data and training
ASSEMBLIES = {"train.py", "pretrain.py", "first_pass.py", "inputs.py", "report.py", "demo.py", "ablate.py"}
SHARED_BY_KERNELS = {"__init__", "gates", "launching", "static_case", "tuning"}
LAZY = {"triton", "xformers", "scipy", "matplotlib", "nibabel", "wfdb", "h5py"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("trifuse", *parts)).removesuffix(".__init__")


def imported_modules(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Yield the absolute name of everything a file imports, or of what it imports when it is itself imported."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _statements(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*start, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run at import: no function bodies, no blocks for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def allowed_parts(path: Path) -> tuple[str, ...]:
    """Return the prefixes of `trifuse` that a file may import."""
    folder, *rest = path.relative_to(ROOT).parts
    if folder == "kernels":
        return ("trifuse.kernels",)
    if folder == "blocks":
        return ("trifuse.kernels", "trifuse.blocks")
    shared = ("trifuse.kernels", "trifuse.blocks", *FOUNDATIONS)
    if len(rest) == 1:
        return shared if module_name(path) in FOUNDATIONS else ("trifuse",)
    part = rest[0]
    own = f"trifuse.architectures.{part}"
    if part in PARTS:
        return (*shared, own, *(("trifuse.architectures.data",) if part == "evaluation" else ()))
    if rest[1] in ASSEMBLIES:
        return (*shared, own, *(f"trifuse.architectures.{name}" for name in PARTS), *COMMAND_FILES)
    return (*shared, own)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    allowed = allowed_parts(path)
    wrong = [
        name
        for name in imported_modules(path)
        if name.split(".")[0] == "trifuse"
        and name not in ("trifuse", *(part.rpartition(".")[0] for part in allowed))
        and not any(name == part or name.startswith(f"{part}.") for part in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_third_party_imports_stay_where_they_belong(path):
    folder, name = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).as_posix()
    roots = {module.split(".")[0] for module in imported_modules(path)}
    if not name.startswith("kernels/gpu/"):
        assert "triton" not in roots
    if name not in ("kernels/testing/__init__.py", "kernels/testing/comparing.py"):
        assert not roots & {"pytest", "hypothesis"}
    if name != "architectures/data/volumes/nifti.py":
        assert "nibabel" not in roots
    if folder != "kernels":
        assert "xformers" not in roots
    if folder != "architectures":
        assert not roots & {"scipy", "matplotlib", "tensorboard", "safetensors", "numpy"}
    assert not roots & {"benchmarks", "tests"}
    assert not [module for module in imported_modules(path) if module.startswith("trifuse.benchmarks")]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_folders_import_relatively_inside_and_absolutely_across(path):
    """A relative import never leaves kernels, blocks or architectures; an absolute one never stays in its folder."""
    folder = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level < len(folder), ast.unparse(node)
            assert node.level or node.module != ".".join(folder), ast.unparse(node)


def test_heavy_packages_load_only_when_used():
    for path in SOURCES:
        roots = {module.split(".")[0] for module in imported_modules(path, top_level=True)}
        heavy = roots & {"scipy", "matplotlib", "tensorboard", "xformers", "wfdb", "h5py"}
        assert not heavy, f"{module_name(path)} imports {heavy} when it is imported"


def test_listed_packages_are_the_folders():
    """A package that is missing from the list works in an editable install and is absent from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = [*SOURCES, ROOT / "benchmarks" / "__init__.py"]
    assert sorted(settings["packages"]) == sorted({module_name(path.parent / "__init__.py") for path in shipped})
    assert settings["package-dir"] == {f"trifuse.{package}": package for package in (*PACKAGES, "benchmarks")}
    assert [folder for path in SOURCES if not ((folder := path.parent) / "__init__.py").exists()] == []


def test_trifuse_is_a_namespace():
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "trifuse").exists()


def test_bare_name_is_refused():
    """From the root `import kernels` finds the folder, and would register every operator a second time."""
    child = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 1
    assert "ImportError: this folder is the package 'trifuse.kernels'" in child.stderr


def operator_file(name: str) -> str:
    return getattr(kernels, name).__module__.rpartition(".")[2]


def test_catalogue_is_found():
    assert set(kernels.OPERATORS) >= {"weighted_block_fusion", "memory_efficient_attention"}
    public = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - {"backend", "warm_up"}
    assert public == {*kernels.OPERATORS, *(f"{name}_reference" for name in kernels.OPERATORS)}


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_one_word_finds_every_file_of_an_operator(name):
    stem = operator_file(name)
    source = ROOT / "kernels" / f"{stem}.py"
    needed = [source, ROOT / "tests/kernels" / f"test_{stem}.py", ROOT / "benchmarks" / f"bench_{stem}.py"]
    if any(module.startswith("trifuse.kernels.gpu") for module in imported_modules(source)):
        needed.append(ROOT / "kernels/gpu" / f"{stem}.py")
    assert [path.relative_to(ROOT).as_posix() for path in needed if not path.is_file()] == []


def test_every_gpu_file_belongs_to_an_operator():
    files = {path.stem for path in (ROOT / "kernels/gpu").glob("*.py")} - SHARED_BY_KERNELS
    assert files <= {operator_file(name) for name in kernels.OPERATORS}


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_reference_is_a_twin(name):
    operator, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    assert inspect.signature(operator) == inspect.signature(reference)
    assert operator.__module__ == reference.__module__


# ------------------------------------------------------------------------------------- what importing costs


def modules_loaded_by(code: str, **environment: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}, **environment},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return {name.split(".")[0] for name in child.stdout.rpartition("LOADED ")[2].split()}


def test_importing_kernels_loads_nothing_heavy():
    assert modules_loaded_by("import trifuse.kernels") & LAZY == set()
    assert modules_loaded_by("from trifuse.kernels import *") & LAZY == set()


CPU_CALLS = {
    "channel_gate": "torch.ones(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 3)",
    "depthwise_multi_kernel": "torch.ones(1, 3, 8, 8, requires_grad=True), torch.ones(2, 3, 1, 5, 5).unbind()",
    "dice_ce_loss": "torch.zeros(1, 3, 4, 4, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.int64)",
    "dilated_attention": "*torch.ones(3, 1, 4, 4, 24, requires_grad=True), num_heads=3",
    "dilated_attention_weights": "*torch.ones(2, 1, 4, 4, 24, requires_grad=True), num_heads=3",
    "memory_efficient_attention": "*torch.ones(3, 1, 4, 2, 8, requires_grad=True)",
    "monte_carlo_pool": "torch.ones(1, 3, 4, 4, requires_grad=True), scale=2, cell=1",
    "mutation_loss": "[torch.zeros(1, 3, 4, 4, requires_grad=True)] * 2, torch.ones(1, 8, 8, dtype=torch.int64)",
    "spatial_gate": "torch.ones(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 1, 4, 4)",
    "temporal_film_gate": (
        "torch.ones(1, 3, 4, 4, requires_grad=True), torch.ones(1, 3), torch.ones(1, 2), *torch.zeros(2, 1, 3)"
    ),
    "upsample_argmax": "[torch.ones(1, 3, 4, 4)], (8, 8)",
    "weighted_block_fusion": "[torch.ones(1, 2, 4, requires_grad=True) for _ in range(3)], torch.zeros(3)",
}


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_operators_on_a_cpu_load_no_triton(name):
    code = f"import torch\nfrom trifuse.kernels import {name}\nout = {name}({CPU_CALLS[name]})\n"
    code += "if out.requires_grad:\n    out.sum().backward()"
    assert modules_loaded_by(code) & LAZY == set()


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_l12_command_answers_without_torch(option):
    """The code is asked for its import times: what a machine under load does to the clock does not count as import."""
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from trifuse.architectures.cli.main import main\n"
        f"sys.argv = ['trifuse', {option!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert time.process_time() - start < 0.3, time.process_time() - start"
    )
    assert modules_loaded_by(code) & {"torch", "numpy", *LAZY} == set()


# ------------------------------------------------------------------------------------------------ house style


def test_names_say_what_is_inside():
    assert [path for path in OWN_CODE if set(path.stem.strip("_").split("_")) & BANNED_NAMES] == []


def test_every_file_is_one_thought():
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


@pytest.mark.parametrize("path", OWN_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_path_of_somebody_s_machine(path):
    found = re.findall(
        r"[\"'(= ](/(?:home/(?!someone)|root/|work/|Users/|opt/|tmp/)[\w./-]+)", path.read_text(encoding="utf-8")
    )
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_file_opens_with_its_thought(path):
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "the module has no docstring"
