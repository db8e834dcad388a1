"""Which of trifuse's kernels a computation launched, and which operators ran in plain PyTorch instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from trifuse.kernels import library
from trifuse.kernels.errors import NoKernelRan as NoKernelRan


@dataclass
class Launches:
    """What happened inside of a `launches` block; empty until it ends.

    Attributes:
        kernels: how often each Triton kernel of trifuse was launched, by its name.
        fallbacks: the operators whose kernels could not be built in this process, before the block or inside of it, so
            that plain PyTorch takes over where no backend is forced; and on which device and why.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    fallbacks: dict[str, str] = field(default_factory=dict)


@contextmanager
def launches() -> Iterator[Launches]:
    """Count the kernels of `trifuse.kernels` that are launched inside the block, in all threads.

    Launches on a GPU and in Triton's interpreter count alike. A recorded CUDA graph launches when it is recorded, and
    no more when it is replayed.

    Examples:
        >>> with launches() as counted:
        ...     _ = upsample_argmax([torch.randn(1, 2, 4, 4)], (8, 8))
        >>> counted.kernels.total()  # plain PyTorch on a CPU
        0
    """
    before, counted = Counter(library.launched), Launches()
    try:
        yield counted
    finally:
        counted.kernels.update(Counter(library.launched) - before)
        counted.fallbacks.update(library.fallbacks())


def expects_kernels(device: torch.device) -> bool:
    """Return whether operators shall run on Triton kernels: on every GPU, even on one where none can be built."""
    return device.type == "cuda" or library.default_backend(device, torch.float32)[0] == "triton"


def kernels_forced(device: torch.device) -> AbstractContextManager[None]:
    """Force the Triton backend on a GPU, upon all operators that have kernels; change nothing on a CPU."""
    return library.backend("triton", strict=False) if expects_kernels(device) else nullcontext()


def launches_of(name: str, call: Callable[[], object], device: torch.device, *, expected: bool = True) -> int:
    """Return how many Triton kernels a call launches.

    Args:
        name: what is called, for the message.
        call: is called once.
        device: what it computes on.
        expected: whether it must launch kernels on a GPU.

    Raises:
        NoKernelRan: on a GPU, if it launched none where it must, or if the kernels of some operator could not be built.
    """
    with launches() as counted:
        call()
    if expects_kernels(device):
        if counted.fallbacks:
            reasons = "; ".join(f"{op} on {reason}" for op, reason in counted.fallbacks.items())
            raise NoKernelRan(
                f"{name}: expected Triton kernels, but some cannot be built ({reasons}); see trifuse doctor"
            )
        if expected and not counted.kernels:
            raise NoKernelRan(f"{name}: expected Triton kernels, but it launched none on {device}")
    return counted.kernels.total()
