"""Pages of the API: what the packages export, each name with the docstring of its module and its own.

The code is read, not imported. The reference of kernels and blocks has a page for each module, that of a network one
page for all.
"""

from __future__ import annotations

from pathlib import Path

import griffe

from trifuse.architectures.runs.registry import NETWORKS

MODULE_BY_MODULE = ("trifuse.kernels", "trifuse.kernels.testing", "trifuse.blocks")
LONGEST_LINE, MOST_NAMES = 88, 2  # of characters; in a title
AS_ONE = tuple(f"trifuse.architectures.{name}" for name in NETWORKS)


def lay_out_packages(root: Path, folder: Path) -> None:
    """Put the packages into one that has the name by which they are imported; the repository has no such folder."""
    package = folder / "trifuse"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()  # else the generator would also read whatever is called trifuse on the path
    for name in ("kernels", "blocks", "architectures"):
        (package / name).symlink_to(root / name, target_is_directory=True)


def pages(packages: Path) -> dict[str, str]:
    """Return the pages of the reference: an overview of each package, then its modules."""
    code = griffe.load("trifuse", search_paths=[packages], allow_inspection=False)
    made = {}
    for name in (*MODULE_BY_MODULE, *AS_ONE):
        package = code[name.removeprefix("trifuse.")]
        modules = exported(package)
        if name in AS_ONE:
            made[f"networks/{package.name}.md"] = whole_page(package, modules)
            continue
        own = modules.pop(package.path, [])
        made[f"{name}/index.md"] = overview(package, own, modules)
        for module, names in modules.items():
            made[f"{name}/{file_of(module)}"] = module_page(package, module, names)
    return made


def exported(package: griffe.Module) -> dict[str, list[str]]:
    """Return the documented names that a package exports, by the module that defines them, in the order of titles."""
    found: dict[str, list[str]] = {}
    for name in map(str, package.exports or []):
        module = defining_module(package, name)
        if package.modules_collection[module][name].docstring:
            found.setdefault(module, []).append(name)
    return dict(sorted(found.items(), key=lambda item: title_of(*item).lower()))


def defining_module(package: griffe.Module, name: str) -> str:
    """Return the path of the module in which an exported name is defined.

    A network resolves its names when they are first used, and imports none: these are looked up in its modules.
    """
    member = package.members.get(name)
    if member is None:
        (module,) = (below for below in package.modules.values() if name in below.members and not below[name].is_alias)
        return module.path
    found = member.final_target if member.is_alias else member
    return found.path if found.is_module else found.path.rpartition(".")[0]  # a module may be called as what it defines


def title_of(module: str, names: list[str]) -> str:
    """Return the title of a module's page: what it defines, if that is little, without the twins of operators."""
    twins = {f"{name}_reference" for name in names}
    titles = [name for name in names if name not in twins]
    return ", ".join(titles) if len(titles) <= MOST_NAMES else module.rpartition(".")[2]


def file_of(module: str) -> str:
    """Return the file of a module's page, in the folder of its package."""
    return f"{module.rpartition('.')[2]}.md"


def overview(package: griffe.Module, own: list[str], modules: dict[str, list[str]]) -> str:
    """Return the page of a package: its docstring, and what it exports with the first sentence of each docstring."""
    rows = []
    for module, names in modules.items():
        for name in names:
            docstring = package.modules_collection[module][name].docstring.value
            summary = " ".join(docstring.partition("\n\n")[0].split())
            rows.append(f"| [`{name}`]({file_of(module)}#{module}.{name}) | {summary} |")
    table = "\n".join(["| name | what it is |", "| --- | --- |", *rows])
    return f"# {package.path}\n\n{table}\n\n{block(package.path, own)}\n"


def module_page(package: griffe.Module, module: str, names: list[str]) -> str:
    """Return the page of a module: how to import its names, its docstring, and theirs."""
    return f"# {title_of(module, names)}\n\n{imports(package, names)}\n\n{block(module, names)}\n"


def whole_page(package: griffe.Module, modules: dict[str, list[str]]) -> str:
    """Return one page for all modules of a package."""
    names = [name for found in modules.values() for name in found]
    blocks = "\n\n".join(block(module, found) for module, found in modules.items())
    return f"# {package.name}\n\n{imports(package, names)}\n\n{blocks}\n"


def imports(package: griffe.Module, names: list[str]) -> str:
    """Return the line that imports some names of a package, as code."""
    line = f"from {package.path} import {', '.join(names)}"
    if len(line) > LONGEST_LINE:
        line = "\n".join([f"from {package.path} import (", *(f"    {name}," for name in names), ")"])
    return f"```python\n{line}\n```"


def block(module: str, names: list[str]) -> str:
    """Return what mkdocstrings replaces by the docstrings of a module and of some of its names."""
    return f"::: {module}\n    options:\n      members: [{', '.join(names)}]"
