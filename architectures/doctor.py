"""What is installed, and which backend each operator would use here and why: the first thing to ask of a user."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from trifuse.kernels import OPERATORS
from trifuse.kernels._library import TRITON_DTYPES, default_backend
from trifuse.kernels.attention import attention_backend

PACKAGES = ("trifuse", "torch", "triton", "xformers", "numpy", "einops", "safetensors", "nibabel")
OPTIONAL = {
    "scipy": "med",
    "matplotlib": "med",
    "tensorboard": "tb",
    "hypothesis": "bench",
    "pytest-benchmark": "bench",
}
VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def examine() -> dict[str, Any]:
    """Return what there is to know, as JSON values."""
    return {
        "machine": _machine(),
        "packages": {name: _version(name) or "not installed" for name in PACKAGES},
        "optional": {
            name: _version(name) or f"not installed; run: pip install 'trifuse[{extra}]'"
            for name, extra in OPTIONAL.items()
        },
        "triton": _triton(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "operators": [_operator(name, device, dtype) for name in OPERATORS for device, dtype in _places()],
    }


def format_findings(findings: dict[str, Any]) -> str:
    """Return the findings as lines to read."""
    lines = []
    for title in ("machine", "packages", "optional", "environment"):
        if findings[title]:
            lines += [title, *(f"  {name:<18} {value}" for name, value in findings[title].items())]
    lines += ["triton", f"  {findings['triton']}", "operators"]
    for row in findings["operators"]:
        lines.append(f"  {row['operator']:<28} {row['device']:<8} {row['dtype']:<9} {row['backend']}: {row['reason']}")
    return "\n".join(lines)


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "gpus": ", ".join(gpus) or "none",
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in the working folder",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _triton() -> str:
    """Compare the installed triton with the one that torch was built for."""
    installed = _version("triton")
    pins = [re.search(r"^triton\s*==\s*([\w.]+)", requirement) for requirement in requires("torch") or ()]
    wanted = next((pin[1] for pin in pins if pin), None)
    if installed is None:
        return "not installed: GPU tensors use plain PyTorch"
    if wanted is None:
        return f"{installed}; this torch names no version of its own"
    if installed == wanted:
        return f"{installed}, the version that this torch asks for"
    return f"{installed}, but this torch asks for {wanted}; run: pip install triton=={wanted}"


def _places() -> list[tuple[torch.device, torch.dtype]]:
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [(device, dtype) for device in devices for dtype in TRITON_DTYPES]


def _operator(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    choose = attention_backend if name == "memory_efficient_attention" else default_backend
    backend, reason = choose(device, dtype)
    kind = str(dtype).removeprefix("torch.")
    return {"operator": name, "device": str(device), "dtype": kind, "backend": backend, "reason": reason}
