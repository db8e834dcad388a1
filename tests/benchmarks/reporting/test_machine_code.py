"""Loops of machine code are found, and matched with those of the PTX that it was made from."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the machine code is made by triton")

from trifuse.benchmarks.reporting import machine_code
from trifuse.benchmarks.reporting.machine_code import Loop, executed_instructions, loops_of, opcode


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FFMA R1, R2, R3, R4", "FFMA"),
        ("@!P0 BRA `(.L_x_1)", "BRA"),
        ("@!UP0 UIADD3 UR4, UR5, 0x1, URZ", "UIADD3"),
        ("{ LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128"),
        ("@%p12 ld.global.v4.b32 \t{ %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "ld.global.v4.b32"),
        ("fma.rn.f32 \t%r1, %r2, %r3, %r4;", "fma.rn.f32"),
    ],
)
def test_opcode_leaves_the_guard_out(text, name):
    assert opcode(text) == name


def test_loops_are_nested_and_a_branch_to_itself_is_none():
    assert loops_of({9: 2, 5: 3, 8: 6, 20: 12, 30: 30, 11: 25}) == [
        Loop(2, 9, [Loop(3, 5), Loop(6, 8)]),
        Loop(12, 20),
    ]


def test_two_branches_back_to_one_place_are_one_loop():
    assert loops_of({5: 2, 8: 2}) == [Loop(2, 8)]


def test_a_loop_owns_what_no_inner_loop_has():
    assert list(Loop(2, 9, [Loop(3, 5), Loop(7, 8)]).own()) == [2, 6, 9]


def launch(ptx: list[str], code: list[str], rounds: float) -> SimpleNamespace:
    """Return a launch whose PTX has one loop: from its second instruction to its last but one."""
    lines = ["other"] * len(ptx)
    lines[-2] = "bra 1 < >1"
    counts = [1.0, *[rounds] * (len(ptx) - 2), 1.0]
    kernel = SimpleNamespace(name="some_kernel", instructions=[SimpleNamespace(text=text) for text in ptx], code=lines)
    return SimpleNamespace(kernel=kernel, counts=counts, cubin=code)


@pytest.fixture
def written(monkeypatch):
    """Let machine code be written as a list; a branch names the position that it leads to."""

    def parsed(code):
        return code, {k: int(text.split()[-1]) for k, text in enumerate(code) if "BRA" in text}

    monkeypatch.setattr(machine_code, "instructions_of", parsed)


PTX = ["mov.u32 %r1, 0;", "ld.global.b32 %r2, [%rd1];", "add.f32 %r3, %r3, %r2;", "@%p1 bra $L__BB0_1;", "ret;"]
LOAD, ADD = "LDG.E R2, desc[UR4][R4.64]", "FADD R3, R3, R2"


@pytest.mark.parametrize("rounds", [1, 7, 6.5])
def test_a_loop_is_executed_as_often_as_that_of_the_ptx(written, rounds):
    code = ["MOV R1, RZ", LOAD, ADD, "@P0 BRA 1", "EXIT"]
    assert executed_instructions(launch(PTX, code, rounds))[1] == [1, rounds, rounds, rounds, 1]


@pytest.mark.parametrize(("rounds", "times", "rest"), [(11, 2, 3), (3, 0, 3), (8, 2, 0)])
def test_an_unrolled_loop_does_several_rounds_at_once_and_another_the_rest(written, rounds, times, rest):
    code = ["MOV R1, RZ", *[LOAD] * 4, *[ADD] * 4, "@P0 BRA 1", LOAD, ADD, "@P1 BRA 10", "EXIT"]
    counts = executed_instructions(launch(PTX, code, rounds))[1]
    assert counts == [1, *[times] * 9, *[rest] * 3, 1]


def test_a_load_that_was_moved_out_of_an_unrolled_loop_does_not_mislead(written):
    ptx = [PTX[0], *PTX[1:3] * 2, *PTX[3:]]
    code = [LOAD, *[LOAD] * 7, *[ADD] * 8, "@P0 BRA 1", "EXIT"]
    assert executed_instructions(launch(ptx, code, 8))[1] == [1, *[2] * 16, 1]


def test_a_loop_that_was_unrolled_whole_has_none(written):
    code = ["MOV R1, RZ", *[LOAD, ADD] * 3, "EXIT"]
    assert executed_instructions(launch(PTX, code, 3))[1] == [1] * 8


def test_loops_that_are_not_those_of_the_ptx_are_refused_by_name(written):
    code = ["MOV R1, RZ", "IADD3 R1, R1, 1, RZ", "@P0 BRA 1", "EXIT"]
    with pytest.raises(ValueError, match="some_kernel: expected loops like those of the PTX"):
        executed_instructions(launch(PTX, code, 3))


def test_consecutive_loops_go_to_models_in_order():
    loops, models = (
        [Loop(0, 1, kept=Counter(kept)) for kept in some] for some in ([{0: 2}, {1: 3}], [{0: 2}, {5: 1}, {1: 1}])
    )
    assert machine_code._matched(loops, models) == [{0: 1}, {}, {1: 3}]


def test_the_rest_of_an_inner_loop_that_was_unrolled_whole_is_not_taken_for_rounds_of_the_outer_one():
    model = Loop(0, 9, [Loop(2, 5)], Counter({0: 1, 1: 1}))
    assert machine_code._unrolled(Loop(0, 9, [], Counter({0: 8, 1: 1})), model) == 1
    assert machine_code._unrolled(Loop(0, 9, [Loop(2, 5)], Counter({0: 8, 1: 1})), model) == 8
