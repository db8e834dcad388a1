"""A GPU that is none: memory of the CPU that says it lies on ``cuda:0``, and a `torch.cuda` that speaks of it.

Python that only runs with a GPU runs on it: start a process in `environment`, whose children inherit it, or `install`
it before anything asks for a GPU. Where a tensor lies is a mark on its storage, so that views share it; every operation
of PyTorch is seen, marks what it returns, and refuses arguments from two places as CUDA does.

As on a GPU: places and their mixing, generators of each place, memory held and at its peak, recorded graphs and what
must not happen while recording, events that tell time. Not as on a GPU: compiled forms run eagerly, ``cuda:nccl`` is
gloo, autocast is the CPU's, huge matrices are neither drawn nor multiplied, and kernels run in Triton's interpreter,
forms to choose from once. Its figures mean nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

NAME = "stand-in GPU"
PROCESS = Path(__file__).resolve().parent / "process"  # its sitecustomize.py calls `install`


def install() -> None:
    """Give this process a GPU, until it ends."""
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU; a stand-in would only hide it")
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from . import devices, driver, memory, tensors

    devices.install(NAME)
    tensors.install()
    driver.install()
    memory.MODE.__enter__()
    torch.compiler.set_stance("force_eager")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that has such a GPU, as have its children."""
    path = os.pathsep.join(filter(None, [str(PROCESS), os.environ.get("PYTHONPATH", "")]))
    programs = os.pathsep.join([str(PROCESS), os.environ.get("PATH", os.defpath)])  # nvidia-smi
    return {**os.environ, "PYTHONPATH": path, "PATH": programs, **more}
