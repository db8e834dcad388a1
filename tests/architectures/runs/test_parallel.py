"""Computations in processes of their own."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from trifuse.architectures.runs import parallel
from trifuse.architectures.training.signals import Interrupted


def test_t8_a_killed_process_is_no_traceback(monkeypatch):
    monkeypatch.setattr(parallel, "get_context", lambda kind: multiprocessing.get_context("fork"))  # no new torch
    with pytest.raises(Interrupted, match=r"one of 2 processes was killed.*resume to continue"):
        parallel.run_each(os._exit, [(9,)], jobs=2)
