"""An emulator of an NVIDIA GPU: it runs the PTX that Triton makes of a kernel, on CPU tensors, and checks it.

======================  ================================================================================================
``virtual_gpu.py``      the context manager: launches, orders of programs, findings raised at the end
``driver.py``           the driver through which Triton launches
``arguments.py``        the arguments of a launch as the parameters of its kernel
``allocations.py``      which bytes were never written
``ptx.py``              PTX text to instructions
``misuse.py``           what a first try gets wrong
``machine.py``          builds and calls the machine
``machine.cpp``, *.h    the machine: warps, instructions, memory, races
``findings.py``         what was found, and the errors; ``reports.py`` puts it into words
======================  ================================================================================================
"""

from .findings import Finding, KernelFaults, UnsupportedInstruction
from .virtual_gpu import Launch, virtual_gpu

__all__ = ["Finding", "KernelFaults", "Launch", "UnsupportedInstruction", "virtual_gpu"]
