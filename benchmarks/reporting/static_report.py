"""What every Triton kernel costs on GPUs that are not here, and how fast its passes could be there: `make kernels`.

    python -m trifuse.benchmarks.reporting.static_report --out FOLDER

compiles every case of `trifuse.benchmarks.static_cases` for every architecture and writes ``kernels.json``, with
everything, and ``kernels.md``, the tables of the documentation. Nothing in them is a measurement on a GPU: registers,
loads and the like are read from machine code, and occupancy, bytes and floors are computed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from trifuse.architectures.storage.atomic_files import write_text
from trifuse.benchmarks.static_cases.case import StaticCase, Traffic
from trifuse.kernels.testing.machine import commit

from .ahead_of_time import BUDGETS, NVIDIA_TARGETS, TARGETS, case_modules, functions_of

LABEL = "computed, nothing here was measured on a GPU"
# Assumed ceilings: bytes, float32 multiply-adds and exponentials per second.
BYTES_PER_SECOND = 4.3e12
PER_SECOND = {"multiply-adds": 30e12, "exponentials": 3.6e12}
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor, or one of AMD's compute units, can hold at a time.

    NVIDIA: the table of technical specifications per compute capability in the CUDA C++ Programming Guide, and the
    granules of the occupancy calculator of Nsight Compute. AMD: the CDNA3 ISA guide (four SIMDs, each of 512 vector
    registers per lane, which serve accumulation as well, and 8 waves).

    Args:
        warps: warps, or waves.
        programs: blocks, or work-groups.
        registers: of one lane of a warp's place, over all warps: a warp of r registers takes r of them.
        granule: registers are given to a warp in multiples of it.
        parts: partitions among which warps and registers are split.
        shared_bytes: shared memory.
        reserved_bytes: shared memory that each program takes beside its own.
    """

    warps: int
    programs: int
    registers: int
    granule: int
    parts: int
    shared_bytes: int
    reserved_bytes: int


LIMITS = {
    "sm_80": Limits(64, 32, 2048, 8, 4, 164 << 10, 1024),
    "sm_90": Limits(64, 32, 2048, 8, 4, 228 << 10, 1024),
    "sm_100": Limits(64, 32, 2048, 8, 4, 228 << 10, 1024),
    "sm_120": Limits(48, 24, 2048, 8, 4, 100 << 10, 1024),
    "gfx942": Limits(32, 16, 2048, 8, 4, 64 << 10, 0),
}


def occupancy(registers: int, shared_bytes: int, threads: int, target: str) -> float:
    """Estimate which share of its warps a multiprocessor can hold of a kernel."""
    limits = LIMITS[target]
    warps = threads // (32 if target in NVIDIA_TARGETS else 64)
    each = max(1, math.ceil(registers / limits.granule)) * limits.granule
    by_registers = min(limits.warps, limits.registers // limits.parts // each * limits.parts) // warps
    by_shared = limits.shared_bytes // (shared_bytes + limits.reserved_bytes) if shared_bytes else limits.programs
    return min(by_registers, by_shared, limits.programs, limits.warps // warps) * warps / limits.warps


def source_hash(case: StaticCase) -> str:
    """Return a hash of what a case compiles: its kernel's code, types, and constants."""
    settings = (_code_of(case.kernel), list(case.signature.items()), sorted(case.constants.items(), key=repr))
    return _hash_of((settings, case.aligned, case.threads))


def kernel_hash(kernel: Any) -> str:
    """Return a hash of a kernel's code."""
    return _hash_of(_code_of(kernel))


def _code_of(kernel: Any) -> list[tuple[str, str]]:
    """Return the code of a kernel and of all that it calls, by name; without comments, wherever it stands."""
    seen: dict[str, str] = {}
    for function in functions_of(kernel):
        python = function.fn
        name = f"{python.__module__}.{python.__qualname__}"
        tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(python)).readline)
        seen[name] = " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))
        for word in python.__code__.co_names:
            value = python.__globals__.get(word)
            if hasattr(value, "value"):
                seen[f"{name}: {word}"] = repr(value.value)
    return sorted(seen.items())


def _hash_of(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def pass_row(module: str, traffic: Traffic) -> dict[str, Any]:
    """Compute what a pass moves, and how long it takes at least."""
    elements = traffic.evaluate(traffic.elements)
    moved, least = (traffic.evaluate(formula) for formula in (traffic.moved, traffic.least))
    microseconds = 1e6 * elements / BYTES_PER_SECOND
    work = {
        name: round(1e6 * elements * traffic.evaluate(formula) / PER_SECOND[name], 2)
        for name, formula in traffic.work.items()
    }
    return {
        "module": module,
        "pass": traffic.name,
        "sizes": dict(traffic.sizes),
        "bytes_per_element": round(moved, 3),
        "least_bytes_per_element": round(least, 3),
        "moved_us": round(moved * microseconds, 2),
        "floor_us": round(least * microseconds, 2),
        "work_us": work,
    }


def pass_line(row: dict[str, Any]) -> str:
    """Write the figures of a pass as they stand in the docstring of its kernels' file."""
    sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items() if name.isupper())
    others = "".join(f"; {name} {value:.1f} us" for name, value in row["work_us"].items())
    return (
        f"{row['pass']}, {sizes}: {row['bytes_per_element']:.2f} bytes per element, least "
        f"{row['least_bytes_per_element']:.2f}; {row['moved_us']:.1f} us, floor {row['floor_us']:.1f} us{others}"
    )


