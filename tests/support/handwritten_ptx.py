"""Kernels written in PTX, run on the machine without Triton's compiler."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from trifuse.kernels.testing.emulator.allocations import Allocations
from trifuse.kernels.testing.emulator.arguments import Arguments, bind
from trifuse.kernels.testing.emulator.findings import Finding
from trifuse.kernels.testing.emulator.machine import Program
from trifuse.kernels.testing.emulator.ptx import Kernel, read_ptx
from trifuse.kernels.testing.emulator.reports import finding_of

HEAD = """
.visible .entry kernel(
{parameters}
)
{{
	.reg .pred %p<16>;
	.reg .b16 %rs<16>;
	.reg .b32 %r<32>;
	.reg .b64 %rd<32>;
	.loc 1 7 0
	mov.u32 %r0, %tid.x;
{body}
	ret;
}}
	.file 1 "kernel.py"
"""


def kernel_of(body: str, tensors: int) -> Kernel:
    """Return a kernel with a pointer in %rd0, %rd1, ... for each tensor, and the thread in %r0."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 kernel_param_{k}" for k in range(tensors))
    loads = "\n".join(f"ld.param.b64 %rd{k}, [kernel_param_{k}];" for k in range(tensors))
    return read_ptx(HEAD.format(parameters=parameters, body=f"{loads}\n{body}"))


def run(
    body: str,
    *tensors: Tensor,
    warps: int = 1,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    most_instructions: int = 10_000,
) -> list[Finding]:
    """Run a kernel's body on tensors, and return what was found."""
    kernel = kernel_of(body, len(tensors))
    signature = {f"t{k}": "*i8" for k in range(len(tensors))}
    arguments: Arguments = bind(kernel, signature, tensors, Allocations())
    program = Program(kernel, warps, shared_bytes)
    records, _ = program.run(grid, arguments.parameters, arguments.memories, random.Random(0), False, most_instructions)
    return [finding_of(kernel, grid, arguments, record) for record in records]


WIDTHS = {"rs": 16, "r": 32, "rd": 64, "p": 8}


def compute(instruction: str, output: str, *inputs: tuple[str, Sequence[int]]) -> list[int]:
    """Compute one instruction for lanes with these bits, and return the bits of its result.

    Args:
        instruction: such as ``"add.s32"``; what follows an operand list may be given after a comma.
        output: kind of the result's register: ``"rs"``, ``"r"``, ``"rd"`` or ``"p"``.
        inputs: kind of each source's register, and the bits of each lane.
    """
    name, _, rest = instruction.partition(",")
    lines = []
    tensors = [torch.zeros(32, dtype=torch.int64)]
    for k, (kind, values) in enumerate(inputs, 1):
        lanes = [*values, *[0] * (32 - len(values))]
        tensors.append(torch.tensor([v - (1 << 64) if v >= 1 << 63 else v for v in lanes]))
        register = f"%{kind}{k}"
        lines += [f"mad.wide.u32 %rd{20 + k}, %r0, 8, %rd{k};"]
        if kind == "p":
            lines += [f"ld.global.b32 %r{20 + k}, [%rd{20 + k}];", f"setp.ne.b32 {register}, %r{20 + k}, 0;"]
        else:
            source = f"%rd{10 + k}" if kind == "rd" else register
            lines += [f"ld.global.b{WIDTHS[kind]} {source}, [%rd{20 + k}];"]
    sources = ", ".join(f"%{kind}{10 + k if kind == 'rd' else k}" for k, (kind, _) in enumerate(inputs, 1))
    result = "%rd10" if output == "rd" else f"%{output}15" if output == "p" else f"%{output}10"
    lines += [f"{name} {result}, {sources}{',' + rest if rest else ''};", "mad.wide.u32 %rd20, %r0, 8, %rd0;"]
    if output == "p":
        lines += ["selp.b32 %r10, 1, 0, %p15;"]
        result, output = "%r10", "r"
    lines += [f"st.global.b{WIDTHS[output]} [%rd20], {result};"]
    assert run("\n".join(lines), *tensors) == []
    return [int(value) % (1 << 64) for value in tensors[0][: len(inputs[0][1])]]
