"""Issue time: what is committed is of these networks and kernels, breaks no rule, and is computed as it says."""

from __future__ import annotations

import importlib
import json
import pkgutil
from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are triton's")

from trifuse.benchmarks.reporting import issue_time
from trifuse.benchmarks.reporting.ahead_of_time import TARGETS, kernels_of
from trifuse.benchmarks.reporting.issue_goals import GOALS, LAUNCHES, Goal, goal_lines, goal_rows
from trifuse.benchmarks.reporting.network_calls import STEPS, Call, Dense, trace
from trifuse.benchmarks.reporting.static_report import kernel_hash
from trifuse.kernels import gpu

COMMITTED = issue_time.RESULTS / "issue_time.json"
RECORD = json.loads(COMMITTED.read_text(encoding="utf-8"))
NETWORKS = {network["network"]: network for network in RECORD["networks"]}
AGAIN = "run: make kernels"


@cache
def all_kernels() -> dict:
    found = {}
    for _, name, _ in pkgutil.iter_modules(gpu.__path__):
        found |= kernels_of(importlib.import_module(f"{gpu.__name__}.{name}"))
    return found


# ------------------------------------------------------------------------------------------- what is committed


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != RECORD["stamp"]["torch"].partition("+")[0],
    reason="which operations a step is made of depends on the version of torch",
)
@pytest.mark.parametrize("name", STEPS)
def test_committed_calls_are_those_of_the_network(name):
    step = trace(name)
    current = {
        (call.operator, tuple(issue_time.described(call.arguments)), times, round(issue_time.floor_us(call), 2))
        for call, times in step.calls.items()
    }
    assert NETWORKS[name]["gigabytes"] == issue_time.gigabytes_of(step), AGAIN
    rows = NETWORKS[name]["calls"]
    assert {(r["operator"], tuple(r["arguments"]), r["times"], r["floor_us"]) for r in rows} == current, AGAIN
    assert NETWORKS[name]["batch"] == STEPS[name].batch


def test_committed_issue_times_are_those_of_their_launches():
    for network in NETWORKS.values():
        for row in network["calls"]:
            assert row["launches"], row["operator"]
            assert row["issue_us"] == round(sum(map(issue_time.issue_us, row["launches"])), 2)


def test_committed_goals_are_of_the_committed_calls():
    assert RECORD["goals"] == goal_rows(RECORD["networks"]), AGAIN


def test_committed_forms_are_of_these_kernels_and_break_no_rule():
    launched = {row["kernel"] for network in NETWORKS.values() for call in network["calls"] for row in call["launches"]}
    assert {form["kernel"] for form in RECORD["forms"]} == launched
    for form in RECORD["forms"]:
        assert form["source"] == kernel_hash(all_kernels()[form["kernel"]]), (form["kernel"], AGAIN)
        assert tuple(form["costs"]) == TARGETS
    assert issue_time.faults_of(RECORD) == []


def test_committed_tables_are_those_of_the_report():
    assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == issue_time.markdown(RECORD), AGAIN


# --------------------------------------------------------------------------------------------- how it is computed


def test_issue_time_is_instructions_over_the_rate():
    launch = {"programs": 1000, "warps": 4, "executed": 224.4}
    assert issue_time.issue_us(launch) == pytest.approx(1000 * 4 * 224.4 / (132 * 4 * 1700), rel=1e-12)


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Dense:
    return Dense.of(torch.empty(shape, dtype=dtype, device="meta"))


DRAWN = (dense(dtype=torch.int64), dense(dtype=torch.int64), dense(16, dtype=torch.int64))


def pool_call(*draw: object) -> Call:
    return Call("monte_carlo_pool", (dense(2, 8, 4, 4), 1, 0, *draw), dense(2, 8))


