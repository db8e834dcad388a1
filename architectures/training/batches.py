"""Which samples a step sees, on which rank: a function of seed, epoch and step alone.

A step takes the next ``batch_size`` samples of the epoch's order (the last step of an epoch takes what is left), cuts
them into micro-batches, and each of those into contiguous parts, one per rank. Nothing is dropped and nothing counts
twice: a rank for which no sample is left runs the micro-batch's first one with weight zero, so that all ranks take
part in every exchange. Because sample and augmentation depend on the key (seed, epoch, index) and not on what was
loaded before, an epoch can be entered at any step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from trifuse.kernels.errors import DataError, TrifuseError

from .distributed import World
from .loader_workers import Key, KeyedSamples, WorkerWatch, collated, say_nothing_of_a_lost_reader
from .recipe import Recipe

_LONGEST_LOAD_S = 600.0


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes between two exchanges.

    Attributes:
        keys: of this rank's samples.
        is_real: False where the sample only keeps the rank company, with weight zero.
        share: of the whole micro-batch, all ranks together, in its step; the shares of a step sum to one.
    """

    keys: tuple[Key, ...]
    is_real: bool
    share: float


def keyed_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def steps_per_epoch(samples: int, recipe: Recipe) -> int:
    """Return the number of optimiser steps of an epoch."""
    return math.ceil(samples / recipe.batch_size)


def plan_epoch(samples: int, recipe: Recipe, epoch: int, rank: int, ranks: int) -> list[list[MicroBatch]]:
    """Return one rank's micro-batches for every step of an epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(keyed_seed(recipe.seed, "order", epoch))
    order = torch.randperm(samples, generator=generator).tolist()
    keys = [(recipe.seed, epoch, index) for index in order]
    return [_plan_step(step, recipe, rank, ranks) for step in _chunks(keys, recipe.batch_size)]


def _plan_step(keys: list[Key], recipe: Recipe, rank: int, ranks: int) -> list[MicroBatch]:
    plan = []
    for part in _chunks(keys, math.ceil(recipe.batch_size / recipe.accumulate)):
        per_rank = math.ceil(len(part) / ranks)
        own = part[rank * per_rank : (rank + 1) * per_rank]
        plan.append(MicroBatch(tuple(own or part[:1]), bool(own), len(part) / len(keys)))
    return plan


def _chunks(keys: list[Key], size: int) -> list[list[Key]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with all its tensors, in lists and dictionaries too, on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: on_device(part, device) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [on_device(part, device) for part in batch]
    return batch


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield all tensors of a batch or of what a network makes of it, in lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Batches:
    """Load the planned micro-batches of one rank, epoch by epoch."""

    def __init__(self, dataset: Any, recipe: Recipe, world: World) -> None:
        self.samples = len(dataset)
        self.steps_per_epoch = steps_per_epoch(self.samples, recipe)
        self._recipe, self._world = recipe, world
        self._keys: list[list[Key]] = []
        samples = KeyedSamples(dataset, recipe.workers)
        self.workers = WorkerWatch(samples, recipe.seed)
        self._loader = DataLoader(
            samples,
            batch_sampler=_Reread(self),
            collate_fn=collated,
            worker_init_fn=say_nothing_of_a_lost_reader,
            num_workers=recipe.workers,
            persistent_workers=recipe.workers > 0,
            timeout=_LONGEST_LOAD_S if recipe.workers else 0,
            pin_memory=world.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one
        )

    def samples_in_step(self, step_in_epoch: int) -> int:
        """Return how many samples a step of an epoch sees, all ranks together."""
        return min(self._recipe.batch_size, self.samples - step_in_epoch * self._recipe.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[MicroBatch, dict[str, Any]]]]:
        """Yield what each step computes, from ``first_step`` on: micro-batches and their collated samples.

        A batch gains ``sample_weight`` of shape (B,): one, or zero for a sample that must not count.

        Raises:
            DataError: a sample could not be loaded; names it.
            WorkerLost: a process that loads samples died while one was waited for; names its sample.
        """
        plan = plan_epoch(self.samples, self._recipe, epoch, self._world.rank, self._world.size)[first_step:]
        self._keys = [list(micro_batch.keys) for step in plan for micro_batch in step]
        loaded = self.workers.started(lambda: iter(self._loader))
        for step in plan:
            yield [(micro_batch, self._load(loaded, micro_batch)) for micro_batch in step]

    def _load(self, loaded: Iterator[Any], micro_batch: MicroBatch) -> dict[str, Any]:
        try:
            with self.workers.named_losses():
                batch = next(loaded)
        except RuntimeError as error:  # no worker has answered for too long
            raise DataError(
                f"samples {[index for _, _, index in micro_batch.keys]}",
                "could not be loaded",
                got=error,
                hint="workers=0 loads them in this process and shows where it happens",
            ) from error
        if isinstance(batch, TrifuseError):
            raise batch
        batch["sample_weight"] = torch.full((len(micro_batch.keys),), float(micro_batch.is_real))
        return on_device(batch, self._world.device)


class _Reread:
    """The loader's view of the keys that the current epoch needs."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches._keys)

    def __len__(self) -> int:
        return len(self._batches._keys)
