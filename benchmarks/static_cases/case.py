"""What is known of a Triton kernel without a GPU: how it is compiled, and how many bytes a pass of it moves.

A test compiles each `StaticCase` for every architecture and holds the machine code against the table of budgets.
Another counts the bytes that a pass moves, and holds them, and the figures in the docstrings of `trifuse.kernels.gpu`,
against the formulas of its `Traffic`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticCase:
    """One kernel, specialised as its launcher specialises it.

    Args:
        name: what is compiled, e.g. ``"forward, 12 maps, bfloat16"``.
        kernel: the ``triton.jit`` function.
        signature: type of each argument in order, e.g. ``"*bf16"``, ``"i64"``, ``"constexpr"``; a tuple of types for a
            tuple argument.
        constants: value of each constexpr argument, by name; element k of the tuple argument at position i is (i, k).
        aligned: names of the pointers and integers that are multiples of 16 at run time.
        threads: threads per program, in warps of 32 on NVIDIA's GPUs and of 64 on AMD's.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[Any, ...]]
    constants: Mapping[str | tuple[int, ...], object]
    aligned: tuple[str, ...]
    threads: int = 128


def specialised(
    name: str,
    kernel: Any,
    kinds: Mapping[str, Any],
    constants: Mapping[Any, object],
    unaligned: Collection[str] = (),
    threads: int = 128,
) -> StaticCase:
    """Return a case of a kernel by the types of its arguments.

    Args:
        name: what is compiled.
        kernel: the ``triton.jit`` function.
        kinds: types, by name; what is neither here nor a constant is an ``"i32"``.
        constants: values, by name or place; names that the kernel does not have are passed over.
        unaligned: arguments that need not be multiples of 16.
        threads: threads per program.
    """
    own = {key: value for key, value in constants.items() if not isinstance(key, str) or key in kernel.arg_names}
    signature = {
        argument: "constexpr" if argument in own else kinds.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = tuple(key for key, kind in signature.items() if kind != "constexpr" and key not in unaligned)
    return StaticCase(name, kernel, signature, own, aligned, threads)


def in_units(kernel: Any, constants: Mapping[Any, object]) -> tuple[str, ...]:
    """Return a kernel's arguments that are not multiples of 16 where they count units of several channels."""
    if constants.get("UNIT", 1) == 1:
        return ()
    counted = ("channel_units", "_stride_b", "_stride_h", "_stride_w", "_strides")
    return tuple(name for name in kernel.arg_names if name.endswith(counted))


def in_form(name: str, choice: Mapping[str, int], choices: Sequence[Mapping[str, int]]) -> str:
    """Return the name of a case, with the choice that it is compiled for where that is not the first one."""
    return name if choice == choices[0] else ", ".join([name, *(f"{value} {key}" for key, value in choice.items())])


@dataclass(frozen=True)
class Traffic:
    """What one pass of an operator moves between memory and chip: formulas over the sizes, in plain arithmetic.

    An address counts once per launch: what a cache serves again is not moved again. Terms below a hundredth of a pass
    are left out.

    Args:
        name: the pass, e.g. ``"backward, frozen maps"``.
        sizes: a shape of the papers, by the letters of the formulas; ``e`` is the bytes of an element.
        elements: how many elements the other formulas are per, e.g. those of one map.
        moved: bytes per element that our kernels read and write.
        least: bytes per element that any form must read and write: each input once, each result once.
        work: per element, what may bind before memory does: ``"multiply-adds"`` in float32, ``"exponentials"``.
    """

    name: str
    sizes: Mapping[str, int]
    elements: str
    moved: str
    least: str
    work: Mapping[str, str] = field(default_factory=dict)

    def evaluate(self, formula: str, **sizes: int) -> float:
        """Return the value of a formula at the paper's sizes, or at others that are given."""
        return eval(formula, {"__builtins__": {}}, {**self.sizes, **sizes})
