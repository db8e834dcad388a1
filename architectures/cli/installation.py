"""What is installed, which backend each operator would use here and why, and what was tuned: the first thing to ask."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from trifuse.kernels import OPERATORS, upsample_argmax
from trifuse.kernels.gpu import tuning
from trifuse.kernels.library import TRITON_DTYPES, WITHOUT_KERNELS, default_backend
from trifuse.kernels.ops.memory_efficient_attention import attention_backend
from trifuse.kernels.tested_versions import (
    HOLD_FOR,
    VERSIONS,
    VIRTUAL_GPU,
    describe_others,
    describe_pair,
    describe_virtual_gpu,
    numpy_remedy,
    read_verdicts,
)

from .arguments import EXTRAS

PACKAGES = ("trifuse", "torch", "triton", "xformers", "numpy", "einops", "safetensors", "nibabel")
VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRIFUSE_CACHE")


def examine() -> dict[str, Any]:
    """Return what there is to know, as JSON values."""
    return {
        "machine": _machine(),
        "packages": {name: _version(name) or "not installed" for name in PACKAGES},
        "optional": {
            name: _version(name) or f"not installed; run: pip install 'trifuse[{extra}]'"
            for name, extra in EXTRAS.items()
        },
        "triton": "; ".join([_triton(), *(_trial(device) for device in _gpus())]),
        "tested": _tested(),
        "tuning": _tuning(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "operators": [_operator(name, device, dtype) for name in OPERATORS for device, dtype in _places()],
    }


def format_findings(findings: dict[str, Any]) -> str:
    """Return the findings as lines to read."""
    lines = []
    for title in ("machine", "packages", "optional", "tested", "environment"):
        if findings[title]:
            lines += [title, *(f"  {name:<18} {value}" for name, value in findings[title].items())]
    lines += ["triton", f"  {findings['triton']}", "tuning", f"  {findings['tuning']}", "operators"]
    lines += [f"  {line}" for line in _grouped(findings["operators"])]
    return "\n".join(lines)


def _grouped(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for the operators of a device that run alike, by name; the last and largest group is the others."""
    types: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        types.setdefault(tuple(row[name] for name in ("device", "operator", "backend", "reason")), []).append(
            row["dtype"]
        )
    groups: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for (device, operator, backend, reason), dtypes in types.items():
        groups.setdefault(device, {}).setdefault((", ".join(dtypes), backend, reason), []).append(operator)
    for device, alike in groups.items():
        most = max(alike, key=lambda kind: len(alike[kind]))
        for kind in sorted(alike, key=lambda kind: kind == most):
            written, backend, reason = kind
            names = ", ".join(alike[kind]) if kind != most else "all others" if len(alike) > 1 else "all operators"
            yield f"{device:<8} {written:<26} {backend}: {reason} ({names})"


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "gpus": ", ".join(gpus) or "none",
        "C++ compiler": _compiler(),
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in the working folder",
    }


def _compiler() -> str:
    """Return the compiler with which the virtual GPU is built, found as Triton finds it, if it compiles C++."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return 0; }\n")
        command = [compiler or "", "-std=c++20", "-fsyntax-only", str(source)]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            found = f"{compiler} compiles no C++20" if compiler else "none"
            return f"{found}; the virtual GPU needs g++ 10 or clang 12, with Debian: apt-get install g++"
    return str(compiler)


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


def _tested() -> dict[str, str]:
    """Say what came of the tests with the installed versions, and of the kernels on the virtual GPU."""
    torch, triton, numpy = (_version(name) or "none" for name in ("torch", "triton", "numpy"))
    verdicts = read_verdicts(VERSIONS)
    found = {"versions": describe_pair(torch, triton, verdicts)}
    if others := describe_others(verdicts):
        found["other packages"] = others
    if remedy := numpy_remedy(triton, numpy):
        found["numpy"] = remedy
    if calls := read_verdicts(VIRTUAL_GPU):
        found["virtual GPU"] = describe_virtual_gpu(calls)
        found["without kernels"] = f"{', '.join(sorted(WITHOUT_KERNELS))}: no kernel of ours, so not among these calls"
    found["note"] = HOLD_FOR
    return found


def _trial(device: torch.device) -> str:
    """Build and run the smallest kernel: whether that works is not known before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        upsample_argmax([torch.zeros(1, 1, 1, 1, device=device)], (1, 1))
    chosen, reason = default_backend(device, torch.float32, "upsample_argmax")
    return f"a kernel ran on {device}" if chosen == "triton" else f"no kernel runs on {device}: {reason}"


def _tuning() -> str:
    file, count = tuning.cache_file(), len(tuning.known())
    return f"choices kept in {file}: {count or 'none; trifuse.kernels.warm_up finds them'}"


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _places() -> list[tuple[torch.device, torch.dtype]]:
    return [(device, dtype) for device in [torch.device("cpu"), *_gpus()] for dtype in TRITON_DTYPES]


def _operator(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    if name == "memory_efficient_attention":
        backend, reason = attention_backend(device, dtype)
    else:
        backend, reason = default_backend(device, dtype, name)
    kind = str(dtype).removeprefix("torch.")
    return {"operator": name, "device": str(device), "dtype": kind, "backend": backend, "reason": reason}
