"""Choosing the fastest form of a kernel, which happens on a GPU alone."""

from __future__ import annotations

import json

import pytest
import torch
from stand_in_gpu import driver
from triton import testing

from trifuse.kernels import BackendError, channel_gate, warm_up, weighted_block_fusion
from trifuse.kernels.gpu import tuning


@pytest.fixture
def few_runs(monkeypatch):
    """Let Triton's own clock run every form, a few times only."""
    monkeypatch.setattr(testing, "do_bench", driver.do_bench)
    monkeypatch.setattr(tuning, "WARM_UP_MS", 1e-3)
    monkeypatch.setattr(tuning, "TIMED_MS", 1e-3)


@pytest.fixture
def fusion():
    maps = [torch.randn(2, 3, 8, device="cuda", requires_grad=True) for _ in range(3)]
    logits = torch.randn(3, device="cuda", requires_grad=True)
    return lambda: weighted_block_fusion(maps, logits).sum().backward()


def test_what_is_found_is_kept_for_later_processes(few_runs, fusion, monkeypatch):
    warm_up(fusion)
    kept = json.loads(tuning.cache_file().read_text())
    assert sorted(place.split(" | ")[0] for place in kept) == [
        "weighted_block_fusion.backward",
        "weighted_block_fusion.forward",
    ]
    assert all(" | stand-in GPU | triton " in place for place in kept)
    monkeypatch.setattr(tuning, "_remembered", None)
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: pytest.fail("timed again"))
    warm_up(fusion)


def test_without_it_the_first_form_runs(fusion):
    fusion()
    assert not tuning.cache_file().exists()


def test_the_clearly_fastest_form_wins(monkeypatch, fusion):
    times = iter([3.0, 1.0, 2.0] * 10)
    monkeypatch.setattr(testing, "do_bench", lambda run, **_: next(times))
    warm_up(fusion)
    (launcher,) = (launcher for name, launcher in tuning.TUNABLES.items() if name == "weighted_block_fusion.forward")
    (kept,) = (choice for place, choice in tuning.known().items() if place.startswith(launcher.name))
    assert kept == launcher.choices[1]


def test_a_form_that_is_too_large_loses_and_all_of_them_leave_the_first(monkeypatch, fusion):
    def too_large(run, **options):
        raise BackendError("it needs more than there is")

    monkeypatch.setattr(testing, "do_bench", too_large)
    warm_up(fusion)
    assert tuning.known() == {}


def test_where_nothing_can_be_timed_one_warning_says_so(monkeypatch, fusion):
    def broken(run, **options):
        raise RuntimeError("no clock")

    monkeypatch.setattr(testing, "do_bench", broken)
    with pytest.warns(RuntimeWarning, match=r"kernels cannot be timed here \(RuntimeError: no clock\)"):
        warm_up(fusion)


def test_nothing_is_timed_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: pytest.fail("timed"))
    x, gate = torch.randn(1, 2, 4, 4, device="cuda"), torch.randn(1, 2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = warm_up(channel_gate, x, gate)
    expected = result.clone()
    result.zero_()
    graph.replay()
    torch.testing.assert_close(result, expected)
