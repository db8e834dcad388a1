"""Which lines only run with a GPU, read from the code itself: a list that cannot go stale.

    python tests/rehearsal/gpu_only_lines.py    # the list, file by file

A line is on the list

* where a condition says so: on the side of ``device.type == "cuda"``, ``on_gpu``, ``torch.cuda.is_available()`` and
  their like on which there is a GPU, also after an early return;
* where it belongs to a function that is called from such lines alone.

Kernels are left out: they are compiled, no line of them runs as Python. So is the emulator, which takes the place of a
GPU's driver where there is none.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "blocks", "architectures", "benchmarks")
EMULATOR = ROOT / "kernels" / "testing" / "emulator"
# Names that hold a fact about GPUs, and questions to PyTorch.
GPU_NAMES = {"on_gpu", "gpu", "gpus"}
GPU_CALLS = {"is_available", "is_current_stream_capturing", "device_count"}
LEAVES = ast.Return | ast.Raise | ast.Continue | ast.Break


def says_gpu(test: ast.expr) -> bool | None:
    """Return what a true condition says: that there is a GPU, that there is none, or nothing (None)."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            said = says_gpu(operand)
            return None if said is None else not said
        case ast.BoolOp(values=values):
            said = {says_gpu(value) for value in values} - {None}
            decisive = isinstance(test.op, ast.And)  # all hold, or, if it is false, none
            return decisive if decisive in said else None
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[ast.Constant(value=word)]):
            if word in ("cuda", "cpu"):
                return (word == "cuda") == isinstance(op, ast.Eq)
            return isinstance(op, ast.NotEq) if word == 0 and says_gpu(left) else None
        case ast.Name(id=name):
            return True if name in GPU_NAMES else None
        case ast.Call(func=ast.Attribute(attr=name)):
            return True if name in GPU_CALLS else None
    return None


def said_if_false(test: ast.expr) -> bool | None:
    """Return what a false condition says."""
    if isinstance(test, ast.BoolOp):
        said = {said_if_false(value) for value in test.values} - {None}
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in said else None
    said = says_gpu(test)
    return None if said is None else not said


class Reader(ast.NodeVisitor):
    """Walks one file: its GPU-only nodes, its functions, and where names are used."""

    def __init__(self) -> None:
        self.only_gpu = False
        self.inside: list[ast.FunctionDef] = []
        self.marked: set[ast.AST] = set()
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.uses: list[tuple[str, bool, tuple[ast.FunctionDef, ...]]] = []

    def within(self, only_gpu: bool | None, nodes: list[ast.AST]) -> None:
        before, self.only_gpu = self.only_gpu, self.only_gpu or only_gpu is True
        for node in nodes:
            self.visit(node)
        self.only_gpu = before

    def visit(self, node: ast.AST) -> None:
        if self.only_gpu:
            self.marked.add(node)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = node.id if isinstance(node, ast.Name) else node.attr
            self.uses.append((name, self.only_gpu, tuple(self.inside)))
        super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value)
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)

    def block(self, statements: list[ast.stmt]) -> None:
        """Visit statements in order: after one that leaves where there is no GPU, there is one."""
        before = self.only_gpu
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], LEAVES) and not statement.orelse:
                self.only_gpu = self.only_gpu or said_if_false(statement.test) is True
        self.only_gpu = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return
        self.functions[node.name].append(node)
        self.inside.append(node)
        self.generic_visit(node)
        self.inside.pop()

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before, self.only_gpu = self.only_gpu, self.only_gpu or says_gpu(node.test) is True
        self.block(node.body)
        self.only_gpu = before or said_if_false(node.test) is True
        self.block(node.orelse)
        self.only_gpu = before

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.within(says_gpu(node.test), [node.body])
        self.within(said_if_false(node.test), [node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        known = False
        for value in node.values:
            self.within(known, [value])
            known = known or (says_gpu if isinstance(node.op, ast.And) else said_if_false)(value) is True

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        over_gpus = any(re.search("gpus|device_count", ast.unparse(part.iter)) for part in node.generators)
        self.within(over_gpus, [node.elt])
        for part in node.generators:
            self.visit(part)

    visit_GeneratorExp = visit_ListComp


def read() -> dict[Path, Reader]:
    """Read all files."""
    readers = {}
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(path for path in paths if not path.is_relative_to(EMULATOR)):
        readers[path] = Reader()
        readers[path].visit(ast.parse(path.read_text(encoding="utf-8")))
    return readers


def gpu_only_functions(readers: dict[Path, Reader]) -> set[ast.FunctionDef]:
    """Return the functions that only GPU-only lines name."""
    used = defaultdict(list)
    for path, reader in readers.items():
        for name, only_gpu, inside in reader.uses:
            used[_known_as(name, path)].append((only_gpu, inside))
    found: set[ast.FunctionDef] = set()
    while True:
        more = {
            node
            for path, reader in readers.items()
            for name, nodes in reader.functions.items()
            for node in nodes
            if node not in found
            and any(node not in inside for _, inside in used[_known_as(name, path)])
            and all(
                only_gpu or found & set(inside) or node in inside for only_gpu, inside in used[_known_as(name, path)]
            )
        }
        if not more:
            return found
        found |= more


def _known_as(name: str, path: Path) -> tuple[str, Path | None]:
    """Return a name with the file that it is private to."""
    return name, path if name.startswith("_") else None


def _lines_of(nodes: set[ast.AST]) -> set[int]:
    return {node.lineno for node in nodes if isinstance(node, ast.stmt | ast.expr)}


def _lines_with_code(code: CodeType) -> Iterator[int]:
    yield from (line for _, _, line in code.co_lines() if line)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines_with_code(constant)


def gpu_only_lines() -> dict[Path, list[int]]:
    """Return the numbers of the lines of each file that has any."""
    readers = read()
    functions = gpu_only_functions(readers)
    listed = {}
    for path, reader in readers.items():
        nodes = set(reader.marked)
        for node in functions & {node for nodes in reader.functions.values() for node in nodes}:
            nodes |= {part for statement in node.body for part in ast.walk(statement)}
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
        if lines := sorted(_lines_of(nodes) & set(_lines_with_code(code))):
            listed[path] = lines
    return listed


if __name__ == "__main__":
    for path, lines in gpu_only_lines().items():
        text = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            print(f"{path.relative_to(ROOT)}:{line}: {text[line - 1].strip()}")
