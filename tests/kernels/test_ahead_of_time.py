"""The ahead-of-time gate: every Triton kernel is compiled for GPUs that are not here, and kept within its budget."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from trifuse.kernels import gpu
from trifuse.kernels.gpu.static_case import TARGETS

pytest.importorskip("triton", reason="the gate compiles with triton")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
KERNEL_MODULES = [f"{gpu.__name__}.{module.name}" for module in pkgutil.iter_modules(gpu.__path__)]
KERNEL_MODULES.remove("trifuse.kernels.gpu.static_case")


def compile_ahead_of_time(cache: Path, *modules: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(SCRIPT), *modules]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.timeout(600)  # the segmentation losses unroll classes, maps and subsets: a minute of compilation
@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_every_kernel_has_its_cases_and_keeps_their_budgets(module, tmp_path):
    compiled = compile_ahead_of_time(tmp_path, module)
    assert compiled["without_a_case"] == []
    targets = {}
    for row in compiled["rows"]:
        targets.setdefault(row["case"], set()).add(row["target"])
    assert targets
    assert [case for case, covered in targets.items() if covered != set(TARGETS)] == []
    table = [
        f"{row['case']} on {row['target']}: {rule}: {message}"
        for row in compiled["rows"]
        for rule, message in row["broken"].items()
    ]
    assert table == [], "\n".join(table)


def test_gate_sees_each_broken_rule(tmp_path):
    """A kernel of ``costly_kernels.py`` breaks the rule it is named after, on both makers' GPUs, and no other."""
    compiled = compile_ahead_of_time(tmp_path, "costly_kernels")
    assert compiled["without_a_case"] == ["costly_kernels.forgotten_kernel"]
    for row in compiled["rows"]:
        assert set(row["broken"]) == ({row["case"]} - {"sound"}), row
    assert {row["case"] for row in compiled["rows"]} == {
        "sound", "wide loads", "registers", "shuffles", "atomics", "spills"
    }  # fmt: skip
