"""Every test of training runs on one thread, and waits for no disk."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No kill and no test can tell whether the disk has synced, but a shared machine takes long over it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
