"""The ahead-of-time gate: every Triton kernel is compiled for GPUs that are not here, and kept within its budget."""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ready_python import SUPPORT, run_with_compiler
from shared_by_workers import folder_of_run, one_at_a_time

from trifuse.benchmarks import static_cases
from trifuse.benchmarks.reporting import static_report
from trifuse.benchmarks.reporting.ahead_of_time import (
    BUDGETED_TRITON,
    BUDGETS,
    TARGETS,
    Budget,
    Cost,
    broken_rules,
    case_modules,
    kernels_of,
    kernels_without_a_case,
    mismatches,
    read_budgets,
    rules_that_hold,
)
from trifuse.benchmarks.static_cases.case import in_form
from trifuse.kernels import gpu
from trifuse.kernels.gpu import tuning

pytest.importorskip("triton", reason="the gate compiles with triton")

CASES = case_modules()


GPU_FILES = {
    name: importlib.import_module(f"{gpu.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(gpu.__path__)
}


def test_every_file_of_kernels_has_its_file_of_cases():
    assert CASES.keys() == {name for name, module in GPU_FILES.items() if kernels_of(module)}
    for file, module in CASES.items():
        assert {case.kernel.fn.__module__ for case in module.STATIC_CASES} == {f"{gpu.__name__}.{file}"}


def compile_ahead_of_time(budgets: Path, *modules: str) -> dict:
    module = "trifuse.benchmarks.reporting.ahead_of_time"
    child = run_with_compiler("-m", module, budgets, *modules, limit_s=1700)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def write_table(path: Path, wanted: set[tuple[str, str, str]]) -> None:
    """Write the table of budgets with the wanted cells of registers alone: what has no budget is not compiled."""
    with BUDGETS.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row |= {target: "" for target in TARGETS if (row["module"], row["case"], target) not in wanted}
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> dict[tuple[str, str, str], dict]:
    """Compile what this run asks for in one child, which all workers of the run wait for and share."""
    asked = [item.callspec.params for item in request.session.items if getattr(item, "originalname", "") == GATE]
    wanted = {(params["file"], params["case"], params["target"]) for params in asked}
    folder = folder_of_run(tmp_path_factory)
    result, table = folder / "ahead_of_time.json", folder / "budgets.csv"
    with one_at_a_time(folder / "ahead_of_time.lock"):
        if not result.exists():
            write_table(table, wanted)
            modules = [CASES[file].__name__ for file in sorted({file for file, _, _ in wanted})]
            result.write_text(json.dumps(compile_ahead_of_time(table, *modules)["rows"]))
    return {(row["module"], row["case"], row["target"]): row for row in json.loads(result.read_text())}


def gate() -> list[Any]:
    """Return the first case of each kernel for every target, and each other case for one of them, in turn.

    The committed report vouches for the rest, with the Triton that it was made with; with another one nothing is left
    out. Slow but for the first case of each kernel for one target per maker.
    """
    found = []
    for file, module in CASES.items():
        seen: set[Any] = set()
        for place, case in enumerate(module.STATIC_CASES):
            first = case.kernel not in seen
            all_targets = first or version("triton") != BUDGETED_TRITON
            for target in TARGETS if all_targets else (TARGETS[place % len(TARGETS)],):
                marks = () if first and target in QUICK_TARGETS else pytest.mark.slow
                found.append(pytest.param(file, case.name, target, marks=marks, id=f"{file}, {case.name}, {target}"))
            seen.add(case.kernel)
    return found


GATE = "test_every_case_keeps_its_budget"
QUICK_TARGETS = ("sm_90", "gfx942")
REPORTED = {
    (row["module"], row["case"], target): cost
    for row in json.loads(static_report.RESULTS.joinpath("kernels.json").read_text(encoding="utf-8"))["kernels"]
    for target, cost in row["costs"].items()
}


@pytest.mark.timeout(1800)  # the first of them compiles all: some minutes, unless Triton's cache has them
@pytest.mark.parametrize(("file", "case", "target"), gate())
def test_every_case_keeps_its_budget(file, case, target, compiled):
    row = compiled[file, case, target]
    assert row["broken"] == {}
    if version("triton") == BUDGETED_TRITON:
        assert REPORTED[file, case, target].items() >= row["cost"].items(), "run: make kernels"


@pytest.mark.parametrize("file", CASES)
def test_every_kernel_has_a_case(file):
    assert kernels_without_a_case(CASES[file]) == []


def test_every_case_has_one_row_in_the_table_and_every_row_a_case():
    budgets = read_budgets()
    assert mismatches(CASES.values(), budgets) == []
    assert {module for module, _ in budgets} == CASES.keys()
    assert [key for key, budget in budgets.items() if set(budget.registers) != set(TARGETS)] == []


def test_the_table_is_in_a_wheel():
    settings = tomllib.loads(Path(__file__).resolve().parents[3].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    shipped = settings["tool"]["setuptools"]["package-data"][static_cases.__name__]
    assert any(BUDGETS.match(pattern) for pattern in shipped)


def test_a_row_too_few_and_one_too_many_are_named(tmp_path):
    file, sound = list(CASES.items())[-1]
    first = sound.STATIC_CASES[0].name
    with BUDGETS.open(newline="") as stream:
        rows = [row for row in csv.reader(stream) if row[1] != first]
    extra = [file, "nobody's", *rows[-1][2:]]
    table = tmp_path / "budgets.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([*rows, extra])
    assert mismatches([sound], read_budgets(table)) == [
        f"no budget: {file}, {first}", f"no case: {file}, nobody's"
    ]  # fmt: skip
    with table.open("a", newline="") as stream:
        csv.writer(stream).writerow(extra)
    with pytest.raises(ValueError, match=r"two rows for .*nobody's"):
        read_budgets(table)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("registers", {"registers": 41}),
        ("spills", {"spills": 1}),
        ("wide loads", {"loads": {128: 1, 64: 9}}),
        ("shuffles", {"shuffles": 6}),
        ("atomics", {"atomics": 1}),
        ("shared bytes", {"shared_bytes": 129}),
    ],
)
def test_budget_is_kept_to_the_last_unit(rule, change):
    budget = Budget({"sm_90": 40, "gfx942": 40}, wide_loads=2, shuffles_nvidia=5, shuffles_amd=5, shared_bytes=128)
    kept = {"registers": 40, "spills": 0, "loads": {256: 1, 128: 1}, "shuffles": 5, "atomics": 0, "shared_bytes": 128}
    for target in budget.registers:
        assert broken_rules(Cost(**kept), budget, target) == {}
        assert set(broken_rules(Cost(**kept | change), budget, target)) == {rule}