def test_the_floor_of_a_drawn_pool_reads_the_cell_alone():
    whole = pool_call(None, None, None)
    assert issue_time.floor_us(whole) == pytest.approx(1e6 * (512 + 32) / issue_time.BYTES_PER_SECOND)
    drawn = pool_call(*DRAWN)
    assert issue_time.floor_us(drawn) == pytest.approx(1e6 * (128 + 32 + 18 * 8) / issue_time.BYTES_PER_SECOND)


def test_a_drawn_pool_is_given_a_draw():
    x, *_, scale, cell, permutation = issue_time.arguments_of(pool_call(*DRAWN))
    assert (scale.item(), cell.item(), permutation.tolist()) == (2, 1, list(range(16)))
    assert (x.shape, x.dtype, x.any().item()) == ((2, 8, 4, 4), torch.bfloat16, False)


def test_lists_of_tensors_stay_lists():
    (features, _) = issue_time.arguments_of(Call("fusion", ((dense(2, 3), dense(2, 3)), dense(2)), dense(2, 3)))
    assert [tuple(x.shape) for x in features] == [(2, 3), (2, 3)]


def test_arguments_are_told_by_shape_type_and_layout():
    last = Dense((2, 8, 4, 4), (128, 1, 32, 8), torch.bfloat16)
    strided = Dense((2, 8), (9, 1), torch.float32)
    arguments = (last, (dense(2, 3), dense(2, 3)), (dense(1), strided), strided, 3, None)
    assert issue_time.described(arguments) == [
        "(2, 8, 4, 4) bfloat16 channels last",
        "2 x (2, 3) bfloat16",
        "(1,) bfloat16 + (2, 8) float32 strides (9, 1)",
        "(2, 8) float32 strides (9, 1)",
        "3",
        "None",
    ]


def test_the_map_of_a_call_is_its_largest_of_floats():
    call = Call("loss", (dense(2, 3), dense(2, 8, 4, 4), dense(2, 4, 4, dtype=torch.int64)), dense(2))
    assert issue_time.call_row(call, 1, [])["map"] == "(2, 8, 4, 4) bfloat16"


def test_a_form_that_spills_or_is_atomic_is_a_fault():
    cost = {"spills": 0, "atomics": 0}
    costs = {"sm_80": cost, "sm_90": {**cost, "spills": 13}, "gfx942": {**cost, "atomics": 1}}
    record = {"goals": [], "forms": [{"kernel": "some_kernel", "constants": {"K": 4}, "costs": costs}]}
    assert issue_time.faults_of(record) == [
        "some_kernel on sm_90: spills: 13, at most 0, where {'K': 4}",
        "some_kernel on gfx942: atomics: 1, at most 0, where {'K': 4}",
    ]


def test_a_missed_goal_is_a_fault():
    goals = [{"what": "forward", "unit": "us", "most": 4, "found": found} for found in (4, 4.01)]
    assert issue_time.faults_of({"forms": [], "goals": goals}) == ["forward: 4.01 us, at most 4"]


# ---------------------------------------------------------------------------------------------------- budgets


def record_of(issue_us: float = 10.0, launches: int = 2, registers: int = 40) -> dict:
    call = {
        "operator": "gate", "arguments": ["(2, 3) bfloat16", "None"], "map": "(2, 3) bfloat16", "times": 1,
        "floor_us": 2.0, "issue_us": issue_us, "launches": [{}] * launches,
    }  # fmt: skip
    costs = {target: {"registers": 24, "spills": 0, "atomics": 0} for target in TARGETS}
    costs["sm_80"]["registers"] = registers
    form = {"kernel": "gate_kernel", "types": {}, "constants": {"K": 4}, "aligned": [], "threads": 128, "costs": costs}
    network = {"network": "net", "batch": 2, "gigabytes": 1.0, "calls": [call]}
    return {"stamp": RECORD["stamp"], "label": "", "goals": [], "networks": [network], "forms": [form]}


