"""What a figure was measured on: the device, the versions, and the two ceilings under which every kernel lives."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trifuse.kernels.library import default_backend, fallbacks

from .measuring import measure

MIB = 1 << 20
CEILING_SECONDS = 0.3  # to spend on measuring each ceiling


def default_device() -> torch.device:
    """Return the device that benchmarks run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def identity(device: torch.device) -> dict[str, Any]:
    """Describe a machine and what is installed on it, by what can be looked up."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": _said_by("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "threads": torch.get_num_threads(),
        "backend": _backend(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("triton", "transformers", "trifuse")},
        "commit": commit(),
    }


def stamp(device: torch.device) -> dict[str, Any]:
    """Describe what a figure was measured on, so that nobody compares it with one from elsewhere.

    Besides the machine's identity these are its ceilings, measured once in a process: GB/s of a copy, read plus
    written, and GFLOP/s of a matrix product in float32, on a GPU also in bfloat16; and the operators whose kernels
    could not be built in this process up to now, with the reason.
    """
    return {**_with_ceilings(device), "backend": _backend(device), "fallbacks": fallbacks()}


@cache
def _with_ceilings(device: torch.device) -> dict[str, Any]:
    return {
        **identity(device),
        "copy_gb_per_s": round(_copy_bandwidth(device), 1),
        "float32_gflop_per_s": round(_product_rate(device, torch.float32)),
        "bfloat16_gflop_per_s": round(_product_rate(device, torch.bfloat16)) if device.type == "cuda" else None,
    }


def share_of_ceiling(
    device: torch.device, dtype: torch.dtype, gb_per_s: float | None, gflop_per_s: float | None
) -> float | None:
    """Return the larger of two shares: of the copy bandwidth, and of the rate of matrix products in that type.

    A computation whose data stay in a cache can exceed the copy bandwidth, and so this share exceed 1.
    """
    machine = stamp(device)
    halved = dtype in (torch.bfloat16, torch.float16) and machine["bfloat16_gflop_per_s"]
    shares = [
        reached / machine[ceiling]
        for reached, ceiling in (
            (gb_per_s, "copy_gb_per_s"),
            (gflop_per_s, "bfloat16_gflop_per_s" if halved else "float32_gflop_per_s"),
        )
        if reached is not None
    ]
    return max(shares, default=None)


def _copy_bandwidth(device: torch.device) -> float:
    elements = (256 if device.type == "cuda" else 64) * MIB // 4
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    copied = measure({"copy": lambda: target.copy_(source)}, device=device, seconds=CEILING_SECONDS)["copy"]
    return 2 * source.nbytes / copied.median / 1e9


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure({"product": lambda: left @ right}, device=device, seconds=CEILING_SECONDS)["product"]
    return 2 * side**3 / product.median / 1e9


def _backend(device: torch.device) -> str:
    """Return the backend that operators choose on a device."""
    return default_backend(device, torch.float32)[0]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit that is measured: what TRIFUSE_COMMIT says, or what git says of this very file."""
    if "TRIFUSE_COMMIT" in os.environ:
        return os.environ["TRIFUSE_COMMIT"]
    git = ("git", "-C", str(Path(__file__).parent))
    # An installed copy may lie inside of somebody's own repository, whose commit says nothing about it.
    if not _said_by(*git, "ls-files", "--", Path(__file__).name):
        return f"unknown, trifuse {_version('trifuse')}"
    # Result files are what is written here, not what is measured.
    measured = (":(top)", ":(top,exclude)benchmarks/results")
    changed = _said_by(*git, "status", "--porcelain", "-uno", "--", *measured)
    return _said_by(*git, "rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _said_by(*command: str) -> str:
    """Return what a program prints, or nothing if there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":  # for a program that describes the machine of its children
    print(json.dumps(identity(torch.device("cpu"))))
