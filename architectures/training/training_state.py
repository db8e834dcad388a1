"""What is saved so that a run continues as if it had never stopped.

``last/`` holds the network as `save_pretrained` writes it, and ``training_state.safetensors`` and ``.json``: optimiser
states and moving averages by parameter name, and the `TrainerState`. No random state is needed: sample order,
augmentation and dropout are functions of the seed, the epoch and the step. No file holds code.

Where the run names a file for its frozen weights, ``last/`` leaves them out and is not a network of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.config_json import config_from_json
from trifuse.architectures.storage.pretrained import (
    WEIGHTS_FILE,
    load_strict,
    read_description,
    read_safetensors,
    recorded_digest,
    write_safetensors,
)
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels.errors import CheckpointError

from .compiled_forward import Compilation
from .ema import WeightAverage
from .parameter_groups import ParameterGroup
from .step import StepResult

_STATE_TENSORS_FILE = "training_state.safetensors"
_STATE_JSON_FILE = "training_state.json"
_SCHEMA_VERSION = 1
_KEY_OF_FIELD = {"global_step": "step"}  # in the JSON file, where they differ


@dataclass(frozen=True)
class FrozenBase:
    """A file that holds the frozen part of a network, so that training checkpoints need not.

    Attributes:
        prefix: of the frozen part's names in the state dict, e.g. ``"encoder."``.
        path: where it was loaded from, for the reader of the checkpoint.
        sha256: of that file.
    """

    prefix: str
    path: str
    sha256: str


def check_base(model: nn.Module, base: FrozenBase) -> None:
    """Refuse a base that would keep something out of the checkpoint that training changes.

    Raises:
        ValueError: a parameter under the prefix learns.
    """
    learning = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(base.prefix)]
    if learning:
        raise ValueError(f"{learning[0]} learns, but {base.prefix!r} is named as frozen; freeze it, or give no base")


@dataclass
class TrainerState:
    """Where a run is: all of its state that is no tensor.

    Attributes:
        epoch: the current one, counted from 0.
        step_in_epoch: optimiser steps done in it.
        global_step: optimiser steps done in the whole run.
        loss_sum: of this epoch's samples so far.
        largest_gradient_norm: of this epoch's steps so far, before clipping.
        seconds: spent on this epoch's steps so far.
        best_epoch: the epoch in ``best/``, counted from 1.
        best_score: its score.
        smoothed_score: moving average of the monitored metric, where one is wanted.
        ranks: processes that train together.
        loss_scaling: state of the fp16 loss scaler.
        compilation: what is compiled, if anything is to be.
    """

    RENAMED: ClassVar[dict[str, str]] = {"step": "global_step"}

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    largest_gradient_norm: float = 0.0
    seconds: float = 0.0
    best_epoch: int | None = None
    best_score: float | None = None
    smoothed_score: float | None = None
    ranks: int = 1
    loss_scaling: dict[str, int | float] = field(default_factory=dict)
    compilation: Compilation | None = None

    def __post_init__(self) -> None:
        counts = {"epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "step": self.global_step}
        if below := [name for name, count in counts.items() if count < 0]:
            raise ValueError(f"{below[0]} = {counts[below[0]]}, which no run counts to")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, in the names that every version has written."""
        return {_KEY_OF_FIELD.get(name, name): value for name, value in asdict(self).items()}

    def count_step(self, result: StepResult, samples: int, seconds: float) -> None:
        """Count a step of so many samples, which took so many seconds."""
        self.global_step += 1
        self.step_in_epoch += 1
        self.loss_sum += result.loss * samples
        if not result.skipped:
            self.largest_gradient_norm = max(self.largest_gradient_norm, result.gradient_norm)
        self.seconds += seconds

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.step_in_epoch, self.loss_sum, self.largest_gradient_norm, self.seconds = 0, 0.0, 0.0, 0.0


