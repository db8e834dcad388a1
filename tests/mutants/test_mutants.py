"""The mutants stay fit: every patch applies, names a promise and a test that exists, and the runner sees survivors."""

from __future__ import annotations

import ast
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from ready_python import run_python


def _load_runner():
    spec = spec_from_file_location("mutant_runner", Path(__file__).with_name("run.py"))
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


runner = _load_runner()
MUTANTS = runner.all_mutants()
NAMESPACE_TEST = "tests/test_layout.py::test_trifuse_is_a_namespace"
NEW_FILE = """--- /dev/null
+++ b/{name}
@@ -0,0 +1 @@
+# a file that was not there
"""


def test_there_are_at_least_twenty():
    assert len(MUTANTS) >= 20
    assert len({mutant.promise for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.patch.stem for mutant in MUTANTS}) == len(MUTANTS)


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((runner.ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.patch.stem)
def test_patch_applies_and_its_test_exists(mutant):
    checked = runner.apply(mutant.patch, runner.ROOT, "--check")
    assert checked.returncode == 0, checked.stderr
    file, _, name = mutant.test.partition("::")
    assert name.partition("[")[0] in functions_of(file)


def test_every_mutant_was_seen_red():
    verdicts = runner.read_verdicts()
    assert {name for name, row in verdicts.items() if row["verdict"] != "red"} == set()
    assert {mutant.patch.stem for mutant in MUTANTS} - verdicts.keys() == set(), "run: make mutants"


def test_verdicts_are_kept_by_mutant(tmp_path):
    row = {"mutant": MUTANTS[0].patch.stem, "verdict": "red", "test": MUTANTS[0].test, "commit": "0123abc"}
    gone = {**row, "mutant": "a_mutant_that_is_no_more"}
    runner.write_verdicts({each["mutant"]: each for each in (row, gone)}, tmp_path / "verdicts.csv")
    assert runner.read_verdicts(tmp_path / "verdicts.csv") == {row["mutant"]: row}
    assert runner.read_verdicts(tmp_path / "none.csv") == {}


@pytest.mark.slow
def test_runner_tells_red_from_survivor(tmp_path):
    """A file at the root named ``__init__.py`` breaks the namespace; one named otherwise changes nothing."""
    outcomes = {}
    for name in ("__init__.py", "harmless.py"):
        patch = tmp_path / f"{name}.patch"
        patch.write_text(NEW_FILE.format(name=name))
        outcomes[name], _ = runner.run_tests([NAMESPACE_TEST], patch)
    assert outcomes == {"__init__.py": runner.RED, "harmless.py": runner.GREEN}


def test_runner_imports_the_copy_and_not_the_original_and_runs_slow_tests(tmp_path):
    patch = tmp_path / "where.patch"
    lines = [
        "@__import__('pytest').mark.slow",
        "def test_where():",
        "    import pathlib, trifuse.kernels, trifuse.blocks, trifuse.architectures as a",
        "    here = {str(pathlib.Path(m.__file__).resolve().parents[1]) for m in (trifuse.kernels, trifuse.blocks, a)}",
        "    assert here == {str(pathlib.Path(__file__).resolve().parents[1])}",
    ]
    head = "--- /dev/null\n+++ b/tests/test_where.py\n@@ -0,0 +1,5 @@\n"
    patch.write_text(head + "".join(f"+{line}\n" for line in lines))
    code, output = runner.run_tests(["tests/test_where.py"], patch)
    assert code == runner.GREEN, output


def test_threads_run_python_side_by_side(tmp_path):
    """Each child ends only when it has seen the other."""
    text = "import pathlib, sys; a, b = map(pathlib.Path, sys.argv[1:]); a.touch()\nwhile not b.exists(): pass"
    with ThreadPoolExecutor(2) as pool:
        names = (("one", "two"), ("two", "one"))
        children = [pool.submit(run_python, "-c", text, *pair, folder=tmp_path, limit_s=60) for pair in names]
        assert [child.result().returncode for child in children] == [0, 0]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (pytest.ExitCode.TESTS_FAILED, "red"),
        (pytest.ExitCode.OK, "survived"),
        (pytest.ExitCode.NO_TESTS_COLLECTED, "broken"),
        (pytest.ExitCode.INTERRUPTED, "broken"),
        (pytest.ExitCode.USAGE_ERROR, "broken"),
        (-1, "broken"),
    ],
)
def test_only_a_failed_test_is_red_and_none_at_all_is_broken(code, word):
    assert runner.verdict_of(code) == word


def test_patch_that_does_not_apply_is_broken(tmp_path):
    patch = tmp_path / "stale.patch"
    patch.write_text("--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-no such line\n+another\n")
    code, output = runner.run_tests([NAMESPACE_TEST], patch)
    assert code not in (runner.GREEN, runner.RED)
    assert "does not apply" in output
