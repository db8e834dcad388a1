"""Time, memory and the machine's description, as they are taken on a GPU."""

from __future__ import annotations

import pytest
import stand_in_gpu
import torch

from trifuse import kernels
from trifuse.architectures.evaluation.report import describe_environment
from trifuse.kernels.testing import compare, machine, peak_memory_bytes
from trifuse.kernels.testing.measuring import measure

GPU = torch.device("cuda")


def test_a_sample_is_one_call_between_two_events():
    calls = []
    timings = measure({"one": lambda: calls.append(1)}, device="cuda", seconds=1e-9, least_rounds=5)
    assert len(timings["one"].seconds) == 5
    assert all(0 < seconds < 1 for seconds in timings["one"].seconds)
    assert len(calls) == 2 + 1 + 1 + 5  # first calls, memory, one to plan with, samples


def test_the_fixture_measures_on_the_gpu(gpu_benchmark):
    made = []
    gpu_benchmark({"ones": lambda: made.append(torch.ones(5, device="cuda"))}, seconds=1e-9)
    assert gpu_benchmark.keywords["device"] == "cuda"


def test_peak_memory_is_the_allocator_s():
    x = torch.ones(1000, device="cuda")
    assert peak_memory_bytes(lambda: (x + 1) * 2, "cuda") == 8000


def test_a_stamp_names_the_gpu_and_its_ceilings(small_ceilings):
    stamp = machine.stamp(machine.default_device())
    assert stamp["device"] == stand_in_gpu.NAME
    assert stamp["driver"] == "stand-in"
    assert stamp["copy_gb_per_s"] > 0
    assert (stamp["float32_gflop_per_s"], stamp["bfloat16_gflop_per_s"]) == (1000, 2000)
    share = machine.share_of_ceiling(GPU, torch.bfloat16, None, 1000.0)
    assert share == pytest.approx(0.5)


def test_the_rate_of_products_is_measured_in_each_type(monkeypatch):
    sides = []

    def timed(functions, **options):
        sides.append(functions["product"]().shape)
        return measure({"product": lambda: None}, device="cuda", seconds=1e-9)

    small = torch.ones(8, 8, device="cuda")
    monkeypatch.setattr(machine, "measure", timed)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: (sides.append(shape), small)[1])
    assert machine._product_rate(GPU, torch.bfloat16) > 0
    assert sides == [(8192, 8192), (8192, 8192), (8, 8)]


def test_forms_are_compared_and_kept(small_ceilings, tmp_path):
    features = torch.randn(2, 4, 8, 8, device="cuda", requires_grad=True)
    gate = torch.randn(2, 4, device="cuda", requires_grad=True)
    forms = {"plain": kernels.channel_gate_reference, "trifuse": kernels.channel_gate}
    comparison = compare("channel gate", forms, features, gate, seconds=1e-9)
    assert [row["provider"] for row in comparison.rows] == ["plain", "trifuse"] * 2
    assert comparison.refused == []
    assert comparison.write(tmp_path).name == "channel_gate.cuda.json"
    assert comparison.record()["stamp"]["device"] == stand_in_gpu.NAME


def test_a_report_names_the_gpu():
    assert describe_environment("cuda")["Device"] == stand_in_gpu.NAME
