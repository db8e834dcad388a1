"""How to train: one frozen description, checked as a whole when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from trifuse.architectures.storage.best_epoch import LAST, SCORE_COLUMN
from trifuse.architectures.storage.epoch_log import SMOOTHED
from trifuse.kernels.choices import choice_problems

from .precision import Precision, Tf32, precision_on

Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["warmup_cosine", "poly", "constant"]

DICE = f"{SCORE_COLUMN}dice"


@dataclass(frozen=True)
class Recipe:
    """Say how a network is trained.

    Attributes:
        epochs: passes over the training set.
        batch_size: samples per optimiser step, over all ranks and micro-batches together.
        lr: highest learning rate; a parameter group may multiply it.
        weight_decay: decoupled for AdamW, added to the gradient for Adam and SGD.
        optimizer: "adamw", "adam" or "sgd" (Nesterov).
        betas: decay of Adam's two moments.
        momentum: of SGD.
        schedule: "warmup_cosine" and "constant" move with every step, "poly" with every epoch.
        warmup_epochs: linear rise of "warmup_cosine"; may be a fraction of an epoch.
        min_lr: where "warmup_cosine" ends.
        precision: of the forward pass; weights, losses and optimiser states stay float32. "auto" is "bf16" on a GPU
            that computes in it, "fp32" elsewhere.
        tf32: whether products of float32 numbers on a GPU round their factors to TF32: "on", "off", or "default", as
            PyTorch is set; unless told otherwise, it lets convolutions do so and matrix products not.
        compile: compile the forward pass of training and its backward pass, see `CompiledForward`.
        cuda_graph: record a step as CUDA graphs and replay them, see `RecordedStep`.
        accumulate: micro-batches per optimiser step; divides the memory, not the batch.
        ema_decay: of the moving average of the weights that is evaluated and kept as best; None for none.
        grad_clip: largest gradient norm of a parameter group; None for no limit.
        best_epoch_by: what chooses the epoch whose weights are kept as best: the highest value of a validation score,
            named as its column in ``log.csv`` (``"val_dice"``, or ``"val_dice_<class>"`` where there are several
            classes), or that it is the ``"last"``. None leaves it to the data, see `settled`.
        best_epoch_smoothing: choose by that score's moving average over epochs, of which this share is that of the
            epoch before (nnU-Net: 0.9); None for the score itself. The last epoch is the last either way.
        init: folder of a run, or of a network, of the same architecture whose weights training starts from; None draws
            them.
        reset_head: draw those weights whose number follows the classes, and take the others from ``init``.
        seed: of the sample order, the augmentation and dropout.
        workers: processes that load samples; 0 loads in the training process.
        checkpoint_every_steps: also write ``last/`` within an epoch; None for once per epoch.
        device: "auto", "cpu", "cuda" or "cuda:<index>".

    Raises:
        ValueError: one line per field that is out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: Schedule = "warmup_cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    precision: Precision = "auto"
    tf32: Tf32 = "default"
    compile: bool = False
    cuda_graph: bool = False
    accumulate: int = 1
    ema_decay: float | None = None
    grad_clip: float | None = None
    best_epoch_by: str | None = None
    best_epoch_smoothing: float | None = None
    init: str | None = None
    reset_head: bool = False
    seed: int = 42
    workers: int = 0
    checkpoint_every_steps: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r}; allowed: {allowed}"
            for name, (allowed, holds) in _ALLOWED.items()
            if not holds(getattr(self, name))
        ] + choice_problems(self)
        if not problems and self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs = {self.warmup_epochs}; allowed: at most epochs = {self.epochs}")
        if not problems and self.accumulate > self.batch_size:
            problems.append(f"accumulate = {self.accumulate}; allowed: at most batch_size = {self.batch_size}")
        if not problems and self.reset_head and self.init is None:
            problems.append("reset_head = True; allowed: only with init, whose other weights it keeps")
        if problems:
            raise ValueError("recipe: " + "\n        ".join(problems))

    @property
    def chosen_by(self) -> str:
        """What chooses the best epoch, of a recipe that is `settled`: a column of the log, or `LAST`."""
        assert self.best_epoch_by is not None
        return self.best_epoch_by

    @property
    def best_metric(self) -> str:
        """What chooses the best epoch, as `BestEpoch` names it, of a recipe that is `settled`."""
        score = self.chosen_by.removeprefix(SCORE_COLUMN)
        return score if score == LAST or self.best_epoch_smoothing is None else f"{score}{SMOOTHED}"

    def settled(self, *, validates: bool = True) -> Recipe:
        """Return the recipe with what chooses the best epoch filled in: Dice, or, where no case validates, the end."""
        if self.best_epoch_by is not None:
            return self
        return replace(self, best_epoch_by=DICE if validates else LAST)

    def on(self, device: torch.device) -> Recipe:
        """Return the recipe with the precision that "auto" means on a device."""
        return replace(self, precision=precision_on(device, self.precision))

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: Dice chose the best epoch, on training cases too; weights were drawn."""
        added = {"best_epoch_smoothing": None, "init": None, "reset_head": False, "tf32": "default", "compile": False}
        return {"best_epoch_by": DICE, **added, **values}


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_NOT_NEGATIVE = ("a number >= 0", lambda value: _is_number(value) and value >= 0)

_SHARE = ("None or a number in (0, 1)", lambda value: value is None or (_is_number(value) and 0 < value < 1))

# Every field but those of a Literal type.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("a whole number >= 1", lambda value: _is_whole(value, 1)),
    "batch_size": ("a whole number >= 1", lambda value: _is_whole(value, 1)),
    "lr": ("a number > 0", lambda value: _is_number(value) and value > 0),
    "weight_decay": _NOT_NEGATIVE,
    "betas": (
        "two numbers in [0, 1)",
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value),
    ),
    "momentum": ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "warmup_epochs": _NOT_NEGATIVE,
    "min_lr": _NOT_NEGATIVE,
    "accumulate": ("a whole number >= 1", lambda value: _is_whole(value, 1)),
    "ema_decay": _SHARE,
    "grad_clip": ("None or a number > 0", lambda value: value is None or (_is_number(value) and value > 0)),
    "best_epoch_by": (
        "None, 'last', or the column of a score in log.csv, such as 'val_dice'",
        lambda value: value is None or (isinstance(value, str) and re.fullmatch(r"last|val_.+", value) is not None),
    ),
    "best_epoch_smoothing": _SHARE,
    "init": ("None or a folder", lambda value: value is None or (isinstance(value, str) and value != "")),
    **{name: ("true or false", lambda value: type(value) is bool) for name in ("compile", "cuda_graph", "reset_head")},
    "seed": ("a whole number >= 0", lambda value: _is_whole(value, 0)),
    "workers": ("a whole number >= 0", lambda value: _is_whole(value, 0)),
    "checkpoint_every_steps": ("None or a whole number >= 1", lambda value: value is None or _is_whole(value, 1)),
    "device": (
        "'auto', 'cpu', 'cuda' or 'cuda:<index>'",
        lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
    ),
}
