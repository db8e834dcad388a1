"""Which of trifuse's kernels a computation launched, and which operators ran in plain PyTorch instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trifuse.kernels import library


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

    Example:
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
