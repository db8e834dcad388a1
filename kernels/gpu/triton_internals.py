"""The names of Triton that trifuse uses and its documentation does not promise, all of them, and nothing else.

Documented are `triton.jit`, `triton.language` and `triton.testing`. Any other name may change in a later Triton.
`tests/kernels/gpu/test_triton_internals.py` shows of each that it does what is relied on here, in every supported
version (``make versions``); no other file of trifuse uses one.

==================================  ==================================================  ==============================
Name                                What it does                                        What is documented instead
==================================  ==================================================  ==============================
``JITFunction.run``                 launches a kernel                                   ``kernel[grid](...)``, a call
                                                                                        more at every launch
``run(warmup=True)``,               compiles a kernel without launching it; loads what  nothing
``CompiledKernel.__getitem__``      was compiled, and builds what would launch it
``JITFunction.fn``, ``arg_names``   the Python function; the names of its arguments     nothing
``starting_line_number``            the line of the source, part of the key of          nothing
                                    what was compiled
``triton.runtime.errors``           tells failed builds from failed launches            nothing
``triton.compile``, ``ASTSource``,  compiles a kernel for a GPU that need not be here   nothing
``GPUTarget``
``triton.knobs.compilation``        leaves out line information; keeps machine code     environment variables, for the
                                    alone                                               whole process
``get_cache_manager``               files in the cache of what was compiled, and its    nothing
                                    folder (``cache_dir``), where it has one
``backends/nvidia/bin``             `cuobjdump` and `nvdisasm`                          NVIDIA's toolkit
``_build``                          builds a shared library from C++                    nothing
``DriverBase``,                     what a driver is, and the one through which         nothing
``triton.runtime.driver``           kernels are launched
``kernel_load_start_hook``          tells which files a kernel was compiled to          nothing
==================================  ==================================================  ==============================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import triton
from triton.backends.compiler import GPUTarget as GPUTarget
from triton.backends.driver import DriverBase as DriverBase
from triton.compiler import ASTSource as ASTSource
from triton.runtime import build as _builder
from triton.runtime import driver as _drivers
from triton.runtime.cache import get_cache_manager as get_cache_manager
from triton.runtime.errors import InterpreterError as InterpreterError
from triton.runtime.errors import OutOfResources as OutOfResources
from triton.runtime.errors import TritonError as TritonError

compile_kernel = triton.compile
compilation = triton.knobs.compilation
build_shared_library = _builder._build
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class JitFunction(Protocol):
    """What is relied on in a ``triton.jit`` function, compiled or interpreted."""

    fn: Any
    arg_names: list[str]
    starting_line_number: int

    def run(self, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        """Do what ``self[grid](*arguments, **settings)`` does."""


def cache_folder(manager: Any) -> str:
    """Return where a `get_cache_manager` keeps its files, in words where it has no folder."""
    return getattr(manager, "cache_dir", None) or "Triton's cache"


def active_driver() -> Any:
    """Return the driver through which Triton launches."""
    return _drivers.active


@contextmanager
def launching_through(driver: DriverBase, before_loading: Callable[..., None]) -> Iterator[None]:
    """Let Triton launch through a driver inside the block.

    Args:
        driver: the driver.
        before_loading: called with a kernel's module, function, name, files and key before the kernel is loaded.
    """
    former = _drivers._active  # asking for .active would look for a GPU
    hook = triton.knobs.runtime.kernel_load_start_hook
    hook.add(before_loading)
    _drivers.set_active(driver)
    try:
        yield
    finally:
        _drivers.set_active(former)
        hook.remove(before_loading)