CALL = "net: gate((2, 3) bfloat16, None)"
FORM = 'gate_kernel where {"types": {}, "constants": {"K": 4}, "aligned": [], "threads": 128}'


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"issue_us": 10.2, "registers": 40}, []),
        ({"issue_us": 5.0, "launches": 1, "registers": 33}, []),
        ({"issue_us": 10.21}, [f"{CALL}: 10.21 us to issue, 10.0 before"]),
        ({"launches": 3}, [f"{CALL}: 3 launches, 2 before"]),
        ({"registers": 41}, [f"{FORM} on sm_80: 41 registers, 40 before"]),
    ],
)
def test_what_costs_more_than_before_is_told_and_not_written_unless_accepted(tmp_path, now, told):
    path = tmp_path / "issue_time.json"
    assert issue_time.kept(record_of(), path, accept=False) == []
    before, record = path.read_text(), record_of(**now)
    remedy = [f"{path} is left as it was; to write the new figures, add --accept"] if told else []
    assert issue_time.kept(record, path, accept=False) == told + remedy
    assert (path.read_text() == before) == bool(told)
    assert issue_time.kept(record, path, accept=True) == []
    assert json.loads(path.read_text()) == record
    assert path.with_suffix(".md").read_text() == issue_time.markdown(record)


def test_other_calls_and_forms_have_no_budget_yet():
    other = record_of(issue_us=99.0, registers=255)
    other["networks"][0]["calls"][0]["arguments"] = ["(2, 4) bfloat16", "None"]
    other["forms"][0]["threads"] = 256
    assert issue_time.dearer(other, record_of()) == []


def test_totals_count_every_call_as_often_as_it_is_made():
    launch = {"programs": 1, "warps": 1, "executed": 1.0}
    row = {"operator": "gate", "map": "(2, 3)", "times": 3, "floor_us": 2.0, "issue_us": 1.5, "launches": [launch] * 2}
    *_, line, total = issue_time._network_lines([row])
    assert line == "| `gate` | (2, 3) | 3 | 2 | 2.0 | 1.5 | bytes |"
    assert total == "| all |  | 3 | 6 | 6.0 | 4.5 |  |"


# -------------------------------------------------------------------------------------------------------- goals


def network_of(*calls: tuple[str, str, float, int]) -> dict:
    names = ("operator", "map", "issue_us", "launches")
    return {"network": "net", "calls": [dict(zip(names, (*call[:3], [{}] * call[3]), strict=True)) for call in calls]}


def test_a_goal_adds_up_the_calls_that_it_names_and_no_others():
    network = network_of(("gate", "(2, 72)", 1.25, 1), ("gate", "(2, 8)", 4, 1), ("gate_backward", "(2, 72)", 2.5, 3))
    both = Goal("both passes", 4, "net", ("gate", "gate_backward"), "(2, 72")
    launches = Goal("both passes", 4, "net", ("gate", "gate_backward"), "(2, 72", unit=LAUNCHES)
    forward = Goal("forward", 5, "net", ("gate",))
    found = [row["found"] for row in goal_rows([network], [both, launches, forward])]
    assert found == [3.75, 4, 5.25]


def test_a_goal_of_no_call_is_refused():
    with pytest.raises(ValueError, match=r"expected calls for the goal 'pooling', got none in net; correct the goal"):
        goal_rows([network_of(("gate", "(2, 72)", 1, 1))], [Goal("pooling", 4, "net", ("pool",))])


@pytest.mark.parametrize(
    ("found", "cells"),
    [
        (4.0, "4.0 | met"),
        (4, "4 | met"),
        (5, "5 | **missed**"),
        (4.04, "4.04 | **missed**"),
        (4.3, "4.3 | **missed**"),
        (3.98, "4.0 | met"),
    ],
)
def test_a_goal_is_met_up_to_its_last_hundredth(found, cells):
    *_, line = goal_lines([{"what": "forward", "unit": "us", "most": 4, "found": found}])
    assert line == f"| forward | 4 us | {cells} |"


def test_goals_have_names_of_their_own():
    assert len({(goal.what, goal.unit) for goal in GOALS}) == len(GOALS)