def stamp() -> dict[str, str]:
    """Return what compiled the kernels; nothing here depends on the machine."""
    return {"torch": torch.__version__, "triton": importlib.metadata.version("triton"), "commit": commit()}


def report(compiled: dict[str, Any], stamp: dict[str, str]) -> dict[str, Any]:
    """Return the report: what was compiled, and what is computed from it."""
    modules = case_modules()
    kernels = []
    for (module, name), rows in groupby(compiled["rows"], key=lambda row: (row["module"], row["case"])):
        case = next(case for case in modules[module].STATIC_CASES if case.name == name)
        costs = {row["target"]: row["cost"] for row in rows}
        for target, cost in costs.items():
            share = occupancy(cost["registers"], cost["shared_bytes"], case.threads, target)
            costs[target] = {**cost, "occupancy": round(share, 3)}
        kernels.append(
            {"module": module, "case": name, "threads": case.threads, "source": source_hash(case), "costs": costs}
        )
    passes = [pass_row(name, traffic) for name, module in modules.items() for traffic in module.TRAFFIC]
    return {"label": LABEL, "stamp": stamp, "kernels": kernels, "passes": passes}


def markdown(record: dict[str, Any]) -> str:
    """Return the report as the documentation shows it: what the kernels cost, and what the passes move."""
    stamp = record["stamp"]
    return "\n".join(
        [
            f"Machine code of triton {stamp['triton']}, torch {stamp['torch']}, commit {stamp['commit']}; "
            f"{record['label']}. Five numbers are for {', '.join(TARGETS)}; two for NVIDIA's and AMD's, one for all.",
            "",
            *_kernel_lines(record["kernels"]),
            "",
            f"Bytes per element moved and floors at {BYTES_PER_SECOND / 1e12:g} TB/s, at the shapes of the papers; "
            f"{record['label']}.",
            "",
            *_pass_lines(record["passes"]),
            "",
        ]
    )


def _kernel_lines(kernels: list[dict[str, Any]]) -> Iterator[str]:
    yield "| kernel | case | registers | occupancy, % | wide loads | shuffles | shared bytes |"
    yield "|---|---|---|---|---|---|---|"
    for module, rows in groupby(kernels, key=lambda row: row["module"]):
        for place, row in enumerate(rows):
            costs = [row["costs"][target] for target in TARGETS]
            cells = [
                f"`{module}`" if place == 0 else "",
                row["case"],
                _each(cost["registers"] for cost in costs),
                _each(round(100 * cost["occupancy"]) for cost in costs),
                _each(sum(count for bits, count in cost["loads"].items() if int(bits) >= 128) for cost in costs),
                _each(cost["shuffles"] for cost in costs),
                _each(cost["shared_bytes"] for cost in costs),
            ]
            yield f"| {' | '.join(cells)} |"


def _each(values: Iterable[int]) -> str:
    """Return the numbers of all architectures; of NVIDIA's and AMD's, or of all, only one where they share it."""
    *nvidia, amd = [str(value) for value in values]
    if len(set(nvidia)) == 1:
        nvidia = nvidia[:1]
    return amd if nvidia == [amd] else "/".join([*nvidia, amd])


def _pass_lines(passes: list[dict[str, Any]]) -> Iterator[str]:
    yield "| pass | shape | bytes per element | least | at full bandwidth, us | floor, us | other floors, us |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for row in passes:
        sizes = ", ".join(f"{name} {size}" for name, size in row["sizes"].items() if name.isupper())
        cells = [
            f"{row['module']}, {row['pass']}",
            sizes,
            f"{row['bytes_per_element']:.2f}",
            f"{row['least_bytes_per_element']:.2f}",
            f"{row['moved_us']:.1f}",
            f"{row['floor_us']:.1f}",
            ", ".join(f"{name} {value:.1f}" for name, value in row["work_us"].items()),
        ]
        yield f"| {' | '.join(cells)} |"


def _compile_everything() -> dict[str, Any]:
    """Compile in a process of its own: this one may run Triton's interpreter, whose functions cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    names = [module.__name__ for module in case_modules().values()]
    command = [sys.executable, "-m", "trifuse.benchmarks.reporting.ahead_of_time", str(BUDGETS), *names]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the tables, and write them; returns 1 where a kernel breaks a rule."""
    parser = argparse.ArgumentParser(description="what every Triton kernel costs, read from its machine code")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for kernels.json and kernels.md")
    options = parser.parse_args(arguments)
    compiled = _compile_everything()
    record = report(compiled, stamp())
    text = markdown(record)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "kernels.json", json.dumps(record, indent=1) + "\n")
    write_text(options.out / "kernels.md", text)
    print(text)
    faults = [*compiled["without_a_case"], *compiled["mismatches"]]
    for row in compiled["rows"]:
        faults += [f"{row['module']}, {row['case']} on {row['target']}: {r}: {m}" for r, m in row["broken"].items()]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
