"""Draw random mutants of the library with cosmic-ray, and find those that no test notices.

The patches beside this file break promises that somebody thought of. These change one operator, number, constant,
condition or decorator anywhere in kernels/, blocks/ and architectures/. The tests run in rings: those that are named
after the file, or by a patch of it; those of the files that import it; those of its top folder; all but the slow ones.
A mutant that outlives them has survived.

    python tests/mutants/random_mutants.py --count 200 --seed 14 --rings 1   # a sieve: the nearest tests alone
    python tests/mutants/random_mutants.py --survivors                       # all rings, for those that passed it

A row tells the commit at which it was run, whose lines it counts. A survivor that changes nothing anybody can see gets
its reason in the last column of random_mutants.csv by hand.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from run import GREEN, ROOT, all_mutants, clean_commit, run_tests, tests_that_fail

LIBRARY = ("kernels", "blocks", "architectures")
TABLE = Path(__file__).with_name("random_mutants.csv")
COLUMNS = ("file", "line", "column", "operator", "occurrence", "verdict", "noticed_by", "commit", "equivalent_because")
NEEDS_NAMES = ("core/VariableInserter", "core/VariableReplacer")  # operators that are told what to replace
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Place:
    """One change that an operator can make in a file, counted from 0 among those that it can make there."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int


def places(path: Path) -> list[Place]:
    """Return the changes that can be made in a file, but for those in annotations."""
    from cosmic_ray.ast import get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text(encoding="utf-8")
    tree, skipped = get_ast(source), _annotations(source)
    return [
        Place(path.relative_to(ROOT).as_posix(), line, column, name, occurrence)
        for name in operator_names()
        if name not in NEEDS_NAMES
        for occurrence, (line, column) in enumerate(_spots(tree, get_operator(name)()))
        if not any(first <= (line, column) < last for first, last in skipped)
    ]


def _spots(node: Any, operator: Any) -> Iterator[tuple[int, int]]:
    """Yield where an operator can act, in the order in which cosmic-ray counts."""
    for start, _ in operator.mutation_positions(node):
        yield start
    for child in getattr(node, "children", ()):
        yield from _spots(child, operator)


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    nodes = []
    for node in ast.walk(ast.parse(source)):
        nodes += [getattr(node, name, None) for name in ("annotation", "returns")]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if isinstance(n, ast.AST)]


def draw(count: int, seed: int, files: Iterable[Path] | None = None) -> list[Place]:
    """Draw places evenly, in the library or in some files, and one of the changes that can be made at each.

    A change that is no Python is passed over: any test would notice it.
    """
    by_spot: dict[tuple[str, int, int], list[Place]] = {}
    for path in files or [path for folder in LIBRARY for path in sorted((ROOT / folder).rglob("*.py"))]:
        for place in places(path):
            by_spot.setdefault((place.file, place.line, place.column), []).append(place)
    generator, drawn = random.Random(seed), []
    for spot in generator.sample(sorted(by_spot), len(by_spot)):
        place = generator.choice(by_spot[spot])
        if len(drawn) < count and _is_python(changed(place)):
            drawn.append(place)
    return drawn


def _is_python(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def changed(place: Place) -> str:
    """Return the text of the file with the change.

    Raises:
        ValueError: the file is another than the one that the place was drawn from.
    """
    from cosmic_ray.ast import get_ast
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    source, operator = (ROOT / place.file).read_text(encoding="utf-8"), get_operator(place.operator)()
    if (place.line, place.column) not in list(_spots(get_ast(source), operator))[place.occurrence :][:1]:
        raise ValueError(f"no such change: {place}; the file is another than the one that was drawn from")
    return MutationVisitor.mutate_code(source, operator, place.occurrence)


def patch_of(place: Place) -> str:
    """Return the change as a patch."""
    texts = ((ROOT / place.file).read_text(encoding="utf-8"), changed(place))
    lines = (text.splitlines(keepends=True) for text in texts)
    return "".join(difflib.unified_diff(*lines, f"a/{place.file}", f"b/{place.file}"))


@cache
def _imports(*folders: str) -> dict[str, frozenset[str]]:
    """Return the Python files of folders, each with the modules that it imports from, as it spells them."""
    imports = re.compile(r"^\s*from (\S+) import", re.MULTILINE)
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): frozenset(imports.findall(path.read_text(encoding="utf-8")))
        for path in paths
    }


