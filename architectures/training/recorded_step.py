"""A training step as CUDA graphs: recorded once for each shape of its batches, and replayed from then on.

Each launch on a GPU costs the host some microseconds, and a step has hundreds of them; a replay pays once. There is a
recording for each micro-batch's forward pass, loss and backward pass, one for the clipping and one for the update.
Between the last two the host reads loss and norm, as in an eager step: one that is not finite changes no weight.

Recorded are launches, and where their memory lies. What differs from step to step therefore has its fixed place: it is
copied into the batches that were recorded, learning rates and the share of the moving average are tensors, and random
numbers are drawn from the seed of each micro-batch. What Python decides is decided when a step is recorded; a network
or a loss with a ``start_epoch`` is recorded anew in every epoch.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import MicroBatch, tensors_in
from .distributed import World
from .parameter_groups import ParameterGroup
from .recipe import Recipe
from .step import Batch, TrainingStep

EAGER_STEPS = 3  # of a shape, before it is recorded: libraries choose and allocate, optimisers make their states
MOST_SHAPES = 2  # the whole batch, and what is left for the last step of an epoch; each keeps gradients of its own
_WAITED = "synchronizing CUDA operation"  # in PyTorch's warning


def step_type(recipe: Recipe, world: World, say: Callable[[str], None]) -> type[TrainingStep]:
    """Return what computes the steps of a run; say why it does not record them, if it was asked to."""
    if not recipe.cuda_graph:
        return TrainingStep
    if world.device.type != "cuda":
        reason = "there are no CUDA graphs on a CPU"
    elif world.size > 1:
        reason = "the host waits for the gradients of the other processes"
    elif recipe.precision == "fp16":
        reason = "the loss scaling of fp16 decides on the host which steps count; bf16 needs none"
    else:
        return RecordedStep
    say(f"steps run eagerly: {reason}")
    return TrainingStep


class RecordedStep(TrainingStep):
    """A step that is replayed once it is recorded, and eager where it cannot be: then it says why."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stream = torch.cuda.Stream(self._world.device)
        self._times: Counter[Any] = Counter()
        self._recorded: dict[Any, _RecordedStep] = {}
        self._replayed: _RecordedStep | None = None
        self._pool: Any = None
        self._is_eager = False
        self._said: set[str] = set()

    def start_epoch(self, epoch: int) -> None:
        """Tell network and loss; and forget what was recorded if one of them listens, and may change its mind."""
        super().start_epoch(epoch)
        if any(hasattr(listener, "start_epoch") for listener in (self.model, self.loss)):
            self._forget_recordings()

    def _find_gradient(
        self, micro_batches: Sequence[tuple[MicroBatch, Batch]], seeds: Sequence[int]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        batches = [batch for _, batch in micro_batches]
        shapes = tuple((micro_batch.share, _shapes_of(batch)) for micro_batch, batch in micro_batches)
        self._times[shapes] += 1
        if shapes not in self._recorded and self._times[shapes] > EAGER_STEPS and not self._is_eager:
            self._try_to_record(shapes, micro_batches)
        self._replayed = self._recorded.get(shapes)
        if self._replayed is not None:
            return self._replayed.find_gradient(batches, seeds)
        watched = self._times[shapes] == EAGER_STEPS and not self._is_eager
        with self._beside(), _waits() if watched else nullcontext(()) as waits:
            found = super()._find_gradient(micro_batches, seeds)
        if waits:
            self._give_up(f"the host waits for the device in {waits[0]}")
        return found

    def _update(self) -> None:
        if self._replayed is not None:
            self._replayed.update.replay()
            return
        with self._beside():
            super()._update()

    def _try_to_record(self, shapes: Any, micro_batches: Sequence[tuple[MicroBatch, Batch]]) -> None:
        if len(self._recorded) == MOST_SHAPES:
            self._say_once(f"steps of other shapes than the first {MOST_SHAPES} run eagerly")
            return
        try:
            self._recorded[shapes] = self._record(micro_batches)
        except Exception as error:  # whatever it is, an eager step may do without
            self._give_up(f"they cannot be recorded: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            self._say_once("steps are recorded as CUDA graphs")

    def _record(self, micro_batches: Sequence[tuple[MicroBatch, Batch]]) -> _RecordedStep:
        inputs = [_tensors_alone(batch) for _, batch in micro_batches]
        self._forget_gradient()
        parts = [
            self._recording(partial(self._differentiate, micro_batch, batch))
            for (micro_batch, _), batch in zip(micro_batches, inputs, strict=True)
        ]
        clipping = self._recording(self._clip_gradient)
        with _recordable(self._groups):
            update = self._recording(super()._update)
        parameters = [parameter for group in self._groups for parameter in group.parameters.values()]
        return _RecordedStep(inputs, parts, clipping, update, [(each, each.grad) for each in parameters])

    def _recording(self, run: Callable[[], Any]) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask for memory meanwhile, as those that load samples do.
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **options):
            results = run()
        self._pool = graph.pool()
        return _Recording(graph, results)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Launch on the stream that is recorded: what autograd keeps of an eager step remembers its stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _give_up(self, reason: str) -> None:
        self._is_eager = True
        self._forget_recordings()
        self._say_once(f"steps run eagerly: {reason}")

    def _forget_recordings(self) -> None:
        self._recorded.clear()
        self._replayed, self._pool = None, None

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


@dataclass(frozen=True)
class _Recording:
    """Launches, and what they leave in memory."""

    graph: torch.cuda.CUDAGraph
    results: Any

    def replay(self) -> Any:
        self.graph.replay()
        return self.results


@dataclass(frozen=True)
class _RecordedStep:
    """The recordings of a step, and the tensors that they read and write.

    Attributes:
        inputs: of each micro-batch.
        parts: forward pass, loss and backward pass of each micro-batch, and its part of the loss.
        clipping: brings the gradient to its largest norms; those that it had.
        update: of the weights, and of their average.
        gradients: where each parameter's lies, if it has one.
    """

    inputs: Sequence[Batch]
    parts: Sequence[_Recording]
    clipping: _Recording
    update: _Recording
    gradients: Sequence[tuple[nn.Parameter, Tensor | None]]

    def find_gradient(self, batches: Sequence[Batch], seeds: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Do what `TrainingStep` does for these batches."""
        losses = []
        for held, batch, seed, part in zip(self.inputs, batches, seeds, self.parts, strict=True):
            for mine, given in zip(tensors_in(held), tensors_in(batch), strict=True):
                mine.copy_(given)
            torch.manual_seed(seed)
            losses.append(part.replay())
        for parameter, gradient in self.gradients:  # an eager step may have given it another one
            parameter.grad = gradient
        return losses, self.clipping.replay()


def _shapes_of(part: Any) -> Any:
    """Return what two batches must share for the same launches to compute them."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype
    if isinstance(part, Mapping):
        return tuple((name, _shapes_of(each)) for name, each in part.items())
    return tuple(map(_shapes_of, part)) if isinstance(part, list | tuple) else None


def _tensors_alone(part: Any) -> Any:
    """Return a copy of a batch without its words: a recording would stay with those of one batch."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, Mapping):
        return {name: _tensors_alone(each) for name, each in part.items() if any(True for _ in tensors_in(each))}
    return [_tensors_alone(each) for each in part]


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Yield a list that has, afterwards, where the host waited for the device, as far as PyTorch can tell."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # may not find all: recording finds the rest
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _WAITED in str(warning.message):
            found.append(f"{warning.filename}, line {warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def _recordable(groups: Sequence[ParameterGroup]) -> Iterator[None]:
    """Tell Adam, which asks for that word, that its steps are recorded; in eager steps it would warn of it."""
    settings = [group.optimizer.param_groups[0] for group in groups if "capturable" in group.optimizer.param_groups[0]]
    for setting in settings:
        setting["capturable"] = True
    try:
        yield
    finally:
        for setting in settings:
            setting["capturable"] = False
