"""What rehearsals rely on: the stand-in GPU, choices of nobody else, and ceilings that take no time to measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import stand_in_gpu
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from trifuse.kernels.gpu import tuning
from trifuse.kernels.ops.memory_efficient_attention import attention_backend
from trifuse.kernels.testing import machine


def pytest_sessionstart() -> None:
    assert torch.cuda.get_device_name() == stand_in_gpu.NAME, "rehearsals run on the stand-in GPU"


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch, tmp_path):
    """Let every test find what was tuned, and what was looked up, as a new process would."""
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path / "cache"))
    for name, value in {"_remembered": None, "_found": {}, "_warned": set()}.items():
        monkeypatch.setattr(tuning, name, value)
    for launcher in tuning.TUNABLES.values():
        launcher.forget()
    attention_backend.cache_clear()


@pytest.fixture
def small_ceilings(monkeypatch):
    """Measure the machine's ceilings on little memory and small matrices."""
    monkeypatch.setattr(machine, "MIB", 1 << 10)
    monkeypatch.setattr(machine, "CEILING_SECONDS", 0.01)
    monkeypatch.setattr(machine, "_product_rate", lambda device, dtype: {torch.float32: 1e3}.get(dtype, 2e3))
    machine._with_ceilings.cache_clear()
    yield
    machine._with_ceilings.cache_clear()