@cache
def _tests() -> dict[str, frozenset[str]]:
    return {file: names for file, names in _imports("tests").items() if Path(file).name.startswith("test_")}


@cache
def _tests_of_patches() -> dict[str, list[str]]:
    """Return the tests that patches name, by the file that they change."""
    tests: dict[str, list[str]] = {}
    for mutant in all_mutants():
        for file in re.findall(r"^--- a/(\S+)$", mutant.patch.read_text(encoding="utf-8"), re.MULTILINE):
            tests.setdefault(file, []).append(mutant.test)
    return tests


def _named_after(file: str) -> list[str]:
    """Return the test files with the name of a file in the library: of its folder if there are any, else of its top."""
    stem, folder = f"test_{Path(file).stem.strip('_')}", f"tests/{Path(file).parent}"
    tests = [test for test in _tests() if Path(test).parts[1] == Path(file).parts[0]]
    same = [test for test in tests if f"{Path(test).stem}_".startswith(f"{stem}_")]
    same = same or [test for test in tests if stem.startswith(f"{Path(test).stem}_")]
    return [test for test in same if Path(test).parent.as_posix() == folder] or same


def rings(file: str) -> list[list[str]]:
    """Return the tests of a file in the library, nearest first: see the head of this file."""
    path = Path(file)
    nearest = [*dict.fromkeys(_tests_of_patches().get(file, [])), *_named_after(file)]
    sibling, other = f".{path.stem}", f".{path.parent.name}.{path.stem}"
    further = [test for test, names in _tests().items() if any(name.endswith(other) for name in names)]
    for library_file, names in _imports(*LIBRARY).items():
        beside = Path(library_file).parent == path.parent and sibling in names
        if beside or any(name.endswith(other) for name in names):
            further += _named_after(library_file)
    further = [test for test in dict.fromkeys(further) if test not in nearest]
    return [ring for ring in (nearest, further, [f"tests/{path.parts[0]}"], ["tests"]) if ring]


def outcome(place: Place, tests_by_ring: list[list[str]]) -> tuple[str, str]:
    """Run the rings; returns the verdict and the test that noticed."""
    with tempfile.NamedTemporaryFile("w", suffix=".patch", encoding="utf-8") as patch:
        patch.write(patch_of(place))
        patch.flush()
        for tests in tests_by_ring:
            code, output = run_tests(["-m", "not slow", *tests], Path(patch.name))
            if code not in (GREEN, NO_TESTS):
                first = next((line for line in output.splitlines() if line.startswith(("FAILED", "ERROR "))), "")
                return "noticed", first.split(" - ")[0].partition(" ")[2]
    return "survived", ""


def read_table(path: Path = TABLE) -> list[dict[str, str]]:
    """Read the rows that were written before."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_table(rows: list[dict[str, str]], path: Path = TABLE) -> None:
    """Write the rows."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="count random mutants that no test notices")
    parser.add_argument("--count", type=int, default=200, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rings", type=int, help="how many rings of tests to run; all of them if absent")
    parser.add_argument("--survivors", action="store_true", help="draw none; run those that survived so far again")
    options = parser.parse_args()
    if not (commit := clean_commit(TABLE)):
        parser.error("there are uncommitted changes: a verdict belongs to a commit")
    if options.survivors:
        rows = read_table()
    else:
        drawn = draw(options.count, options.seed)
        rows = [dict.fromkeys(COLUMNS, "") | {**vars(place), "verdict": "survived"} for place in drawn]
    run = [row for row in rows if row["verdict"] == "survived" and not row["equivalent_because"]]
    for row in run:
        place = Place(row["file"], int(row["line"]), int(row["column"]), row["operator"], int(row["occurrence"]))
        row["verdict"], row["noticed_by"] = outcome(place, rings(place.file)[: options.rings])
        row["commit"] = commit
        print(f"{row['verdict']:9} {place.file}:{place.line} {place.operator} {row['noticed_by']}", flush=True)
        if row["verdict"] == "survived":
            print(patch_of(place), flush=True)
        write_table(rows)
    failing = tests_that_fail((row["noticed_by"] for row in run if row["noticed_by"]), jobs=1)
    for row in run:
        if row["noticed_by"].partition("[")[0] in failing:  # it fails without the mutant too
            row["verdict"], row["noticed_by"] = "survived", ""
    write_table(rows)
    alive = [row for row in rows if row["verdict"] == "survived" and not row["equivalent_because"]]
    print(f"{len(alive)} of {len(rows)} mutants survived")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
