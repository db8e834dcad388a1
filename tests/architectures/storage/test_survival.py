"""Readers that die of a file, or take all memory, do so in a process of their own (C13)."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from trifuse.architectures.storage import published_weights
from trifuse.architectures.storage.published_weights import read_pickled
from trifuse.architectures.storage.survival import MEMORY, fatality
from trifuse.kernels import CheckpointError


def test_c13_what_ends_a_reader_is_told_and_what_it_raises_is_not():
    assert fatality(lambda: os.kill(os.getpid(), signal.SIGSEGV)) == "SIGSEGV"
    assert fatality(lambda: 1 / 0) == ""
    assert fatality(lambda: np.ones(1 << 20), most_bytes=1 << 26) == ""
    assert fatality(lambda: np.ones(1 << 26), most_bytes=1 << 26) == MEMORY
    assert fatality(lambda: torch.ones(1 << 26), most_bytes=1 << 26) == MEMORY


@pytest.fixture
def weights(tmp_path):
    torch.save({"weight": torch.zeros(1 << 24)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_c13_weights_that_take_more_memory_than_their_size_warrants_are_refused(weights, monkeypatch):
    assert read_pickled(weights)["weight"].numel() == 1 << 24
    monkeypatch.setattr(published_weights, "_LEAST_MEMORY_BYTES", 0)
    monkeypatch.setattr(published_weights, "_MEMORY_PER_BYTE", 0)
    with pytest.raises(
        CheckpointError, match=r"weights\.pt: .* all memory that it may take: more than 0\.0 GiB for 64\.0"
    ):
        read_pickled(weights)


def test_c13_weights_that_crash_their_reader_leave_this_process_alive(weights, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **options: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(CheckpointError, match=r"weights\.pt: .* ends its reader with SIGSEGV"):
        read_pickled(weights)
