"""One optimiser step: from a batch to changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trifuse.kernels.errors import NumericError

from .batches import MicroBatch, keyed_seed
from .compiled_forward import Compilation, CompiledForward
from .crash import first_non_finite, write_crash_report
from .distributed import Reduce, World
from .ema import WeightAverage
from .parameter_groups import ParameterGroup
from .recipe import Recipe

Batch = dict[str, Any]
Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Mapping[str, Any], Reduce], Tensor]

SIDE_INPUTS = ("prior", "ecg", "interval", "has_ecg", "transform")  # inputs that a network may have beside the image
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_SKIPPED_STEPS = 20  # in a row: enough for the loss scale to fall from 2**16 to below 1


def forward_image(model: nn.Module, batch: Batch) -> Any:
    """Return the network's output for ``batch["image"]``: what a step computes unless told otherwise."""
    return model(batch["image"])


def forward_with_side_inputs(model: nn.Module, batch: Batch) -> Any:
    """Return the network's output for ``batch["image"]`` and those of `SIDE_INPUTS` that the batch has."""
    return model(batch["image"], **side_inputs_of(batch))


def side_inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `SIDE_INPUTS` that a batch has."""
    return {name: batch[name] for name in SIDE_INPUTS if name in batch}


@dataclass(frozen=True)
class StepResult:
    """What a step tells the log.

    Attributes:
        loss: mean over the step's samples.
        gradient_norm: largest of the groups, before clipping.
        skipped: whether the fp16 loss scaler refused the gradient, so that no weight changed.
    """

    loss: float
    gradient_norm: float
    skipped: bool


class TrainingStep:
    """Forward, loss, backward, exchange, clip, update: in this order, and nothing else.

    Args:
        model: the network.
        forward: what to compute from a batch; compiled, if the recipe says so.
        loss: of the outputs; sums over ranks before its formula.
        groups: the optimisers.
        average: moving average of the weights, or None.
        recipe: precision, as its device chose it, whether to compile, and seed.
        world: the ranks.
        steps_per_epoch: for the schedules.
        crash_folder: where a step that is not finite is described.
        say: takes a line on how steps are computed.
        stopping: tells whether the run was asked to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        loss: Loss,
        groups: Sequence[ParameterGroup],
        average: WeightAverage | None,
        recipe: Recipe,
        world: World,
        *,
        steps_per_epoch: int,
        crash_folder: Path,
        say: Callable[[str], None],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.loss, self._eager_forward, self._groups, self._average = model, loss, forward, groups, average
        self._compiled = CompiledForward(forward, say, stopping) if recipe.compile else None
        self._forward, self._say = self._compiled or forward, say
        self._recipe, self._world, self._steps_per_epoch = recipe, world, steps_per_epoch
        self._crash_folder = crash_folder
        self._skipped_in_a_row = 0
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")

    def __call__(self, micro_batches: Sequence[tuple[MicroBatch, Batch]], global_step: int) -> StepResult:
        """Take one optimiser step, the ``global_step``-th of the run, counted from 0.

        Raises:
            NumericError: the loss or its gradient is not finite; the weights are as before the step.
            Interrupted: see `CompiledForward`; likewise.
        """
        if self._compiled is not None:
            self._compiled.step = global_step + 1
        for group in self._groups:
            group.set_learning_rate(self._recipe, global_step, self._steps_per_epoch)
        if self._average is not None:
            self._average.set_step(global_step + 1)
        seeds = [keyed_seed(self._recipe.seed, global_step, n, self._world.rank) for n in range(len(micro_batches))]
        losses, norm = self._read(*self._find_gradient(micro_batches, seeds))
        for loss, part, seed in zip(losses, micro_batches, seeds, strict=True):
            if not math.isfinite(loss):
                self._stop("the loss", global_step, [part], self._first_non_finite(part[1], seed), seed)
        skipped = not math.isfinite(norm)
        if skipped:
            self._count_skipped(micro_batches, global_step)
        else:
            self._skipped_in_a_row = 0
            self._update()
        self.scaler.update()
        return StepResult(math.fsum(losses), norm, skipped)

    def start_epoch(self, epoch: int) -> None:
        """Let the network train, and tell it and the loss, if they listen, which epoch it is, counted from 0."""
        self.model.train()
        for listener in (self.model, self.loss):
            getattr(listener, "start_epoch", lambda epoch: None)(epoch)

    def state(self) -> dict[str, float]:
        """Return the loss scaler's state."""
        return dict(self.scaler.state_dict(), skipped_in_a_row=self._skipped_in_a_row)

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take over what `state` returned."""
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({k: v for k, v in state.items() if k != "skipped_in_a_row"})

    @property
    def compilation(self) -> Compilation | None:
        """What is compiled, if anything is to be."""
        return None if self._compiled is None else self._compiled.compilation

    def compile_as(self, before: Compilation | None) -> None:
        """Compile what was compiled before, if that is known and anything is to be."""
        if self._compiled is not None and before is not None:
            self._compiled.compilation = before

    def _find_gradient(
        self, micro_batches: Sequence[tuple[MicroBatch, Batch]], seeds: Sequence[int]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Leave the gradient of a step in the parameters, clipped; return the parts of its loss, and norms before."""
        self._forget_gradient()
        parts = [self._accumulate(*part, seed) for part, seed in zip(micro_batches, seeds, strict=True)]
        self._world.sum_gradients([p for group in self._groups for p in group.parameters.values()])
        for group in self._groups:
            self.scaler.unscale_(group.optimizer)
        return parts, self._clip_gradient()

    def _forget_gradient(self) -> None:
        for group in self._groups:
            group.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, micro_batch: MicroBatch, batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)  # dropout draws from the global generators and from nothing else
        return self._differentiate(micro_batch, batch)

    def _differentiate(self, micro_batch: MicroBatch, batch: Batch) -> Tensor:
        """Add a micro-batch's part to the gradients and return its part of the loss."""
        loss = self.loss(self._run(self._forward, batch), batch, self._world.sum) * micro_batch.share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _clip_gradient(self) -> list[Tensor]:
        return [group.clip_gradient() for group in self._groups]

    def _update(self) -> None:
        """Let the gradient change the weights, and these their average."""
        for group in self._groups:
            if group.has_gradient:  # an ECG's has none after a batch without ECGs, and the scaler insists on one
                self.scaler.step(group.optimizer)
        if self._average is not None:
            self._average.update()

    @staticmethod
    def _read(parts: Sequence[Tensor], norms: Sequence[Tensor]) -> tuple[list[float], float]:
        """Return the losses and the largest norm: the one time that a step waits for the device."""
        numbers = torch.stack([part.double() for part in (*parts, *norms)]).tolist()
        return numbers[: len(parts)], max(numbers[len(parts) :])

    def _first_non_finite(self, batch: Batch, seed: int) -> str:
        def again() -> None:
            torch.manual_seed(seed)
            self._run(self._eager_forward, batch)

        return first_non_finite(self.model, batch, again)

    def _run(self, forward: Forward, batch: Batch) -> Any:
        dtype = _AUTOCAST[self._recipe.precision]
        with torch.autocast(self._world.device.type, dtype, enabled=dtype is not None):
            return forward(self.model, batch)

    def _count_skipped(self, micro_batches: Sequence[tuple[MicroBatch, Batch]], global_step: int) -> None:
        """Let fp16 try again with a smaller loss scale, a bounded number of times; elsewhere stop."""
        self._skipped_in_a_row += 1
        if not self.scaler.is_enabled() or self._skipped_in_a_row > _MOST_SKIPPED_STEPS:
            named = ((name, p.grad) for group in self._groups for name, p in group.parameters.items())
            bad = [name for name, grad in named if grad is not None and not bool(grad.isfinite().all())]
            where = f"the gradient of {bad[0]!r}" if bad else "the norm of the gradient"
            self._stop("the gradient", global_step, micro_batches, where, None)

    def _stop(
        self,
        what: str,
        global_step: int,
        micro_batches: Sequence[tuple[MicroBatch, Batch]],
        where: str,
        seed: int | None,
    ) -> NoReturn:
        samples = [key for micro_batch, _ in micro_batches for key in micro_batch.keys]
        cases = [case for _, batch in micro_batches for case in batch.get("case_id", [])]
        report = {
            "what": f"{what} is not finite",
            "step": global_step,
            "rank": self._world.rank,
            "first_non_finite": where,
            "sample_keys": [list(key) for key in samples],
            "case_ids": cases,
            "forward_seed": seed,
            "learning_rates": {g.name: float(g.optimizer.param_groups[0]["lr"]) for g in self._groups},
            "loss_scale": self.scaler.get_scale(),
        }
        path = write_crash_report(self._crash_folder, report)
        raise NumericError(
            f"{what} is not finite at step {global_step}; first seen in {where}; samples "
            f"{[index for _, _, index in samples]} {cases or ''}; see {path}; the last checkpoint is kept"
        )
