"""The one place where Triton kernels are launched and counted, and where what goes wrong there is said in words.

What stands here runs at every call, so it is kept short; the arithmetic of grids is plain Python.

==================================  ================================================================================
What the compiler or driver raises  What the caller gets
==================================  ================================================================================
the kernel cannot be built here     `UnusableKernel`; without a forced backend the operator then runs in plain PyTorch
more of a resource than there is    `BackendError`: what was needed, what there is, on which shapes
anything else                       the error itself, untouched: nothing is known about the state that it left behind
==================================  ================================================================================

More programs than a grid has are refused before. Where `library.building` says so, a kernel is built and not launched.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator

from torch import Tensor

from trifuse.kernels.errors import BackendError, UnusableKernel
from trifuse.kernels.library import building, launched

from .triton_internals import InterpreterError, JitFunction, OutOfResources, TritonError

LONGEST_REASON = 400  # characters
MOST_PROGRAMS = 2**31 - 1  # on axis x of a grid, the only one that trifuse uses
MOST_POSITIONS = 2**30  # of one map, whose kernels number them in 32 bits
OTHERWISE = "or run it inside: with trifuse.kernels.backend('torch')"
FROM_OUTSIDE = (OSError, subprocess.SubprocessError)  # from files, and from the C compiler
NEEDS = "Triton needs a C compiler (CC names it) and a folder to write to (TRITON_CACHE_DIR names it)"
# How the driver's own errors begin, and what those of them say that refuse a kernel's code before it ran.
DRIVER_ERRORS = ("Triton Error [", "CUDA error", "HIP error")
REFUSED_CODE = ("image", "PTX")
FORKED = "forked subprocess"  # what torch says of a process that was forked after CUDA was used: nothing about kernels


def launch(kernel: JitFunction, grid: tuple[int, ...], *arguments: object, **settings: object) -> None:
    """Launch a Triton kernel.

    Args:
        kernel: the ``triton.jit`` function.
        grid: number of programs.
        arguments: what it is called with.
        settings: what it is compiled for: its constants, and ``num_warps``.

    Raises:
        UnusableKernel: the kernel cannot be built, or not loaded, on this device.
        BackendError: it needs more programs, or once built more shared memory, threads or the like, than there are.
    """
    if grid[0] > MOST_PROGRAMS:
        raise BackendError(
            f"{kernel.fn.__name__} needs {grid[0]} programs where a launch has {MOST_PROGRAMS}; its tensors have the "
            f"shapes {_shapes(arguments)}; split the batch, {OTHERWISE}"
        )
    try:
        if building.device is not None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **settings)
            if compiled is not None:  # which an interpreted function is not
                compiled[grid]  # is what would launch it: loaded, with a launcher of its own
            return
        kernel.run(*arguments, grid=grid, warmup=False, **settings)  # what kernel[grid](...) does, a call later
    except OutOfResources as error:
        raise BackendError(
            f"{kernel.fn.__name__} needs {error.required} of {error.name} where the device has {error.limit}; its "
            f"tensors have the shapes {_shapes(arguments)}; make them smaller (fewer channels, classes or maps), "
            f"{OTHERWISE}"
        ) from error
    except Exception as error:
        if not _is_about_building(error):
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        needs = f"; {NEEDS}" if isinstance(error, FROM_OUTSIDE) else ""
        raise UnusableKernel(f"{kernel.fn.__name__} cannot be built: {reason}{needs}") from error
    launched[kernel.fn.__name__] += 1


def check_positions(height: int, width: int) -> None:
    """Refuse maps of more positions than kernels number."""
    if height * width > MOST_POSITIONS:
        raise BackendError(
            f"a map of {height} x {width} has more than {MOST_POSITIONS} positions, the most that the kernels number; "
            f"crop it, {OTHERWISE}"
        )


def cdiv(dividend: int, divisor: int) -> int:
    """Divide, and round up. Triton's own `cdiv`, made for kernels as well, costs the host thirty times as much."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _is_about_building(error: Exception) -> bool:
    """Tell whether an error says that the kernel never began to run."""
    if isinstance(error, InterpreterError):
        return False
    if isinstance(error, (TritonError, *FROM_OUTSIDE)):
        return True
    text = str(error)
    of_driver = text.startswith(DRIVER_ERRORS) or FORKED in text
    return type(error) is RuntimeError and (not of_driver or any(word in text for word in REFUSED_CODE))


def _shapes(arguments: Iterable[object]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(arguments))


def _tensors(arguments: Iterable[object]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