def test_budgets_hold_for_the_triton_that_they_were_read_with_and_others_may_not_spill_or_use_atomics():
    constraints = Path(__file__).resolve().parents[3].joinpath("constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={BUDGETED_TRITON}\n" in constraints
    broken = dict.fromkeys(("registers", "spills", "wide loads", "shuffles", "atomics", "shared bytes"), "too many")
    assert rules_that_hold(broken, BUDGETED_TRITON) == broken
    assert set(rules_that_hold(broken, "3.6.0")) == {"spills", "atomics"}


def test_gate_sees_each_broken_rule():
    """A kernel of ``costly_kernels.py`` breaks the rule it is named after, on both makers' GPUs, and no other."""
    compiled = compile_ahead_of_time(SUPPORT / "costly_kernels.csv", "costly_kernels")
    assert compiled["without_a_case"] == ["costly_kernels.forgotten_kernel"]
    assert compiled["mismatches"] == []
    for row in compiled["rows"]:
        rule = row["case"].partition(" on ")[0]
        assert set(row["broken"]) == set(rules_that_hold({rule: ""} if rule != "sound" else {}, version("triton"))), row
    assert {(row["case"].partition(" on ")[0], row["target"]) for row in compiled["rows"]} == {
        (rule, target)
        for rule in ("sound", "wide loads", "registers", "shuffles", "atomics", "spills")
        for target in ("sm_90", "gfx942")
    }


# Kernels that launchers of another file choose.
LAUNCHED_FROM = dict.fromkeys(("dilated_attention_pairs", "dilated_attention_pairs_backward"), "dilated_attention")
# Files whose kernels have one form, whichever launchers choose for those of other files.
OF_ONE_FORM = (
    "batch_norm_activation",
    "batch_norm_activation_backward",
    "depthwise_multi_kernel_wide",
    "residual_layer_norm",
    "residual_layer_norm_backward",
)


@pytest.mark.parametrize("file", [file for file in CASES if file not in OF_ONE_FORM])
def test_every_form_that_warm_up_may_choose_is_compiled(file):
    """In each form at least as many kernels are compiled as there are launchers that have it."""
    launcher_file = LAUNCHED_FROM.get(file, file)
    files = (
        [other for other in LAUNCHED_FROM if LAUNCHED_FROM[other] == launcher_file] if file in LAUNCHED_FROM else [file]
    )
    cases = {(f"{case.name},", case.kernel.fn.__name__) for other in files for case in CASES[other].STATIC_CASES}
    launching = GPU_FILES[launcher_file]
    launchers = [value for value in vars(launching).values() if isinstance(value, tuning.Tunable)]
    forms = Counter(in_form("", form, launcher.choices) for launcher in launchers for form in launcher.choices[1:])
    assert launchers
    for form, launches in forms.items():
        assert len({kernel for name, kernel in cases if f"{form}," in name}) >= launches, form
