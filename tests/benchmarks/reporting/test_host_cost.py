"""How many kernels a call launches, exactly; and that what is measured of the host's time is what is called."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch

from trifuse import kernels
from trifuse.benchmarks.reporting import host_cost
from trifuse.kernels.testing.tables import markdown

pytestmark = pytest.mark.skipif("torch.cuda.is_available()", reason="counts launches in the interpreter")

# Operator: Triton kernels and others, forward; the same, forward and backward.
LAUNCHES = {
    "weighted_block_fusion": ((1, 0), (3, 0)),  # backward: the sums, and the logits' gradient
    "dilated_attention": ((1, 0), (3, 0)),  # backward: of the queries, and of the keys and values
    "channel_gate": ((1, 0), (2, 0)),
    "spatial_gate": ((1, 0), (2, 0)),
    "temporal_film_gate": ((1, 0), (3, 0)),  # backward: the map with its sums, and what follows from these
    "segment_film_gate": ((1, 0), (3, 0)),  # backward: likewise; of more samples than one, the direction's shares
    "batch_norm_activation": ((1, 0), (2, 0)),
    "instance_norm_leaky_relu": ((1, 0), (3, 0)),  # backward: the map with its sums, and those of all samples
    "residual_layer_norm": ((1, 0), (3, 0)),  # backward: the tokens with their sums, and those of all programs
    "depthwise_multi_kernel": ((2, 0), (5, 0)),  # merge, convolve; the same turned, the kernels' sums, and their parts
    "monte_carlo_pool": ((1, 0), (3, 0)),  # backward: the draw's positions, and the map
    "mutation_loss": ((3, 1), (4, 2)),  # sums of parts, sums of those, the loss; the others are PyTorch's
    "dice_ce_loss": ((3, 0), (4, 1)),
    "upsample_argmax": ((1, 0), None),
}


@pytest.fixture(scope="module")
def table():
    return {(name, timed): counts for name, timed, *counts in host_cost.launch_table()}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(table, name):
    for timed, expected in zip((host_cost.FORWARD, host_cost.BACKWARD), LAUNCHES[name], strict=True):
        if expected is None:
            assert (name, timed) not in table
        else:
            assert tuple(table[name, timed][1:]) == expected


def test_fewer_launches_than_what_people_write(table):
    assert [key for key, (composed, triton, others) in table.items() if triton + others >= composed] == []
    assert {name for name, _ in table} == host_cost.FORMS.keys()


def test_every_operator_with_kernels_is_counted():
    without = {"memory_efficient_attention", "dilated_attention_weights"}
    assert host_cost.FORMS.keys() == kernels.OPERATORS.keys() - without


def test_operators_inside_of_ours_are_counted():
    x = torch.ones(2, 3, 4, 5).transpose(2, 3)
    gate = torch.ones(3, 2).t()  # copied, because the kernel takes it contiguous
    call = partial(kernels.channel_gate, x, gate)
    assert host_cost.launches(call) == (1, 1)


def test_composed_launches_leave_views_and_allocations_out():
    x = torch.ones(4, 4)
    assert host_cost.composed_launches(lambda: torch.empty_like(x).view(16)[1:].add_(1).mul(2)) == 2


def test_times_are_those_of_every_form_and_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(host_cost, "CALLS_PER_BURST", 1)
    monkeypatch.setattr(host_cost, "stamp", lambda device: {"device": "d", "threads": 1, "torch": "2", "commit": "0"})
    monkeypatch.setattr(host_cost, "MOST_ROUNDS", 2)
    host_cost.main(["--out", str(tmp_path), "--seconds", "0"])
    record = json.loads((tmp_path / "host_cost.cpu.json").read_text())
    timed = {(row["provider"], row["pass"]) for row in record["rows"]}
    passes = {host_cost.FORWARD, host_cost.WITH_GRADIENTS, host_cost.BACKWARD}
    assert {kind for name, kind in timed if name == "trifuse channel_gate"} == passes
    assert {kind for name, kind in timed if name == "trifuse upsample_argmax"} == {host_cost.FORWARD}
    assert {name for name, _ in timed} >= {"torch.mul", "autograd.Function", "custom_op"}
    assert all(0 < row["fifth_ms"] <= row["median_ms"] <= row["four_fifths_ms"] for row in record["rows"])
    assert "trifuse weighted_block_fusion" in markdown(record | {"stamp": record["stamp"] | dict.fromkeys(STAMPED, 1)})
    assert "| dilated_attention, forward + backward" in (tmp_path / "launches.md").read_text()


def test_the_interpreter_is_chosen_for_a_process_of_its_own(tmp_path, monkeypatch):
    started = []
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(host_cost, "run", lambda *arguments: pytest.fail("measured without the interpreter"))

    def start(command, env):
        started.append((command, env["TRITON_INTERPRET"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", start)
    assert host_cost.main(["--out", str(tmp_path), "--seconds", "0.25"]) == 3
    module = "trifuse.benchmarks.reporting.host_cost"
    assert started == [([sys.executable, "-m", module, f"--out={tmp_path}", "--seconds=0.25"], "1")]


STAMPED = ("copy_gb_per_s", "float32_gflop_per_s", "bfloat16_gflop_per_s")


def test_launches_are_replaced_by_nothing_only_inside():
    from trifuse.kernels.gpu import launching

    before = launching.launch
    with host_cost.as_on_a_gpu(mock.Mock()):
        assert launching.launch is not before
        assert kernels.library.forced_backend() == "triton"
    assert launching.launch is before
