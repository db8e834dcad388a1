"""The training loop: every network here is trained by `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from trifuse.architectures.storage.best_epoch import LAST, SCORE_COLUMN, BestEpoch
from trifuse.architectures.storage.epoch_log import EpochLog, read_digest, write_start
from trifuse.architectures.storage.run_loggers import Loggers, RunLogger, started
from trifuse.kernels.errors import DataError, TrifuseError

from .batches import Batches
from .checkpoint import CheckpointManager
from .distributed import World, open_world
from .ema import WeightAverage, evaluation_mode
from .loader_workers import WorkerLost
from .memory import OutOfMemory, named_exhaustion
from .parameter_groups import GroupSpecification, make_groups
from .precision import computing
from .progress import Progress
from .recipe import Recipe
from .recorded_step import step_type
from .run_folder import append_note, append_session, discard_replaced, lock_folder, open_run, upgraded_description
from .signals import Interrupted, StopSignals
from .step import Forward, Loss, forward_image
from .training_state import (
    FrozenBase,
    TrainerState,
    check_base,
    load_training_state,
    read_best,
    save_training_state,
)

Validate = Callable[[nn.Module], Mapping[str, float]]

FREE_TO_CHANGE = ("device", "workers", "checkpoint_every_steps", "cuda_graph")  # on resume: they change no result


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        best_epoch: whose weights are in ``best/``, counted from 1; None if no epoch had a score.
        best_score: its score, or that one's moving average; None where it was not chosen by one.
        steps: optimiser steps that were done.
    """

    best_epoch: int | None
    best_score: float | None
    steps: int


def fit(
    model: nn.Module,
    train_set: Any,
    recipe: Recipe,
    out: Path,
    *,
    loss: Loss,
    validate: Validate,
    run_config: Mapping[str, Any],
    config_type: type | None = None,
    forward: Forward = forward_image,
    param_groups: GroupSpecification | Callable[[nn.Module], GroupSpecification] | None = None,
    describe: Callable[[nn.Module], Mapping[str, float]] | None = None,
    base: FrozenBase | None = None,
    resume: bool = False,
    force_resume: bool = False,
    loggers: Sequence[RunLogger] = (),
    command: Sequence[str] = (),
) -> FitResult:
    """Train a network, alone or on all ranks that torchrun started.

    On a CPU, with as many threads and ranks, a run that was killed and resumed ends with the bits of one that was not.

    Args:
        model: has ``save_pretrained(folder)``. Parameters without ``requires_grad`` stay as they are. If it has a
            method ``start_epoch``, that is called with the epoch, counted from 0, when one begins or is resumed.
        train_set: ``train_set[(seed, epoch, index)]`` is a dictionary of tensors and strings, the same one for the
            same key; ``len(train_set)`` says how many.
        recipe: how to train; a best epoch that is left open is that of the highest Dice.
        out: folder for ``run.json``, ``start.json``, ``log.csv``, ``sessions.jsonl``, ``best/`` (evaluation weights),
            ``last/`` (what resuming needs) and, if a step is not finite, ``crash/``.
        loss: ``loss(outputs, batch, reduce)`` is the mean over the samples of all ranks; ``reduce`` sums a tensor over
            ranks, and ``batch["sample_weight"]`` of shape (B,) is zero for samples that must not count. A method
            ``start_epoch`` is called as the model's is.
        validate: returns scores, named as in the log but for the ``val_``; higher is better for the one by which the
            recipe chooses the best epoch. Called on rank 0, before the first step and after every epoch, in evaluation
            mode and without gradients, with the averaged weights if there are any.
        run_config: everything beside the recipe that decides the result, as JSON values; under `DIGESTS`, digests of
            the data by name, which runs of older versions lack.
        config_type: the dataclass whose fields ``run_config`` has, if any: it knows their names in older versions.
        forward: computes the outputs from a batch.
        param_groups: the groups, or a function that makes them from the model; see `parameter_groups`.
        describe: more numbers about the network for ``start.json`` and each row of the log.
        base: names the file of the frozen weights, which are then left out of ``last/``.
        resume, force_resume: continue the run in ``out``, if any, maybe longer; force it where recipe or data differ.
        loggers, command: what else gets the rows of the log, see `RunLogger`; what to note in ``sessions.jsonl``.

    Raises:
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came; the message names the step that ``last/`` holds.
        NumericError: a loss or gradient is not finite; ``last/`` holds the last checkpoint before that.
        OutputFolderError: ``out`` holds another run, or another process writes to it.
        CheckpointError: nothing can be saved, or what was saved is damaged.
        DataError: a sample could not be loaded; says which, and where the last checkpoint stands.
        WorkerLost, OutOfMemory: likewise, and a process that loads samples died, or memory ran out.
    """
    out, recipe = Path(out), recipe.settled()
    with ExitStack() as stack:
        world = stack.enter_context(open_world(recipe.device))
        asked, recipe = recipe.precision, recipe.on(world.device)
        progress = Progress(world.is_main)
        with world.raise_on_any_rank():
            if world.is_main:
                stack.enter_context(lock_folder(out))
                description = _describe(recipe, run_config, len(train_set))
                upgrade = partial(upgraded_description, config_type, run_config)
                changed, accept = open_run(out, description, resume=resume, force=force_resume, upgrade=upgrade)
                for difference in changed:
                    progress.say(f"resumed with a changed configuration: {difference}")
                CheckpointManager(out, progress.say).recover()
        model.to(world.device)
        world.broadcast(model.state_dict().values())
        with world.raise_on_any_rank():
            run = _Run(model, train_set, recipe, out, world, progress, loss, forward, param_groups, base, force_resume)
            stack.callback(run.batches.workers.close)
            run.validate, run.describe = validate, describe or (lambda model: {})
            if world.is_main:
                run.accept, run.log = accept, run.open_log(out, force_resume, changed=changed, command=[*command])
                run.loggers = stack.enter_context(started(loggers, out, description, run.state.epoch, run._note))
        with computing(world.device, asked, recipe.tf32, progress.say), run.stop:
            return run.train()


