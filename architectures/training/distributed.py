"""Several processes as one: everything that crosses from one rank to another.

Ranks come from torchrun's environment; without it there is one rank and every function here returns at once.
A step sees one global batch. Losses sum over all ranks before they apply their formula, and the gradients of all
ranks are summed afterwards; so the result does not depend on how many ranks share the batch, or how evenly.

Normalisation layers see their own rank's samples. Their running statistics are those of rank 0, which the other ranks
take over whenever a checkpoint is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group: its functions keep the one they find for good, with its threads
from torch import Tensor, nn

from trifuse.kernels.errors import BackendError, TrifuseError

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, differentiably; what a loss applies to its sums before its formula."""


def of_one_rank(values: Tensor) -> Tensor:
    """Return the sum over all ranks where there is but one: what it is given."""
    return values


def across_ranks(reduce: Reduce | None) -> Reduce | None:
    """Return None for `of_one_rank`: a loss then need not stop between its sums and its formula.

    Any other function may do anything, and must be called.
    """
    return None if reduce is of_one_rank else reduce


_LONGEST_WAIT = timedelta(hours=2)  # the other ranks wait while rank 0 validates; a rank that dies is noticed at once


@dataclass(frozen=True)
class World:
    """The ranks that train together, as one of them sees them.

    Attributes:
        rank: the number of this one, counted from 0.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that validates, logs and saves."""
        return self.rank == 0

    @property
    def sum(self) -> Reduce:
        """Sums a tensor over all ranks; the gradient passes through, see `sum_gradients`."""
        return of_one_rank if self.size == 1 else _SumOverRanks.apply

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients, in one transfer.

        A parameter that no rank used keeps no gradient; one that some ranks used counts as zero on the others.
        """
        if self.size == 1:
            return
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients] + [used.float()])
        dist.all_reduce(flat)
        *summed, used_by = flat.split([gradient.numel() for gradient in gradients] + [len(gradients)])
        for parameter, gradient, count in zip(parameters, summed, used_by.tolist(), strict=True):
            laid_out = torch.empty_like(parameter).copy_(gradient.view_as(parameter)) if count else None
            parameter.grad = laid_out  # in memory as its parameter is, which fused optimisers insist on

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of all ranks with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))  # on the CPU, so that no GPU has to catch up
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """Raise on every rank what is raised inside this block on any of them.

        A rank that fails raises its own error; the others raise a `TrifuseError` that names the failed ranks and their
        errors. Without this they would wait for the failed rank until they time out.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.any(error is not None) and self.size > 1:
            reports = [""] * self.size
            dist.all_gather_object(reports, "" if error is None else f"rank {self.rank}: {error}")
            if error is None:
                raise TrifuseError("another rank failed: " + "; ".join(filter(None, reports)))
        if error is not None:
            raise error


@contextmanager
def open_world(device: str = "auto") -> Iterator[World]:
    """Join the other ranks that torchrun started, if it did, and leave them at the end.

    May be nested; but open it once in a program: ranks that have left find each other's old addresses when they return.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<index>".

    Raises:
        BackendError: the device is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if size == 1:
        yield World(0, 1, chosen)
        return
    opened_here = not dist.is_initialized()
    if opened_here:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if opened_here:
            dist.destroy_process_group()


def choose_device(device: str = "auto", local_rank: int | None = None) -> torch.device:
    """Return the device that ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"`` means for a process.

    Raises:
        BackendError: the word is none of these, or that GPU is not there.
    """
    gpus = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise BackendError(f"unknown device {device!r}; use one of auto, cpu, cuda and cuda:<index>")
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    index = int(device.partition(":")[2] or 0) if local_rank is None else local_rank
    if index >= gpus:
        raise BackendError(f"device {device!r} needs GPU number {index}; found {gpus} GPUs; use device 'cpu'")
    return torch.device("cuda", index)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient  # d total / d own part = 1; what the other ranks' parts contribute is added by sum_gradients
