"""The static report: what is committed is of these kernels, keeps their budgets, and says what their docstrings say."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are triton's")

from trifuse.benchmarks.reporting import static_report
from trifuse.benchmarks.reporting.ahead_of_time import TARGETS, Cost, broken_rules, read_budgets
from trifuse.benchmarks.static_cases.case import StaticCase, Traffic
from trifuse.kernels import gpu

MODULES = static_report.case_modules()
COMMITTED = static_report.RESULTS / "kernels.json"
RECORD = json.loads(COMMITTED.read_text(encoding="utf-8"))
AGAIN = "run: make kernels"


def cost_of(record: dict) -> Cost:
    loads = {int(bits): count for bits, count in record["loads"].items()}
    return Cost(**{field.name: record[field.name] for field in dataclasses.fields(Cost)} | {"loads": loads})


# ------------------------------------------------------------------------------------------- what is committed


def test_committed_report_is_of_these_kernels():
    current = [
        (file, case.name, static_report.source_hash(case))
        for file, module in MODULES.items()
        for case in module.STATIC_CASES
    ]
    assert [(row["module"], row["case"], row["source"]) for row in RECORD["kernels"]] == current, AGAIN
    assert all(tuple(row["costs"]) == TARGETS for row in RECORD["kernels"]), AGAIN


def test_committed_costs_keep_the_budgets():
    budgets = read_budgets()
    broken = [
        (row["module"], row["case"], target, rules)
        for row in RECORD["kernels"]
        for target, cost in row["costs"].items()
        if (rules := broken_rules(cost_of(cost), budgets[row["module"], row["case"]], target))
    ]
    assert broken == []


def test_budgets_are_tight():
    """A budget of registers is what was measured, rounded up to a multiple of 8; 255 are all that there are."""
    budgets = read_budgets()
    for row in RECORD["kernels"]:
        budget = budgets[row["module"], row["case"]]
        for target, cost in row["costs"].items():
            assert budget.registers[target] < cost["registers"] + 8, (row["case"], target)
        assert budget.shared_bytes == max(cost["shared_bytes"] for cost in row["costs"].values()), row["case"]


def test_committed_occupancy_and_passes_are_computed_anew():
    for row in RECORD["kernels"]:
        for target, cost in row["costs"].items():
            share = static_report.occupancy(cost["registers"], cost["shared_bytes"], row["threads"], target)
            assert cost["occupancy"] == round(share, 3)
    passes = [static_report.pass_row(file, t) for file, module in MODULES.items() for t in module.TRAFFIC]
    assert RECORD["passes"] == passes, AGAIN


def test_committed_tables_are_those_of_the_report():
    assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == static_report.markdown(RECORD), AGAIN
    assert static_report.markdown(RECORD).count(static_report.LABEL) == 2


@pytest.mark.parametrize("file", MODULES)
def test_docstring_ends_with_the_bytes_and_floors_of_each_pass(file):
    module = MODULES[file]
    kernels = import_module(f"{gpu.__name__}.{file}")
    before, heading, section = kernels.__doc__.partition("Bytes and floors, computed at 4.3 TB/s in bfloat16; nothing")
    assert before.strip()
    assert heading
    lines = [line.removeprefix("* ") for line in section.splitlines() if line.startswith("* ")]
    assert lines == [static_report.pass_line(static_report.pass_row(file, traffic)) for traffic in module.TRAFFIC]


# ------------------------------------------------------------------------------------------- how it is computed


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "threads", "share"),
    [
        ("sm_90", 32, 0, 128, 1.0),
        ("sm_90", 33, 0, 128, 12 * 4 / 64),  # 40 registers are given: 12 warps a partition
        ("sm_90", 255, 0, 128, 8 / 64),
        ("sm_90", 32, 75 << 10, 128, 3 * 4 / 64),  # each program takes one KiB more than it asks for
        ("sm_120", 40, 0, 128, 1.0),
        ("sm_120", 16, 0, 32, 24 / 48),  # programs of one warp: no more than 24
        ("sm_100", 72, 0, 256, 3 * 8 / 64),  # 28 warps, in programs of 8
        ("gfx942", 64, 0, 128, 1.0),
        ("gfx942", 65, 0, 128, 7 * 4 / 32),
        ("gfx942", 512, 0, 128, 4 / 32),
        ("gfx942", 8, 32 << 10, 128, 2 * 2 / 32),
    ],
)
def test_occupancy(target, registers, shared_bytes, threads, share):
    assert static_report.occupancy(registers, shared_bytes, threads, target) == pytest.approx(share)


def test_pass_is_worked_out_by_hand():
    """Ten million elements, of which each takes 4.3 bytes: ten microseconds at 4.3 TB/s."""
    traffic = Traffic("copy", {"B": 10, "M": 10**6, "e": 2}, "B * M", "4.3 + e", "4.3", {"multiply-adds": "6"})
    row = static_report.pass_row("copy", traffic)
    assert (row["floor_us"], row["least_bytes_per_element"]) == (10.0, 4.3)
    assert (row["moved_us"], row["bytes_per_element"]) == (14.65, 6.3)
    assert row["work_us"] == {"multiply-adds": 2.0}
    assert static_report.pass_line(row) == (
        "copy, B=10 M=1000000: 6.30 bytes per element, least 4.30; 14.7 us, floor 10.0 us; multiply-adds 2.0 us"
    )


def _first(x):
    return _second(x)


def _second(x):
    return x + 1


def _altered(x):
    return x + 2


class _Jit:
    """As much of a jit function as the report looks at."""

    def __init__(self, function) -> None:
        self.fn, self.arg_names = function, ["x"]


def test_source_hash_sees_what_is_called_and_what_is_fixed(monkeypatch):
    monkeypatch.setitem(globals(), "_second", _Jit(_second))
    case = StaticCase("one", _Jit(_first), {"x": "i32"}, {"N": 1}, ())
    before = static_report.source_hash(case)
    assert static_report.source_hash(dataclasses.replace(case, name="two")) == before
    for change in ({"constants": {"N": 2}}, {"signature": {"x": "i64"}}, {"aligned": ("x",)}, {"threads": 64}):
        assert static_report.source_hash(dataclasses.replace(case, **change)) != before
    monkeypatch.setitem(globals(), "_second", _Jit(_altered))
    assert static_report.source_hash(case) != before


@pytest.mark.parametrize(
    ("values", "cell"), [((9, 8, 9, 9, 7), "9/8/9/9/7"), ((9, 9, 9, 9, 7), "9/7"), ((9, 9, 9, 9, 9), "9")]
)
def test_cell_is_as_narrow_as_it_can_be(values, cell):
    assert static_report._each(values) == cell


def compiled_again() -> dict:
    rows = [
        {"module": row["module"], "case": row["case"], "target": target, "broken": {}}
        | {"cost": {key: value for key, value in cost.items() if key != "occupancy"}}
        for row in RECORD["kernels"]
        for target, cost in row["costs"].items()
    ]
    return {"rows": rows, "without_a_case": [], "mismatches": []}


def test_report_is_written_and_the_same_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static_report, "_compile_everything", compiled_again)
    monkeypatch.setattr(static_report, "stamp", lambda: RECORD["stamp"])
    assert static_report.main(["--out", str(tmp_path / "new")]) == 0
    assert Path(tmp_path, "new", "kernels.json").read_text() == COMMITTED.read_text()
    written = Path(tmp_path, "new", "kernels.md").read_text()
    assert written in capsys.readouterr().out


def test_report_fails_where_a_rule_is_broken(tmp_path, monkeypatch, capsys):
    compiled = compiled_again()
    compiled["rows"][3]["broken"] = {"spills": "8, at most 0"}
    compiled["mismatches"] = ["no case: gates, forgotten"]
    monkeypatch.setattr(static_report, "_compile_everything", lambda: compiled)
    assert static_report.main(["--out", str(tmp_path)]) == 1
    row = compiled["rows"][3]
    assert capsys.readouterr().err.splitlines() == [
        "no case: gates, forgotten",
        f"{row['module']}, {row['case']} on {row['target']}: spills: 8, at most 0",
    ]