@dataclass(frozen=True)
class _Description:
    """What ``training_state.json`` says.

    Attributes:
        format, schema_version: what it is.
        position: where the run is.
        groups: names of the groups of parameters.
        frozen_base: where the frozen weights are, if they are left out.
        sha256: of the files with tensors.
    """

    format: str
    schema_version: int
    position: TrainerState
    groups: tuple[str, ...]
    frozen_base: FrozenBase | None
    sha256: dict[str, str]

    def digest_of(self, path: Path) -> str:
        """Return the digest of a file, which is never read without."""
        if path.name not in self.sha256:
            raise CheckpointError(f"{path.with_name(_STATE_JSON_FILE)}: expected the SHA-256 of {path.name}, got none")
        return self.sha256[path.name]


def save_training_state(
    folder: Path,
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    average: WeightAverage | None,
    state: TrainerState,
    base: FrozenBase | None,
) -> None:
    """Write everything that `load_training_state` needs into an empty folder."""
    tensors: dict[str, Tensor] = {}
    for group in groups:
        tensors |= {f"optimizer/{group.name}/{name}": tensor for name, tensor in group.state().items()}
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.shadow.items()}
    files = {}
    if base is None:
        model.save_pretrained(folder)  # type: ignore[operator]
        files[WEIGHTS_FILE] = sha256_of(folder / WEIGHTS_FILE)
    else:
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(base.prefix)}
        tensors |= {f"model/{name}": tensor for name, tensor in own.items()}
    files[_STATE_TENSORS_FILE] = write_safetensors(folder / _STATE_TENSORS_FILE, tensors)
    write_record(
        folder / _STATE_JSON_FILE,
        {
            "format": "trifuse-training-state",
            "schema_version": _SCHEMA_VERSION,
            "position": state.to_json(),
            "groups": [group.name for group in groups],
            "frozen_base": None if base is None else asdict(base),
            "sha256": files,
        },
    )


def load_training_state(
    folder: Path,
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    average: WeightAverage | None,
    base: FrozenBase | None,
) -> TrainerState:
    """Bring network, optimisers and averages back to where `save_training_state` saved them.

    Raises:
        CheckpointError: a file is missing or damaged, or does not belong to this network or this frozen base.
    """
    described = _read_description(folder)
    saved_base = described.frozen_base
    if (saved_base and saved_base.sha256) != (base and base.sha256):
        raise CheckpointError(f"{folder}: expected the frozen weights of {saved_base}, got those of {base}")
    path = folder / _STATE_TENSORS_FILE
    tensors = read_safetensors(path, described.digest_of(path))
    if base is None:
        path = folder / WEIGHTS_FILE
        weights = read_safetensors(path, described.digest_of(path))
    else:
        weights = model.state_dict() | _under("model/", tensors)
    load_strict(model, weights, folder)
    for group in groups:
        group.load_state(_under(f"optimizer/{group.name}/", tensors))
    if average is not None:
        average.load(_under("average/", tensors))
    return described.position


def read_position(folder: Path) -> TrainerState:
    """Return where the run was that saved its training state into a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _read_description(folder).position


def _read_description(folder: Path) -> _Description:
    path = folder / _STATE_JSON_FILE
    try:
        description = read_record(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the folder holds no training state") from error
    if description.get("schema_version") != _SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: expected schema_version {_SCHEMA_VERSION}, got {description.get('schema_version')!r}; "
            "resume with the trifuse that started the run"
        )
    return config_from_json(_Description, description, path)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_best(folder: Path, *, oldest: int) -> BestEpoch:
    """Return what chose the best epoch, after a look at its weights.

    Args:
        folder: ``best/``, or the one before it.
        oldest: the first epoch that will do. What training counts as its best is not replaced by less without a word.

    Raises:
        CheckpointError: it is damaged, or came before ``oldest``.
    """
    read_safetensors(folder / WEIGHTS_FILE, recorded_digest(read_description(folder), folder))
    best = BestEpoch.read(folder)
    if best.epoch < oldest:
        raise CheckpointError(
            f"{folder}: expected epoch {oldest}, the best one, got epoch {best.epoch}; put a copy of the best one in "
            f"its place, or go on with epoch {best.epoch}: --force-resume"
        )
    return best
