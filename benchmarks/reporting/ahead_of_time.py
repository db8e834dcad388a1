"""Compile Triton kernels for GPUs that are not here, and read what they cost from the machine code.

    python -m trifuse.benchmarks.reporting.ahead_of_time BUDGETS.csv MODULE ...

compiles the ``STATIC_CASES`` of the modules, without TRITON_INTERPRET, and prints JSON: one row per case and target
with its cost and the rules it breaks; the kernels beside the compiled ones that have no case; and where cases and
table do not match. Triton's cache keeps what was compiled, and beside it what was read, so that a second run is a
matter of seconds.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trifuse.benchmarks import static_cases
from trifuse.benchmarks.static_cases.case import StaticCase

NVIDIA_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
TARGETS = (*NVIDIA_TARGETS, "gfx942")
BUDGETS = Path(__file__).parents[1] / "static_cases" / "kernel_budgets.csv"
WIDE_BITS = 128
BUDGETED_TRITON = "3.7.1"  # whose machine code the table counts; another one allocates registers in its own way
OF_ANY_TRITON = ("spills", "atomics")  # rules that a kernel keeps whichever Triton compiles it
READER = 1  # of the costs that the cache keeps: another number reads them anew


@dataclass(frozen=True)
class Cost:
    """What one kernel costs on one target, per thread or as instructions in the code.

    Args:
        registers: per thread; on AMD's GPUs vector registers, those for matrix products included.
        spills: bytes of stack and private memory, and the instructions that touch them.
        loads: instructions that load from global memory, by their width in bits.
        shuffles: exchanges between the threads of a warp.
        atomics: atomic instructions of any kind.
        shared_bytes: shared memory of a program.
    """

    registers: int
    spills: int
    loads: dict[int, int]
    shuffles: int
    atomics: int
    shared_bytes: int

    @property
    def wide_loads(self) -> int:
        """Instructions that load 16 bytes or more."""
        return sum(count for bits, count in self.loads.items() if bits >= WIDE_BITS)


@dataclass(frozen=True)
class Budget:
    """What a case may cost: one line of the table. No kernel may spill or use atomics, whatever its budget.

    Args:
        registers: most registers per thread, by target; a target that is missing is not compiled for.
        wide_loads: fewest loads of 16 bytes.
        shuffles_nvidia: most shuffles on NVIDIA's GPUs.
        shuffles_amd: most shuffles on AMD's.
        shared_bytes: most shared memory of a program.
    """

    registers: dict[str, int]
    wide_loads: int
    shuffles_nvidia: int
    shuffles_amd: int
    shared_bytes: int


def case_modules() -> dict[str, ModuleType]:
    """Return the modules of static cases, by the name that they share with the file of their kernels."""
    found = [name for _, name, _ in pkgutil.iter_modules(static_cases.__path__) if name != "case"]
    return {name: importlib.import_module(f"{static_cases.__name__}.{name}") for name in found}


def read_budgets(path: Path = BUDGETS) -> dict[tuple[str, str], Budget]:
    """Read the table of budgets, by the last word of the module and the name of the case."""
    budgets: dict[tuple[str, str], Budget] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            key = (row["module"], row["case"])
            if key in budgets:
                raise ValueError(f"{path.name} has two rows for {key}; keep one")
            counts = (int(row[name]) for name in ("wide_loads", "shuffles_nvidia", "shuffles_amd", "shared_bytes"))
            budgets[key] = Budget({target: int(row[target]) for target in TARGETS if row[target]}, *counts)
    return budgets


def mismatches(modules: Iterable[ModuleType], budgets: Iterable[tuple[str, str]]) -> list[str]:
    """Return which cases have no row in the table or share one, and which rows of these modules have no case."""
    cases = Counter((_name(module), case.name) for module in modules for case in module.STATIC_CASES)
    rows = {key for key in budgets if key[0] in {module for module, _ in cases}}
    return [
        *(f"no budget: {module}, {case}" for module, case in sorted(cases.keys() - rows)),
        *(f"no case: {module}, {case}" for module, case in sorted(rows - cases.keys())),
        *(f"one name for {count} cases: {module}, {case}" for (module, case), count in cases.items() if count > 1),
    ]


def broken_rules(cost: Cost, budget: Budget, target: str) -> dict[str, str]:
    """Name each rule that a kernel breaks on a target, with what it costs and what it may cost."""
    shuffles = budget.shuffles_nvidia if target in NVIDIA_TARGETS else budget.shuffles_amd
    most = {
        "spills": (cost.spills, 0),
        "atomics": (cost.atomics, 0),
        "registers": (cost.registers, budget.registers[target]),
        "shuffles": (cost.shuffles, shuffles),
        "shared bytes": (cost.shared_bytes, budget.shared_bytes),
    }
    broken = {rule: f"{found}, at most {allowed}" for rule, (found, allowed) in most.items() if found > allowed}
    if cost.wide_loads < budget.wide_loads:
        broken["wide loads"] = f"{cost.wide_loads}, at least {budget.wide_loads}"
    return broken


def rules_that_hold(broken: dict[str, str], triton: str) -> dict[str, str]:
    """Leave out the broken rules that do not hold for the code of a Triton other than the one of the budgets."""
    return {rule: text for rule, text in broken.items() if triton == BUDGETED_TRITON or rule in OF_ANY_TRITON}


def compile_case(case: StaticCase, target: str) -> Cost:
    """Compile one case for one target and read its cost."""
    attributes = {path: [["tt.divisibility", 16]] for path in _aligned_paths(case)}
    facts = {"signature": dict(case.signature), "constexprs": dict(case.constants), "attrs": attributes}
    return compile_source(case.kernel, facts, case.threads, target)


def compile_source(kernel: Any, facts: Mapping[str, Any], threads: int, target: str) -> Cost:
    """Compile a kernel for one target and read its cost.

    Args:
        kernel: the ``triton.jit`` function.
        facts: what Triton compiles it for: ``signature``, ``constexprs`` and ``attrs``.
        threads: per program.
        target: one of `TARGETS`.
    """
    from trifuse.kernels.gpu.triton_internals import ASTSource, GPUTarget, compilation, compile_kernel

    for function in functions_of(kernel):
        # Without line information the code is the same wherever it stands; the cache shall not take it for another.
        function.starting_line_number = 0
    nvidia = target in NVIDIA_TARGETS
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    source = ASTSource(fn=kernel, **facts)
    with compilation.scope():
        compilation.disable_line_info = True
        compilation.store_binary_only = nvidia  # AMD's code is read as text, which is a stage of its own
        warps = max(1, threads // gpu.warp_size)  # a program of one warp of NVIDIA's is one wave of AMD's
        compiled = compile_kernel(source, target=gpu, options={"num_warps": warps})
    code = compiled.asm["cubin" if nvidia else "amdgcn"]
    return _cost_of(code, compiled.metadata.shared)


def functions_of(kernel: Any) -> list[Any]:
    """Return a kernel, and all jit functions that it calls, directly or through others."""
    found = [kernel]
    for function in found:  # which grows on the way
        names = sorted(function.fn.__code__.co_names)
        called = [function.fn.__globals__.get(name) for name in names]
        found += [value for value in called if hasattr(value, "arg_names") and value not in found]
    return found


def _aligned_paths(case: StaticCase) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for position, (name, kind) in enumerate(case.signature.items()):
        if name in case.aligned:
            elements = [] if isinstance(kind, str) else [k for k, part in enumerate(kind) if part != "constexpr"]
            paths += [(position,)] if isinstance(kind, str) else [(position, k) for k in elements]
    return paths


def _cost_of(code: bytes | str, shared_bytes: int) -> Cost:
    """Read a cost from machine code, or from where it was written down when the same code was read before."""
    from trifuse.kernels.gpu.triton_internals import get_cache_manager

    text = code if isinstance(code, bytes) else code.encode()
    kept = get_cache_manager(hashlib.sha256(text + f"{READER} {shared_bytes}".encode()).hexdigest())
    if (path := kept.get_file("cost.json")) is None:
        cost = _read_cubin(code, shared_bytes) if isinstance(code, bytes) else _read_amdgcn(code, shared_bytes)
        path = kept.put(json.dumps(asdict(cost)), "cost.json", binary=False)
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    return Cost(**record | {"loads": {int(bits): count for bits, count in record["loads"].items()}})


def _read_cubin(cubin: bytes, shared_bytes: int) -> Cost:
    from trifuse.kernels.gpu.triton_internals import NVIDIA_TOOLS

    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        usage = _output([NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", stream.name])
        code = _output([NVIDIA_TOOLS / "nvdisasm", "-c", "-ndf", stream.name])
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    widths = (re.search(r"\.(?:(?P<bits>64|128|256)|[US](?P<small>8|16))\b", name) for name in _names(r"LDG\.E", code))
    return Cost(
        registers=registers,
        spills=stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads=_counted(int(width["bits"] or width["small"]) if width else 32 for width in widths),
        shuffles=len(re.findall(r"\bSHFL\b", code)),
        atomics=len(re.findall(r"\b(?:REDG?|ATOMG?|ATOMS)\.", code)),
        shared_bytes=shared_bytes,
    )


def _read_amdgcn(code: str, shared_bytes: int) -> Cost:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "byte": 8, "short": 16}
    loads = re.findall(r"\b(?:global|buffer)_load_(?:lds_)?[us]?(dword(?:x\d)?|byte|short)", code)
    return Cost(
        registers=field("vgpr_count"),
        # Scalar registers that run out go to lanes of a vector register, which are counted above, not to memory.
        spills=field("vgpr_spill_count") + field("private_segment_fixed_size"),
        loads=_counted(bits[width] for width in loads),
        shuffles=len(re.findall(r"\bds_(?:b?permute|swizzle)\w*|_dpp\b|\bv_permlane\w*", code)),
        atomics=len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w+", code)),
        shared_bytes=shared_bytes,
    )


def _names(start: str, code: str) -> list[str]:
    return re.findall(rf"\b{start}[\w.]*", code)


def _counted(widths: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(widths).items(), reverse=True))


def _output(command: list[object]) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """Return the Triton kernels of a module by name; a kernel is a jit function named ``*_kernel``."""
    return {
        name: value for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def kernels_without_a_case(module: ModuleType) -> list[str]:
    """Name the kernels that no case of a module compiles, of the files whose kernels its cases compile."""
    compiled = {case.kernel for case in module.STATIC_CASES}
    files = dict.fromkeys(kernel.fn.__module__ for kernel in compiled)
    return [
        f"{file}.{name}"
        for file in files
        for name, kernel in kernels_of(sys.modules[file]).items()
        if kernel not in compiled
    ]


def compile_modules(names: Sequence[str], budgets: Path = BUDGETS) -> dict[str, Any]:
    """Compile every case of some modules for every target that it has a budget for, on all cores."""
    modules = [importlib.import_module(name) for name in names]
    table = read_budgets(budgets)
    jobs = [
        (module.__name__, index, target, table[key])
        for module in modules
        for index, case in enumerate(module.STATIC_CASES)
        if (key := (_name(module), case.name)) in table
        for target in table[key].registers
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(_row, jobs))
    return {
        "rows": rows,
        "without_a_case": [kernel for module in modules for kernel in kernels_without_a_case(module)],
        "mismatches": mismatches(modules, table),
    }


def _row(job: tuple[str, int, str, Budget]) -> dict[str, Any]:
    name, index, target, budget = job
    module = importlib.import_module(name)
    case = module.STATIC_CASES[index]
    cost = compile_case(case, target)
    broken = rules_that_hold(broken_rules(cost, budget, target), importlib.metadata.version("triton"))
    return {"module": _name(module), "case": case.name, "target": target, "cost": asdict(cost), "broken": broken}


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


if __name__ == "__main__":
    print(json.dumps(compile_modules(sys.argv[2:], Path(sys.argv[1]))))
