"""What launches execute is counted: in the PTX that the virtual GPU runs, and in the machine code made from it."""

from __future__ import annotations

import json

import pytest
from ready_python import SUPPORT, run_with_compiler

pytest.importorskip("triton", reason="the virtual GPU runs what triton compiles")


@pytest.fixture(scope="module")
def found() -> dict:
    child = run_with_compiler(SUPPORT / "counted_kernels.py")
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


# Of four programs with 5, 6, 7 and 8 rounds, a warp does 6.5 on average. Of machine code, what a branch may skip counts
# as executed: in loops that were unrolled, one round and two rounds beside the loop.
@pytest.mark.parametrize(
    ("name", "loads", "stores", "counted"),
    [("straight", 1, 1, 1), ("looped", 6.5, 1, 9.5), ("looped once", 13, 1, 16), ("nested", 150, 4, 150)],
)
def test_a_warp_executes_each_instruction_as_often_as_its_loops_say(found, name, loads, stores, counted):
    ptx = found[name]["ptx"]
    assert (ptx["ld.global"], ptx["st.global"]) == (loads, stores)
    row = found[name]["row"]
    assert (row["loads"], row["stores"]) == ({"32": counted}, {"32": stores})


def test_a_launch_is_told_by_its_kernel_programs_and_warps(found):
    row = found["straight"]["row"]
    assert (row["kernel"], row["programs"], row["warps"]) == ("straight_kernel", 8, 4)
    assert 8 <= row["executed"] <= 40


def test_what_loops_execute_grows_with_their_rounds(found):
    per_round = (found["looped once"]["row"]["executed"] - found["looped"]["row"]["executed"]) / 6.5
    assert 3 <= per_round <= 30
