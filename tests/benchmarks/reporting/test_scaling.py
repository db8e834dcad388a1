"""The scaling report: an exponent is the one that a known computation has, and the three files say it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unbuildable_kernels import NO_COMPILER, make_unbuildable

from trifuse import kernels
from trifuse.benchmarks.reporting import scaling, scaling_curves, scaling_ranks
from trifuse.kernels import BackendError, library
from trifuse.kernels.testing import NoKernelRan
from trifuse.kernels.testing.measuring import Timing

SIZES = (1, 2, 4, 8)


def timings_of(power, noise=(1.0, 3.0, 0.5)):
    """Rounds of a computation that takes size**power seconds on a machine that is slow in some rounds."""
    return {str(size): Timing(tuple(size**power * factor for factor in noise), 1 << (20 + size)) for size in SIZES}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 1.5])
def test_a_power_is_found(power):
    assert scaling.exponent(SIZES, [7 * size**power for size in SIZES]) == pytest.approx(power, abs=1e-9)


def test_slow_rounds_do_not_move_the_exponent(monkeypatch):
    asked = {}

    def measure(candidates, *, device, seconds):
        asked.update(candidates=list(candidates), seconds=seconds)
        return timings_of(1.5)

    monkeypatch.setattr(scaling, "measure", measure)
    curve = scaling.Curve("work", "batch", SIZES, lambda size, device: lambda: None)
    measured = scaling.measure_curve(curve, torch.device("cpu"), 0.25)
    assert asked == {"candidates": ["1", "2", "4", "8"], "seconds": 0.25}
    found = (measured.exponent, measured.exponent_low, measured.exponent_high, measured.last_exponent)
    assert found == pytest.approx((1.5,) * 4)
    assert measured.median_ms == pytest.approx([1e3 * size**1.5 for size in SIZES], rel=1e-6)
    assert measured.peak_mib == (2, 4, 16, 256)
    assert measured.rounds == 3


def test_a_last_pair_that_bends_is_seen(monkeypatch):
    bent = timings_of(1.0)
    bent["8"] = replace(bent["8"], seconds=tuple(4 * second for second in bent["8"].seconds))
    monkeypatch.setattr(scaling, "measure", lambda candidates, **options: bent)
    curve = scaling.Curve("work", "batch", SIZES, lambda size, device: lambda: None)
    measured = scaling.measure_curve(curve, torch.device("cpu"), 0.1)
    assert measured.last_exponent == pytest.approx(3.0)
    assert 1.0 < measured.exponent < 2.0


def fuse(size):
    return kernels.weighted_block_fusion([torch.ones(size, 2, 4)], torch.zeros(1))


def test_a_curve_runs_on_kernels_and_tells_their_launches(monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda candidates, **options: timings_of(1.0))
    curve = scaling.Curve("fusion", "batch", SIZES, lambda size, device: lambda: fuse(size))
    with library.compiled_on_cpu():  # as on a GPU; the interpreter runs them
        assert scaling.measure_curve(curve, torch.device("cpu"), 0.1).launches == (1, 1, 1, 1)
    assert scaling.measure_curve(curve, torch.device("cpu"), 0.1).launches == (0, 0, 0, 0)
    assert scaling.measure_curve(replace(curve, kernels=False), torch.device("cpu"), 0.1).launches is None


def test_a_curve_is_refused_where_no_kernel_can_be_built_or_none_runs(monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda candidates, **options: timings_of(1.0))
    idle = scaling.Curve("idle", "batch", SIZES, lambda size, device: lambda: None)
    with library.compiled_on_cpu(), pytest.raises(NoKernelRan, match="idle: expected Triton kernels"):
        scaling.measure_curve(idle, torch.device("cpu"), 0.1)
    make_unbuildable(monkeypatch)
    curve = scaling.Curve("fusion", "batch", SIZES, lambda size, device: lambda: fuse(size))
    with pytest.raises(BackendError, match=NO_COMPILER):
        scaling.measure_curve(curve, torch.device("cpu"), 0.1)


def test_the_three_files(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda candidates, **options: timings_of(1.0))
    machine = {"device": "a machine", "threads": 2, "torch": "9.9", "commit": "0123abc"}
    monkeypatch.setattr(scaling, "stamp", lambda device: machine)
    monkeypatch.setattr(scaling_ranks, "run_ranks", lambda setup, seconds: 10.0 * setup.processes * setup.threads)
    curves = [scaling.Curve("work", axis, SIZES, lambda size, device: lambda: None) for axis in ("batch", "classes")]
    record = scaling.run(tmp_path, 0.1, curves=curves, rounds=2)
    kind = scaling.default_device().type
    assert {path.name for path in tmp_path.iterdir()} == {f"scaling.{kind}.{end}" for end in ("json", "md", "png")}
    assert json.loads((tmp_path / f"scaling.{kind}.json").read_text()) == json.loads(json.dumps(record))
    text = (tmp_path / f"scaling.{kind}.md").read_text()
    assert "a machine, 2 threads" in text
    assert "1.00 (1.00 to 1.00)" in text
    assert [entry["speedup"] for entry in record["processes"]] == [1.0, 0.5, 1.0]
    assert (tmp_path / f"scaling.{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_every_curve_runs_at_its_smallest_size():
    for curve in scaling.CURVES:
        assert len(curve.sizes) >= 4, curve.name
        assert list(curve.sizes) == sorted(curve.sizes), curve.name
        smallest = curve.make(curve.sizes[0], torch.device("cpu"))()
        assert smallest is not None, curve.name


def test_a_tiny_curve_of_every_one_runs():
    named = [(curve.name, curve.axis) for curve in scaling.CURVES if curve.make is not scaling_curves.fias_step]
    assert [(curve.name, curve.axis) for curve in scaling.TINY_CURVES] == named
    for curve in scaling.TINY_CURVES:
        assert len(curve.sizes) == 2, curve.name
        for size in curve.sizes:
            assert curve.make(size, torch.device("cpu"))() is not None, curve.name


def test_squares_come_back_as_sides():
    sides = []
    make = scaling_curves.of_side(lambda side, batch, device: sides.append((side, batch)), 3)
    for pixels in scaling_curves.squares(16, 17, 96):
        make(pixels, torch.device("cpu"))
    assert sides == [(16, 3), (17, 3), (96, 3)]


def test_a_rank_trains():
    assert 0 < scaling_ranks.train_as_a_rank(0.0) < float("inf")


def test_ranks_are_told_who_they_are_and_their_rate_is_the_first_ones(monkeypatch):
    started = []

    class Rank:
        def __init__(self, command, env):
            started.append(env)
            rate = 10.0 * (1 + int(env["RANK"]))
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"samples_per_s": rate}))

        def wait(self):
            return 0

    monkeypatch.setattr(scaling_ranks.subprocess, "Popen", Rank)
    assert scaling_ranks.run_ranks(scaling_ranks.Setup(processes=2, threads=3), 0.1) == 10.0
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in started] == [("0", "0"), ("1", "1")]
    assert {(env["WORLD_SIZE"], env["OMP_NUM_THREADS"]) for env in started} == {("2", "3")}
    assert len({env["MASTER_PORT"] for env in started}) == 1
    monkeypatch.setattr(Rank, "wait", lambda self: 3)
    with pytest.raises(RuntimeError, match=r"2 ranks ended with \[3, 3\]"):
        scaling_ranks.run_ranks(scaling_ranks.Setup(2, 1), 0.1)
