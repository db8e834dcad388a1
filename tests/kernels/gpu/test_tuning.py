"""Tuning: what is chosen, when, and what it depends on."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
from toy_launcher import interpreted, kept

from trifuse import kernels
from trifuse.kernels import BackendError, backend, warm_up
from trifuse.kernels.gpu import tuning
from trifuse.kernels.testing import comparing
from trifuse.kernels.testing.comparing import Case, Comparison, Pass

pytest.importorskip("triton", reason="its kernels are what is tuned")


def test_nothing_is_timed_unless_asked_for(start_over):
    toy = start_over()
    assert toy(8) == 64
    assert toy.timed == []
    assert not tuning.cache_file().exists()


def test_fastest_choice_is_found_kept_and_read_by_a_later_process(start_over):
    toy = start_over()
    assert toy(8) == 64
    assert warm_up(toy, 8) == 256
    assert toy.timed == [64, 128, 256]
    assert toy(8) == 256
    ((place, choice),) = kept().items()
    assert place.startswith("toy.forward | torch.float32 | 8 | True | Some GPU | triton 3.")
    assert choice == {"threads": 256}
    later = start_over()
    assert later(8) == 256
    assert later.timed == []


def test_what_is_known_is_not_timed_again(start_over):
    warm_up(start_over(), 8)
    later = start_over()
    later.clock[64] = 0.1
    assert warm_up(later, 8) == 256
    assert later.timed == []


def test_choices_are_for_sizes_up_to_a_power_of_two(start_over):
    toy = start_over()
    warm_up(toy, 6)
    assert [toy(size) for size in (4, 5, 8, 9)] == [64, 256, 256, 64]


@pytest.mark.parametrize("change", ["gpu_name", "_versions"])
def test_choices_are_for_one_gpu_and_one_version(change, start_over, monkeypatch):
    warm_up(start_over(), 8)
    later = start_over()
    monkeypatch.setattr(tuning, change, lambda *_: "another")
    assert later(8) == 64


def test_versions_follow_the_sources(monkeypatch, tmp_path):
    tuning._versions.cache_clear()
    before = tuning._versions()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    (tmp_path / "gates.py").write_text("TILE = 1")
    tuning._versions.cache_clear()
    changed = tuning._versions()
    monkeypatch.undo()
    tuning._versions.cache_clear()
    assert before != changed
    assert (
        before.rpartition(" | ")[0] == changed.rpartition(" | ")[0] == f"triton {import_module('triton').__version__}"
    )


def test_noise_does_not_change_the_choice(start_over):
    toy = start_over()
    toy.clock |= {64: 1.0, 128: 0.98, 256: 0.99}
    assert warm_up(toy, 8) == 64


def test_form_too_large_for_the_gpu_is_left_out(start_over, monkeypatch):
    toy = start_over()
    ticks = tuning.milliseconds

    def out_of_shared_memory(run, device):
        if run.args[0]["threads"] == 256:
            raise BackendError("needs more shared memory than there is")
        return ticks(run, device)

    monkeypatch.setattr(tuning, "milliseconds", out_of_shared_memory)
    assert warm_up(toy, 8) == 128


def test_form_that_is_no_candidate_is_not_timed(start_over, monkeypatch):
    toy = start_over()
    monkeypatch.setattr(toy.toy, "_is_candidate", lambda choice, x: choice["threads"] <= len(x))
    assert warm_up(toy, 128) == 128
    assert toy.timed == [64, 128]


def test_warm_up_returns_and_raises_what_the_function_does_and_ends(start_over):
    toy = start_over()

    def fails():
        toy(8)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warm_up(fails)
    assert list(kept().values()) == [{"threads": 256}]
    toy(1000)
    assert len(toy.timed) == 3


def test_comparisons_time_kernels_in_their_fastest_form(start_over, monkeypatch):
    toy = start_over()

    def doubled(x):
        assert toy(8) in (64, 256)
        return 2 * x

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(comparing, "measure", lambda sound, **settings: sound["doubled"]() and {})
    one = Comparison("toy", [], [], {"doubled": doubled}, doubled)
    one._measure(Case("one", lambda device: (torch.ones(2),)), Pass("forward"), 0.01)
    assert one.refused == []
    assert toy.timed == [64, 128, 256]
    assert toy.launches[-1] == 256


def test_nothing_is_timed_while_a_graph_is_captured(start_over, monkeypatch):
    toy = start_over()
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert warm_up(toy, 8) == 64
    assert toy.timed == []
    assert not tuning.cache_file().exists()
    assert warm_up(toy, 8) == 256


@interpreted
def test_nothing_is_timed_in_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "milliseconds", None)
    with backend("triton"):
        warm_up(kernels.upsample_argmax, [torch.ones(1, 2, 2, 2)], (4, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choices_are_timed_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", None)
    maps = [torch.randn(2, 64, 128, device="cuda", requires_grad=True) for _ in range(3)]
    logits = torch.zeros(3, device="cuda", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up(lambda: kernels.weighted_block_fusion(maps, logits).sum().backward())
    assert {place.partition(" ")[0] for place in kept()} == {
        "weighted_block_fusion.forward", "weighted_block_fusion.backward"
    }  # fmt: skip
