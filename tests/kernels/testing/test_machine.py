"""What a result is stamped with: the machine, its ceilings, and the commit of the measured code."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from trifuse.kernels.testing import Timing, machine


def test_ceilings_are_measured_and_the_nearer_one_counts(monkeypatch):
    ceilings = {"copy_gb_per_s": 100.0, "float32_gflop_per_s": 1000, "bfloat16_gflop_per_s": 8000}
    monkeypatch.setattr(machine, "stamp", lambda device: ceilings)
    place, single, half = torch.device("cuda"), torch.float32, torch.bfloat16
    assert machine.share_of_ceiling(place, single, 50.0, 100.0) == 0.5
    assert machine.share_of_ceiling(place, single, 50.0, 700.0) == 0.7
    assert machine.share_of_ceiling(place, half, None, 2000.0) == 0.25
    assert machine.share_of_ceiling(place, half, None, None) is None
    monkeypatch.setitem(ceilings, "bfloat16_gflop_per_s", None)  # a CPU, where it is not measured
    assert machine.share_of_ceiling(place, half, None, 500.0) == 0.5


def test_a_copy_moves_its_bytes_twice_and_a_multiply_add_is_two_operations(monkeypatch):
    def in_half_a_second(candidates, **options):
        return {name: Timing((0.5,), 0) for name in candidates}

    monkeypatch.setattr(machine, "measure", in_half_a_second)
    place = torch.device("cpu")
    assert machine._copy_bandwidth(place) == pytest.approx(2 * 64 * 2**20 / 0.5e9)
    assert machine._product_rate(place, torch.float32) == pytest.approx(2 * 1024**3 / 0.5e9)


def test_commit_is_that_of_the_measured_code(monkeypatch):
    monkeypatch.setenv("TRIFUSE_COMMIT", "0123abc")
    assert machine.identity(torch.device("cpu"))["commit"] == "0123abc"
    monkeypatch.delenv("TRIFUSE_COMMIT")
    monkeypatch.setattr(machine, "_said_by", lambda *command: "")  # not under git, or in another's repository
    assert machine.identity(torch.device("cpu"))["commit"].startswith("unknown, trifuse ")
    answers = {"ls-files": "machine.py", "status": " M machine.py", "rev-parse": "0123abcdef01"}
    monkeypatch.setattr(machine, "_said_by", lambda *command: answers[command[3]])
    assert machine.identity(torch.device("cpu"))["commit"] == "0123abcdef01+changes"


def test_results_that_are_written_change_nothing_that_is_measured(tmp_path, monkeypatch):
    def git(*words):
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True, capture_output=True)

    monkeypatch.delenv("TRIFUSE_COMMIT", raising=False)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "kernels" / "machine.py"))
    files = [tmp_path / "kernels" / "machine.py", tmp_path / "benchmarks" / "results" / "op.cpu.json"]
    git("init")
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("before")
    git("add", ".")
    git("commit", "-m", "a")
    files[1].write_text("measured")
    assert re.fullmatch("[0-9a-f]{12}", machine.commit())
    files[0].write_text("changed")
    assert machine.commit().endswith("+changes")
