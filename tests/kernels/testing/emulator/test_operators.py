"""The operators as compiled: one small call of each here, all calls of the GPU tests by `make virtual-gpu`."""

from __future__ import annotations

import pytest
from ready_python import SUPPORT, run_with_compiler
from virtual_gpu_cases import operators_with_kernels, selected

from trifuse.kernels.tested_versions import VIRTUAL_GPU, read_verdicts

pytest.importorskip("triton", reason="the virtual GPU runs what triton compiles")

# Of each operator a call that is quick, yet has several programs; every type is among them.
SMALL = (
    "batch_norm_activation:bfloat16:3",
    "channel_gate:bfloat16:3",
    "depthwise_multi_kernel:float16:2",
    "dice_ce_loss:float32:1",
    "dilated_attention:bfloat16:1",
    "monte_carlo_pool:float32:12",
    "instance_norm_leaky_relu:bfloat16:3",
    "mutation_loss:bfloat16:0",
    "residual_layer_norm:float32:6",
    "segment_film_gate:bfloat16:3",
    "spatial_gate:float32:3",
    "temporal_film_gate:float16:3",
    "upsample_argmax:float32:1",
    "weighted_block_fusion:float16:2",
)


def test_every_operator_has_a_small_call():
    assert {name.split(":")[0] for name in SMALL} == set(operators_with_kernels())


def test_small_calls_are_right_as_compiled():
    child = run_with_compiler(SUPPORT / "virtual_gpu_cases.py", *SMALL)
    assert child.returncode == 0, child.stdout + child.stderr
    lines = child.stdout.splitlines()
    assert [line.rpartition(":")[0] for line in lines] == list(SMALL)
    assert all(": sound (" in line and " 0 launches" not in line for line in lines)


def test_every_call_of_the_gpu_tests_has_a_verdict_and_was_sound():
    verdicts = read_verdicts(VIRTUAL_GPU)
    calls = sorted((row["operator"], row["dtype"], int(row["case"])) for row in verdicts)
    assert calls == sorted((name, dtype, case) for name, dtype, case, _ in selected([]))
    assert [row for row in verdicts if row["verdict"] != "sound" or row["launches"] == "0"] == []
    assert [row["commit"] for row in verdicts if row["commit"].endswith("-dirty")] == []
