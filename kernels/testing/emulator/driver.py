"""A driver for Triton that runs kernels compiled for an NVIDIA GPU on the machine, on CPU tensors.

Triton calls what a driver's launcher and loader are, and a hook that tells which files a kernel was compiled to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trifuse.kernels import library
from trifuse.kernels.gpu.triton_internals import DriverBase, GPUTarget, active_driver, launching_through

from .findings import UnsupportedInstruction

if TYPE_CHECKING:
    import torch

CAPABILITY = 90  # of the GPU that kernels are compiled for: an H100
DEVICE = -1  # unlike every real one, for Triton keeps compiled kernels by device
PROPERTIES = {
    "max_shared_mem": 232_448,
    "max_num_regs": 65_536,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "sm_clock_rate": 1_980_000,
    "mem_clock_rate": 2_619_000,
    "mem_bus_width": 5120,
}
MOST_THREADS = 1024


class Code(NamedTuple):
    """A compiled kernel: as text, which the machine runs, and as the GPU would take it."""

    ptx: str
    cubin: bytes


# Runs a kernel: its code, its source, its metadata, the grid, the arguments.
Run = Callable[[Code, Any, Any, tuple[int, int, int], tuple[Any, ...]], None]


@contextmanager
def kernels_run_by(run: Run) -> Iterator[VirtualDriver]:
    """Let operators run on their kernels inside the block, on CPU tensors, and every launch call a function."""
    driver = VirtualDriver(run)
    with (
        launching_through(driver, keep_ptx),
        library.compiled_on_cpu(),
        library.backend("triton", strict=False),
        library.failed_builds_forgotten(),
    ):
        yield driver


class VirtualDriver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """The driver that is active inside a `virtual_gpu`.

    Args:
        run: what a launch calls.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.utils = Loader()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton asks which one to take by itself: never this one

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise UnsupportedInstruction(f"the virtual GPU builds no launcher in C, so it has no C++ type for {ty}")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = DEVICE) -> int:
        return 0

    def get_device_capability(self, device: int = DEVICE) -> tuple[int, int]:
        return divmod(CAPABILITY, 10)

    def get_benchmarker(self) -> Any:
        raise UnsupportedInstruction(
            "the virtual GPU has no time, so it cannot choose among the configurations of an autotuned kernel; launch "
            "the function under the decorator with one of them: kernel.fn[grid](..., **config.all_kwargs())"
        )


class Loader:
    """What Triton calls a driver's utilities: it loads a kernel, which here means to keep its text."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(PROPERTIES)

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return 0, Code(_loaded.ptx, code), 32, 0, MOST_THREADS


class Launcher:
    """Launches one compiled kernel: made by Triton for it, called with the grid and the bound arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        code: Code,
        packed: Any,
        launch: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        active_driver().run(code, self.source, self.metadata, (x, y, z), arguments)


class _Loaded(threading.local):
    ptx = ""  # of the kernel that Triton is about to load in this thread


_loaded = _Loaded()


def keep_ptx(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
    """Read the PTX of a kernel; Triton calls this with the files that a kernel was compiled to, before it loads it."""
    path = next(path for file, path in files.items() if file.endswith(".ptx"))
    _loaded.ptx = Path(path).read_text(encoding="utf-8")
