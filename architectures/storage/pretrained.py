"""Networks that save themselves to a folder and are loaded from it.

A folder written by `Pretrained.save_pretrained` holds ``model.safetensors`` and ``config.json``; the latter names the
architecture, its configuration, and the SHA-256 of the former.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trifuse.kernels.errors import CheckpointError

from .atomic_files import replace, sha256_of
from .config_json import SCHEMA_VERSION, config_from_json, config_to_json, nearest_note
from .record import look_at_record, write_record
from .safetensors_file import read_safetensors, write_safetensors
from .text import count

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "WEIGHTS_FILE",
    "Pretrained",
    "config_from_json",
    "config_to_json",
    "load_strict",
    "read_description",
    "read_safetensors",
    "recorded_digest",
    "weights_generator",
    "write_safetensors",
]

FORMAT = "trifuse"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_PENDING_FILE = "model.safetensors.new"
_ROWS_SHOWN = 10
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def weights_generator(seed: int) -> torch.Generator:
    """Return a generator for random weights, on the device that modules are being built on, as far as it has one."""
    device = torch.get_default_device()
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    same_types: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Load tensors into a module, only if every name, every shape and every value is in order.

    Tensors are converted to the module's types and device. A note says how many were stored in another type than
    PyTorch's default; a module that was asked for in one of its own converts without a word.

    Args:
        module: is left unchanged when anything is wrong. One on the meta device takes the tensors as they are.
        tensors: one tensor for each entry of ``module.state_dict()``.
        path: where the tensors came from, for the message.
        same_types: refuse tensors of other types than the module's.
        allow_nonfinite: take NaN and infinite values, to look at a network that has diverged.

    Raises:
        CheckpointError: a table of all missing, unexpected, misshapen and non-finite tensors, and of those refused for
            their type.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    common = [name for name in wanted if name in tensors]
    misshapen = [name for name in common if tensors[name].shape != wanted[name].shape]
    non_finite = [name for name in common if not bool(tensors[name].isfinite().all())]
    retyped = [name for name in common if tensors[name].dtype != wanted[name].dtype]
    sections = [
        ("missing", (f"{name}{nearest_note(name, unexpected)}" for name in missing), len(missing)),
        ("unexpected", (f"{name}{nearest_note(name, missing)}" for name in unexpected), len(unexpected)),
        (
            "of the wrong shape",
            (f"{name}: expected {tuple(wanted[name].shape)}, got {tuple(tensors[name].shape)}" for name in misshapen),
            len(misshapen),
        ),
        ("not finite (NaN or infinity)", iter(non_finite), 0 if allow_nonfinite else len(non_finite)),
        (
            "of another type",
            (f"{name}: expected {wanted[name].dtype}, got {tensors[name].dtype}" for name in retyped),
            len(retyped) if same_types else 0,
        ),
    ]
    problems = "".join(_section(title, rows, number) for title, rows, number in sections if number)
    if problems:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}:{problems}")
    if converted := [name for name in retyped if wanted[name].dtype == torch.get_default_dtype()]:
        stored = ", ".join(sorted({str(tensors[name].dtype) for name in converted}))
        text = f"{count(len(converted), 'tensor')} stored as {stored}, converted to {torch.get_default_dtype()}"
        print(f"note: {path}: {text}", file=sys.stderr)
    assign = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, assign=assign)


def _section(title: str, rows: Iterable[str], number: int) -> str:
    shown = "".join(f"\n    {row}" for _, row in zip(range(_ROWS_SHOWN), rows, strict=False))
    rest = f"\n    and {number - _ROWS_SHOWN} more" if number > _ROWS_SHOWN else ""
    return f"\n  {number} {title}:{shown}{rest}"


class Pretrained:
    """Let a network save itself to a folder and be loaded from it.

    A network that inherits from this and from `torch.nn.Module` declares ``architecture``, its name on disk, and
    ``config_type``, the frozen dataclass that its constructor takes and keeps as ``self.config``.
    """

    architecture: ClassVar[str]
    config_type: ClassVar[type]
    config: Any

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` and ``config.json``; the folder is made if it does not exist.

        A save over an older one may be cut short at any moment: the folder then still loads, either as the old
        network or as the new one.
        """
        state = typing.cast(nn.Module, self).state_dict()
        write_network(Path(folder), state, self.architecture, self.config)

    @classmethod
    def saved_config(cls, folder: Path | str) -> Any:
        """Return the configuration of the network that `save_pretrained` wrote to ``folder``, without its weights.

        Raises:
            CheckpointError: there is none, it is damaged, from another architecture or from a newer trifuse.
        """
        values = read_description(Path(folder), cls.architecture).get("config")
        return config_from_json(cls.config_type, values, Path(folder) / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, same_types: bool = False, allow_nonfinite: bool = False) -> Self:
        """Load the network that `save_pretrained` wrote to ``folder``, in evaluation mode.

        Args:
            folder: with ``model.safetensors`` and ``config.json``.
            same_types: refuse weights of another type, which are converted otherwise: see `load_strict`.
            allow_nonfinite: take NaN and infinite weights, which are refused otherwise.

        Raises:
            CheckpointError: something is missing, damaged, from another architecture or from a newer trifuse.
        """
        folder = Path(folder)
        description = read_description(folder, cls.architecture)
        config = config_from_json(cls.config_type, description.get("config"), folder / CONFIG_FILE)
        digest = recorded_digest(description, folder)
        weights = weights_file(folder, digest)
        try:
            with torch.device("meta"):  # no weight is drawn only to be loaded over
                network = typing.cast(Any, cls)(config)
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:  # sizes that cannot be
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{folder / CONFIG_FILE}: no network can be built of this: {reason}") from error
        tensors = read_safetensors(weights, digest)
        load_strict(network, tensors, weights, same_types=same_types, allow_nonfinite=allow_nonfinite)
        return network.to(torch.get_default_device()).eval()

    def start_from(self, folder: Path | str, *, reset_head: bool = False) -> None:
        """Take over the weights of another network of this architecture, which may have other classes.

        Args:
            folder: written by `save_pretrained`.
            reset_head: leave those tensors as they are whose shapes follow the number of classes.

        Raises:
            CheckpointError: as for `from_pretrained`; or the weights do not fit this network, which stays as it was.
        """
        folder, module = Path(folder), typing.cast(nn.Module, self)
        digest = recorded_digest(read_description(folder, self.architecture), folder)
        path = weights_file(folder, digest)
        own, saved, head = module.state_dict(), read_safetensors(path, digest), self._head()
        if reset_head:
            saved = {name: tensor for name, tensor in saved.items() if name not in head}
            saved |= {name: own[name] for name in head}
        try:
            load_strict(module, saved, path)
        except CheckpointError as error:
            if any(name in saved and saved[name].shape != own[name].shape for name in head):
                hint = "the head is for other classes: --reset-head keeps all weights but the head's, which starts anew"
                raise CheckpointError(f"{error}\n{hint}") from error
            raise

    def _head(self) -> set[str]:
        """Return the names of the tensors whose shapes follow the number of classes."""
        values = {**config_to_json(self.config), "num_classes": self.config.num_classes + 1}
        with torch.device("meta"):
            config = config_from_json(self.config_type, values, self.architecture)
            other = typing.cast(Any, type(self))(config).state_dict()
        own = typing.cast(nn.Module, self).state_dict()
        return {name for name, tensor in own.items() if other[name].shape != tensor.shape}


