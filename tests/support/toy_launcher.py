"""A launcher of three forms, and a clock that goes by their number of threads."""

from __future__ import annotations

import json

import pytest
import torch

from trifuse.kernels.gpu import tuning

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests on a machine without a GPU")
# A launcher of three forms, and a clock that goes by their number of threads. Children run the same lines.
TOY = """
import torch
from trifuse.kernels.gpu import tuning

def forward(choice, x):
    launches.append(choice["threads"])
    return choice["threads"]

def ticks(run, device):
    timed.append(run.args[0]["threads"])
    run()
    return clock[launches[-1]]

forward.__module__ = "toy"
launches, timed, clock = [], [], {64: 3.0, 128: 2.0, 256: 1.0}
toy = tuning.tunable(
    ({"threads": 64}, {"threads": 128}, {"threads": 256}), lambda x: tuning.key_of(x, True)
)(forward)
"""


class Toy:
    def __init__(self):
        self.__dict__ |= {key: value for key, value in _executed(TOY).items() if not key.startswith("__")}

    def __call__(self, size):
        return self.toy(torch.empty(size))


def _executed(source):
    namespace = {}
    exec(source, namespace)
    return namespace


def kept() -> dict:
    return json.loads(tuning.cache_file().read_text())
