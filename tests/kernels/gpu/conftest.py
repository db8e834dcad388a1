"""Fixtures of the tests of tuning and of launches, which lie in several files."""

from __future__ import annotations

import pytest
import torch
from toy_launcher import Toy

from trifuse.kernels import library
from trifuse.kernels.gpu import tuning


@pytest.fixture
def start_over(monkeypatch, tmp_path):
    """Return what a new process would begin with, with a folder of its own; a later call is a later process."""
    monkeypatch.setattr(tuning, "TUNABLES", {})
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path / "cache"))

    def start():
        for name, value in {"_remembered": None, "_found": {}, "_warned": set()}.items():
            monkeypatch.setattr(tuning, name, value)
        toy = Toy()
        monkeypatch.setattr(tuning, "gpu_name", lambda device: "Some GPU")
        monkeypatch.setattr(tuning, "milliseconds", toy.ticks)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return toy

    return start


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Make Triton the default for CPU tensors, where no operator was called yet."""

    def choose(device, dtype, op=""):
        choice, reason = default(device, dtype, op)
        return (choice, reason) if (op, device) in library._unusable else ("triton", "")

    default = library.default_backend
    monkeypatch.setattr(library, "_unusable", {})
    monkeypatch.setattr(library, "_built", set())
    monkeypatch.setattr(library, "default_backend", choose)