def write_network(
    folder: Path,
    tensors: Mapping[str, Tensor],
    architecture: str,
    config: Any,
    further: Mapping[str, Any] = _NOTHING,
) -> None:
    """Write a network's tensors and its configuration, and ``further`` facts, as `Pretrained.save_pretrained` says."""
    folder.mkdir(parents=True, exist_ok=True)
    pending = folder / _PENDING_FILE
    digest = write_safetensors(pending, tensors, {"format": "pt"})
    description = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "architecture": architecture,
        "config": config_to_json(config),
        "sha256": {WEIGHTS_FILE: digest},
        **further,
    }
    write_record(folder / CONFIG_FILE, description)  # from here on the folder means the new network
    replace(pending, folder / WEIGHTS_FILE)


def read_description(folder: Path, architecture: str | None = None) -> dict[str, Any]:
    """Return the content of ``config.json``, after checking who wrote it and for which architecture.

    Args:
        folder: written by `Pretrained.save_pretrained`.
        architecture: the one that is wanted; None takes any.

    Raises:
        CheckpointError: nothing there, not ours, newer than this trifuse, or another architecture.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        want = f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        if folder.is_file():
            raise CheckpointError(f"{folder}: {want}, got a file; trifuse convert makes one of published weights")
        raise CheckpointError(f"{path if folder.is_dir() else folder}: not found; {want}")
    description, damage = look_at_record(path)
    if description.get("format") != FORMAT:
        raise CheckpointError(f'{path}: expected a configuration written by trifuse, with "format": "{FORMAT}"')
    version = description.get("schema_version")
    if type(version) is not int or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version is {version!r}, this trifuse reads up to {SCHEMA_VERSION}; upgrade trifuse"
        )
    if architecture is not None and description.get("architecture") != architecture:
        raise CheckpointError(
            f"{path}: wrong architecture: got {description.get('architecture')!r}, want {architecture!r}"
        )
    if damage is not None:
        raise damage
    return description


def recorded_digest(description: Mapping[str, Any], folder: Path) -> str:
    """Return the SHA-256 of the weights that a description read from ``folder`` records.

    Raises:
        CheckpointError: it records none.
    """
    digests = description.get("sha256")
    digest = digests.get(WEIGHTS_FILE) if isinstance(digests, dict) else None
    if not isinstance(digest, str):
        raise CheckpointError(f"{folder / CONFIG_FILE}: expected the SHA-256 of {WEIGHTS_FILE}, got {digest!r}")
    return digest


def weights_file(folder: Path, digest: str) -> Path:
    """The file that config.json speaks of: a save that was cut short has not given it its final name yet."""
    pending = folder / _PENDING_FILE
    return pending if pending.is_file() and sha256_of(pending) == digest else folder / WEIGHTS_FILE
