"""Compile Triton kernels for GPUs that are not here, and read what they cost from the machine code.

Run as a script, without TRITON_INTERPRET: it compiles the ``STATIC_CASES`` of the modules named on the command line and
prints JSON: one row per case and target with its cost and the rules it breaks, and the kernels that have no case.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trifuse.kernels.gpu.static_case import Budget, StaticCase

PROCESSES = 2


@dataclass(frozen=True)
class Cost:
    """What one kernel costs on one target, per thread or as instructions in the code."""

    registers: int
    spills: int
    wide_loads: int
    shuffles: int
    atomics: int
    shared_bytes: int


def compile_case(case: StaticCase, target: str) -> Cost:
    """Compile one case for one target and read its cost."""
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constants),
        attrs={path: [["tt.divisibility", 16]] for path in _aligned_paths(case)},
    )
    compiled = triton.compile(source, target=gpu, options={"num_warps": case.threads // gpu.warp_size})
    if nvidia:
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _aligned_paths(case: StaticCase) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for position, (name, kind) in enumerate(case.signature.items()):
        if name in case.aligned:
            elements = [] if isinstance(kind, str) else [k for k, part in enumerate(kind) if part != "constexpr"]
            paths += [(position,)] if isinstance(kind, str) else [(position, k) for k in elements]
    return paths


def _read_cubin(cubin: bytes, shared_bytes: int) -> Cost:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", stream.name])
        code = _output([tools / "nvdisasm", "-c", stream.name])
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Cost(
        registers=registers,
        spills=stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.E[\w.]*\.(?:128|256)\b", code)),
        shuffles=len(re.findall(r"\bSHFL\b", code)),
        atomics=len(re.findall(r"\b(?:REDG?|ATOMG?|ATOMS)\.", code)),
        shared_bytes=shared_bytes,
    )


def _read_amdgcn(code: str, shared_bytes: int) -> Cost:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return Cost(
        registers=field("vgpr_count"),
        # Scalar registers that run out go to lanes of a vector register, which are counted above, not to memory.
        spills=field("vgpr_spill_count") + field("private_segment_fixed_size"),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        shuffles=len(re.findall(r"\bds_(?:b?permute|swizzle)\w*|_dpp\b|\bv_permlane\w*", code)),
        atomics=len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w+", code)),
        shared_bytes=shared_bytes,
    )


def _output(command: list[object]) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def broken_rules(cost: Cost, budget: Budget) -> dict[str, str]:
    """Name each rule that a kernel breaks, with what it costs and what it may cost."""
    rules = {
        "spills": (cost.spills == 0, f"{cost.spills}, none allowed"),
        "atomics": (cost.atomics == 0, f"{cost.atomics}, none allowed"),
        "registers": (cost.registers <= budget.registers, f"{cost.registers}, at most {budget.registers}"),
        "wide loads": (cost.wide_loads >= budget.wide_loads, f"{cost.wide_loads}, at least {budget.wide_loads}"),
        "shuffles": (cost.shuffles <= budget.shuffles, f"{cost.shuffles}, at most {budget.shuffles}"),
    }
    return {rule: message for rule, (kept, message) in rules.items() if not kept}


def kernels_without_a_case(module: ModuleType) -> list[str]:
    """Name the Triton kernels of a module that no case compiles; a kernel is a jit function named ``*_kernel``."""
    compiled = {case.kernel for case in module.STATIC_CASES}
    return [
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value not in compiled
    ]


def _row(job: tuple[str, int, str]) -> dict[str, object]:
    module, index, target = job
    case = importlib.import_module(module).STATIC_CASES[index]
    cost = compile_case(case, target)
    broken = broken_rules(cost, case.budgets[target])
    return {"module": module, "case": case.name, "target": target, "cost": asdict(cost), "broken": broken}


def main(names: list[str]) -> None:
    modules = {name: importlib.import_module(name) for name in names}
    jobs = [
        (name, index, target)
        for name, module in modules.items()
        for index, case in enumerate(module.STATIC_CASES)
        for target in case.budgets
    ]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(_row, jobs))
    without = [kernel for module in modules.values() for kernel in kernels_without_a_case(module)]
    print(json.dumps({"rows": rows, "without_a_case": without}))


if __name__ == "__main__":
    main(sys.argv[1:])
