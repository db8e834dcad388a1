"""PTX is read as Triton writes it: lines of the source, inlined functions, registers and their scopes."""

from __future__ import annotations

import pytest
from handwritten_ptx import HEAD, kernel_of

from trifuse.kernels.testing.emulator.ptx import read_ptx

FILES = """
	.file 2 "/some/where/triton/language/standard.py"
	.file 3 "/my/helpers.py"
"""


def place_of_store(*lines: str, source: str = "/my/kernel.py") -> str:
    body = "\n".join([*lines, "st.global.b32 [%rd0], %r0;"])
    parameters = ".param .u64 .ptr .global .align 1 kernel_param_0"
    kernel = read_ptx(HEAD.format(parameters=parameters, body=body) + FILES, source)
    (position,) = [k for k, instruction in enumerate(kernel.instructions) if instruction.text.startswith("st.global")]
    return str(kernel.place(position))


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ([".loc 1 12 4 // kernel.py:12:4"], "/my/kernel.py:12"),
        ([".loc 1 12 4", ".loc 1 0 4"], "/my/kernel.py:12"),
        ([".loc 3 5 1 // helpers.py:5:1 @[ kernel.py:12:4 ]"], "/my/helpers.py:5 (inlined at kernel.py:12)"),
        ([".loc 2 293 1 // standard.py:293:1 @[ kernel.py:12:4 ]"], "/my/kernel.py:12 (inside standard.py:293)"),
        (
            [
                ".loc 2 293 1, function_name $s, inlined_at 1 12 4",
                ".loc 2 263 8, function_name $s, inlined_at 2 293 1",
            ],
            "/my/kernel.py:12 (inside standard.py:263, standard.py:293)",
        ),
        ([".loc 1 12 4", "// begin inline asm", ".loc 1 13 4"], "/my/kernel.py:12"),
        ([".loc 1 12 4", "// begin inline asm", "// end inline asm", ".loc 1 13 4"], "/my/kernel.py:13"),
    ],
)
def test_the_reader_s_own_line_is_found(lines, place):
    assert place_of_store(*lines) == place


def test_a_kernel_compiled_under_another_name_is_told_by_its_own():
    """Triton's cache keeps what was compiled first from the same lines."""
    lines = [".loc 3 5 1 // helpers.py:5:1 @[ kernel.py:12:4 ]"]
    assert place_of_store(".loc 1 12 4", source="/mine/copy.py") == "/mine/copy.py:12"
    assert place_of_store(*lines, source="/mine/copy.py") == "/my/helpers.py:5 (inlined at copy.py:12)"


def test_a_register_of_an_inner_scope_hides_the_outer_one():
    kernel = kernel_of("{ .reg .b64 %r1; mov.b64 %r1, 5; }\nmov.b64 %rd5, %rd0;", 1)
    move = next(k for k, instruction in enumerate(kernel.instructions) if instruction.text.startswith("mov.b64 %r1"))
    assert kernel.widths[int(kernel.code[move].split()[2])] == 8


def test_parameters_lie_aligned_one_after_the_other():
    parameters = """
	.param .u32 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u8 kernel_param_2,
	.param .f32 kernel_param_3"""
    kernel = read_ptx(HEAD.format(parameters=parameters, body=""))
    assert kernel.parameters == [(4, 0), (8, 8), (1, 16), (4, 20)]


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match=r"no \.entry"):
        read_ptx(".version 8.7")