def _describe(recipe: Recipe, run_config: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return all that decides the result of a run, which resuming must not change."""
    kept = {name: value for name, value in asdict(recipe).items() if name not in FREE_TO_CHANGE}
    return {"recipe": kept, "config": dict(run_config), "training_samples": samples}


class _Run:
    """A run of `fit`: its parts, and where it is."""

    validate: Validate
    describe: Callable[[nn.Module], Mapping[str, float]]
    log: EpochLog
    loggers: Loggers
    accept: Callable[[], None]

    def __init__(
        self,
        model: nn.Module,
        train_set: Any,
        recipe: Recipe,
        out: Path,
        world: World,
        progress: Progress,
        loss: Loss,
        forward: Forward,
        param_groups: Any,
        base: FrozenBase | None,
        forced: bool,
    ) -> None:
        self.model, self.recipe, self.world, self.progress, self.base = model, recipe, world, progress, base
        self.out, self.stop, self.checkpoints = out, StopSignals(), CheckpointManager(out, progress.say)
        if base is not None:
            check_base(model, base)
        self.groups = make_groups(model, recipe, param_groups)
        self.average = None if recipe.ema_decay is None else WeightAverage(model, recipe.ema_decay)
        self.batches = Batches(train_set, recipe, world)
        self.training_step = step_type(recipe, world, progress.say)(
            model,
            forward,
            loss,
            self.groups,
            self.average,
            recipe,
            world,
            steps_per_epoch=self.batches.steps_per_epoch,
            crash_folder=out / "crash",
            say=self._note,
            stopping=lambda: self.stop.requested is not None,
        )
        self.log_digest: str | None = None
        self.state = self._load(forced) if self.checkpoints.last.path.exists() else TrainerState(ranks=world.size)
        self._saved_step = self.state.global_step

    def open_log(self, out: Path, widen: bool, **how: Sequence[str]) -> EpochLog:
        """Note in the output folder where, how and from which step the run goes on, and open its log of epochs."""
        options = {name: getattr(self.recipe, name) for name in (*FREE_TO_CHANGE, "precision")}
        runs_on, steps_done = str(self.world.device), self.state.global_step
        append_session(out, steps_done=steps_done, ranks=self.world.size, **options, runs_on=runs_on, **how)
        return EpochLog(out / "log.csv", self.state.epoch, widen=widen, digest=None if widen else self.log_digest)

    def _note(self, line: str) -> None:
        """Say how steps are computed from here on, and keep it with the session."""
        self.progress.say(line)
        if self.world.is_main:
            append_note(self.out, step=self.state.global_step + 1, said=line)

    def train(self) -> FitResult:
        """Run the epochs that are left."""
        if self.world.is_main:
            self.checkpoints.drop_damaged()
        if self.state.global_step == 0:
            self._check_that_it_can_end_well()
        try:
            with self.batches.workers.named_losses(), named_exhaustion("training"):
                self._train_epochs()
        except (DataError, WorkerLost, OutOfMemory) as error:
            self.progress.end()
            where = f"{self.checkpoints.last.path} holds step {self._saved_step} of the run"
            raise type(error)(f"{error}; {where}: --resume goes on from there") from error
        if self.world.is_main:
            self.accept()
        return self._result()

    def _train_epochs(self) -> None:
        while self.state.epoch < self.recipe.epochs:
            self._train_epoch()
            self._end_epoch()
            if self.state.epoch < self.recipe.epochs and self.world.any(self.stop.requested is not None):
                self._interrupt(self.state.global_step)
        with self.world.raise_on_any_rank():
            if self.world.is_main and self._saved_step != self.state.global_step:
                self.checkpoints.save_final(self._fill_last)

    def _train_epoch(self) -> None:
        state, steps = self.state, self.batches.steps_per_epoch
        self.training_step.start_epoch(state.epoch)
        self.progress.start(f"epoch {state.epoch + 1} of {self.recipe.epochs}", steps, state.step_in_epoch)
        started_s = time.monotonic()
        for micro_batches in self.batches.epoch(state.epoch, state.step_in_epoch):
            try:
                result = self.training_step(micro_batches, state.global_step)
            except Interrupted:  # the step does not count
                if self.world.size == len(micro_batches) == 1:  # nothing of it was computed
                    self._save_last()
                self._interrupt(self._saved_step)
            state.count_step(result, self.batches.samples_in_step(state.step_in_epoch), time.monotonic() - started_s)
            started_s = time.monotonic()
            self.progress.advance(state.step_in_epoch, f"loss {result.loss:.4f}")
            if self.world.any(self.stop.requested is not None):
                self._save_last()
                self._interrupt(state.global_step)
            every = self.recipe.checkpoint_every_steps
            if every is not None and state.global_step % every == 0 and state.step_in_epoch < steps:
                self._save_last()
        self.progress.end()

    def _end_epoch(self) -> None:
        """Validate, keep the best weights, write the log line, and only then the checkpoint."""
        state, started_s = self.state, time.monotonic()
        if self.world.is_main:
            with evaluation_mode(self.model, self.average):
                metrics, described = self._measure(), dict(self.describe(self.model))
                self._choose(metrics)
            row = {
                "epoch": state.epoch + 1,
                "step": state.global_step,
                **self._learning_rates(),
                "loss": state.loss_sum / self.batches.samples,
                "gradient_norm": state.largest_gradient_norm,
                **metrics,
                **described,
                "seconds": round(state.seconds + time.monotonic() - started_s, 3),
            }
            self.log.append(row)
            self.loggers.log(row)
            self.progress.say(", ".join(f"{name} {value:.5g}" for name, value in row.items() if name not in described))
        state.next_epoch()
        self._save_last()

    def _measure(self) -> dict[str, float]:
        """Return the validation scores by column of the log."""
        metrics = {f"{SCORE_COLUMN}{name}": float(value) for name, value in self.validate(self.model).items()}
        if self.recipe.chosen_by not in (LAST, *metrics):
            raise TrifuseError(
                f"validation has no {self.recipe.chosen_by!r} to choose the best epoch by; set "
                f"training.best_epoch_by to {LAST!r} or to what it has: {', '.join(metrics)}"
            )
        return metrics

    def _choose(self, metrics: dict[str, float]) -> None:
        """Keep the weights as best if this epoch is; the moving average that chooses it joins the metrics."""
        share, state, metric = self.recipe.best_epoch_smoothing, self.state, self.recipe.best_metric
        if metric == LAST:
            self._keep_as_best(BestEpoch(state.epoch + 1, metric, None))
            return
        score = metrics[self.recipe.chosen_by]
        if share is not None:
            if not math.isnan(score):
                before = score if state.smoothed_score is None else state.smoothed_score
                score = state.smoothed_score = share * before + (1 - share) * score
            metrics[f"{SCORE_COLUMN}{metric}"] = score
        if not math.isnan(score) and (state.best_score is None or score > state.best_score):
            self._keep_as_best(BestEpoch(state.epoch + 1, metric, score))

    def _learning_rates(self) -> dict[str, float]:
        """Those of the step before, by log column."""
        step, steps = max(self.state.global_step - 1, 0), self.batches.steps_per_epoch
        rates = {group.name: group.set_learning_rate(self.recipe, step, steps) for group in self.groups}
        return {"lr" if len(rates) == 1 else f"lr_{name}": rate for name, rate in rates.items()}

    def _check_that_it_can_end_well(self) -> None:
        """Save and validate once before the first step: what would fail after an epoch fails now."""
        with self.world.raise_on_any_rank(), named_exhaustion("before the first step"):
            if self.world.is_main:
                self.checkpoints.save_first(self._fill_last)
                with evaluation_mode(self.model, self.average):
                    metrics = self._measure()
                    write_start(self.out, {**metrics, **self.describe(self.model)})
                by = self.recipe.chosen_by
                if math.isnan(metrics.get(by, 0.0)):
                    raise TrifuseError(f"validation gives NaN for {by!r}; is the validation set empty?")
                scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                self.progress.say(f"before training: {scores}")

    def _keep_as_best(self, best: BestEpoch) -> None:
        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)  # type: ignore[operator]
            best.write(folder)

        if self.checkpoints.save(self.checkpoints.best, write):
            self.state.best_epoch, self.state.best_score = best.epoch, best.score

    def _save_last(self) -> None:
        self.world.broadcast(self.model.buffers())
        if self.world.is_main and self.checkpoints.save(self.checkpoints.last, self._fill_last):
            self._saved_step = self.state.global_step
            discard_replaced(self.out)

    def _fill_last(self, folder: Path) -> None:
        self.accept()
        self.log.write()  # first: a row that is missing on the disk belongs to an epoch that is run again
        self.log.write_digest(folder)
        self.state.loss_scaling, self.state.compilation = self.training_step.state(), self.training_step.compilation
        save_training_state(folder, self.model, self.groups, self.average, self.state, self.base)

    def _load(self, forced: bool) -> TrainerState:
        def load(folder: Path) -> TrainerState:
            self.log_digest = read_digest(folder)
            return load_training_state(folder, self.model, self.groups, self.average, self.base)

        state = self.checkpoints.load(self.checkpoints.last, load)
        self.training_step.load_state(state.loss_scaling)
        self.training_step.compile_as(None if forced else state.compilation)  # who forces it tries again
        where = f"resuming after step {state.global_step} (epoch {state.epoch + 1}, step {state.step_in_epoch})"
        self.progress.say(f"{where}; ranks: {state.ranks} before, {self.world.size} now, for the same global batch")
        state.ranks = self.world.size
        metric = self.recipe.best_metric
        best = None
        if state.best_epoch is not None:
            read = partial(read_best, oldest=0 if forced else state.best_epoch)
            best = self.checkpoints.load(self.checkpoints.best, read)
        if best is not None and best.metric != metric:
            state.best_score = state.smoothed_score = None
            self.progress.say(f"best/ was chosen by another score; from here on {metric} decides")
        elif best is not None and best.epoch < (state.best_epoch or 0):  # the best one is damaged
            state.best_epoch, state.best_score = best.epoch, best.score
        return state

    def _interrupt(self, step: int) -> NoReturn:
        self.progress.end()
        name = "another rank's signal" if self.stop.requested is None else self.stop.requested.name
        raise Interrupted(f"stopped by {name} after step {step}; resume to continue")

    def _result(self) -> FitResult:
        score = math.nan if self.state.best_score is None else self.state.best_score
        best = torch.tensor([self.state.best_epoch or 0, score], dtype=torch.float64)
        self.world.broadcast([best])
        epoch, score = int(best[0]), float(best[1])
        return FitResult(epoch or None, None if math.isnan(score) else score, self.state.global_step)
