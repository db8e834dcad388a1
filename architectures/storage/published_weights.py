"""Published weights of others: read without executing anything, renamed, and saved as a folder that trifuse loads.

A converter says what the tensors of a file are called here and which network they are for; all that it shares with the
others is here: reading, comparing with the network's own names and shapes, writing, reporting.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifuse.kernels.errors import CheckpointError

from .atomic_files import describe_content, sha256_of
from .config_json import nearest_note
from .file_names import real_path
from .pretrained import read_description, recorded_digest, weights_file, write_network
from .safetensors_file import read_safetensors
from .survival import fatality
from .text import listed

_NESTING = ("teacher", "model", "state_dict", "model_state_dict", "module", "net", "network", "network_weights")
_SOURCE = "converted_from"  # in the description of a network: the file that it was converted from
_COMPARED = 10  # so many missing names are compared with the unexpected ones: no more are shown
_MEMORY_PER_BYTE, _LEAST_MEMORY_BYTES = 4, 1 << 30  # that reading a file may take
_DEEPEST = 3  # so many of them may be nested
WRAPPER = r"(?:module|_orig_mod|model|net|network|backbone|state_dict)\."
"""What Lightning, timm, DDP, compilation and people's own modules put before the names of a network, as a pattern."""

_NOT_FETCHED = ("an empty file", "a git-lfs pointer", "an HTML page")  # what comes where a download failed
_NUMPY_NAMES = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype")


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor of a checkpoint.

    Args:
        source: where the tensors came from.
        config: the network that they are for.
        mapped: published name -> our name.
        ignored: names of tensors that the network has no use for: heads of another task.
        missing: our names, for which the checkpoint has nothing, or not all parts.
        misshapen: our names whose tensors have another shape than the network's, with both shapes.
        unexpected: published names that follow no known pattern.
        further: what else the file says, for the description of the network.
        notes: what is worth telling of it.
    """

    source: str
    config: Any
    mapped: dict[str, str]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]
    further: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = (re.match(f"(?:{WRAPPER})+", name) for name in self.mapped)
        before = sorted({match[0] for match in found if match})
        left_out = f", {' and '.join(before)} left out before their names" if before else ""
        lines = [f"{self.source}: {self.config}", f"  {len(self.mapped)} tensors mapped{left_out}"]
        for title in ("ignored", "missing", "misshapen", "unexpected"):
            names = getattr(self, title)
            if title == "missing":
                near = (nearest_note(name, self.unexpected) for name in names[:_COMPARED])
                names = [name + note for name, note in zip_longest(names, near, fillvalue="")]
            if names:
                lines.append(f"  {len(names)} {title}: {listed(names)}")
        return "\n".join((*lines, *(f"  note: {note}" for note in self.notes)))


Read = Callable[[Path], tuple[dict[str, Tensor], ConversionReport]]


def convert_weights(
    path: str | os.PathLike[str], out: str | os.PathLike[str], architecture: str, read: Read
) -> ConversionReport:
    """Convert a published checkpoint to a folder of ``model.safetensors`` and ``config.json``.

    Args:
        path: the published file.
        out: the folder to write.
        architecture: the name on disk of what the weights are for.
        read: the converter's own reader.

    Raises:
        CheckpointError: the reader refuses the file, or the file lies in ``out``.
    """
    path, folder = Path(path), Path(out)
    if real_path(path).is_relative_to(real_path(folder)):
        raise CheckpointError(f"{path}: lies in the output folder {folder}, whose files would replace it; name another")
    state, report = read(path)
    source = {"file": path.name, "sha256": sha256_of(path)}
    write_network(folder, state, architecture, report.config, {_SOURCE: source, **report.further})
    return report


def is_conversion(path: Path) -> bool:
    """Tell whether a file lies in a folder that `convert_weights` wrote."""
    try:
        return _SOURCE in read_description(path.parent)
    except CheckpointError:
        return False


def read_tensors(path: Path, architecture: str) -> dict[str, Tensor]:
    """Read the tensors of a folder that `convert_weights` wrote, or of a ``.safetensors`` or ``.pth`` file.

    Raises:
        CheckpointError: nothing is there, it is damaged, holds code, or is for another architecture.
    """
    if path.is_dir():
        digest = recorded_digest(read_description(path, architecture), path)
        return read_safetensors(weights_file(path, digest), digest)
    return read_safetensors(path) if path.suffix == ".safetensors" else tensors_in(read_pickled(path), path)


def compare(
    source: str,
    config: Any,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    mapped: dict[str, str],
    ignored: list[str],
    unexpected: list[str],
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Return renamed tensors in the order of the network's own, and the report, if they are all there and alike.

    Args:
        source: where they came from.
        config: the network that they are for; its text names it in messages.
        state: the tensors by our names.
        wanted: the network's own state dict, e.g. on the meta device.
        mapped: published name -> our name.
        ignored: see `ConversionReport`.
        unexpected: see `ConversionReport`.

    Raises:
        CheckpointError: a tensor is missing, misshapen or unknown.
    """
    missing = tuple(name for name in wanted if name not in state)
    misshapen = tuple(
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    )
    report = ConversionReport(source, config, mapped, tuple(ignored), missing, misshapen, tuple(unexpected))
    if missing or misshapen or unexpected:
        kind = str(config).partition("(")[0]
        raise CheckpointError(f"expected all weights of one {kind} and nothing else, got {report}")
    return {name: state[name] for name in wanted}, report


def read_pickled(path: Path) -> Any:
    """Read what `torch.save` wrote; a file that holds anything to be executed is refused unexecuted.

    It is read in a process of its own first: what ends that one, or takes all its memory, is refused.

    Raises:
        CheckpointError: nothing is there, it is damaged, it holds code, or what it asks for has no bounds.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file or a folder of converted weights, found nothing")
    found = describe_content(path)
    if found.startswith(_NOT_FETCHED):
        raise CheckpointError(f"{path}: expected tensors saved by PyTorch, found {found}; fetch the file itself again")
    most_bytes = _MEMORY_PER_BYTE * path.stat().st_size + _LEAST_MEMORY_BYTES
    if end := fatality(lambda: _load_weights_only(path), most_bytes):
        raise CheckpointError(
            f"{path}: expected tensors saved by PyTorch, found {found} that ends its reader with {end}: more than "
            f"{most_bytes / 2**30:.1f} GiB for {path.stat().st_size / 2**20:.1f} MiB, or damage; fetch the file again"
        )
    try:
        return _load_weights_only(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected tensors saved by PyTorch, found {found} that holds code or something else; "
            "nothing in it was executed; get the weights as safetensors, or have their owner save the "
            "state_dict() alone"
        ) from error
    except Exception as error:  # torch reports damage with a dozen types, none of which names the file
        raise CheckpointError(
            f"{path}: expected tensors saved by PyTorch, found {found} that cannot be read ({error}); "
            "is it damaged or cut short?"
        ) from error


def _load_weights_only(path: Path) -> Any:
    with torch.serialization.safe_globals([(_NumpyNumber, name) for name in _NUMPY_NAMES]):
        return torch.load(path, map_location="cpu", weights_only=True)


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors in what `read_pickled` read from ``path``, however deep they lie.

    Raises:
        CheckpointError: there is no dictionary of named tensors.
    """
    for _ in range(_DEEPEST):
        inner = content if isinstance(content, dict) else {}
        content = next((inner[key] for key in _NESTING if isinstance(inner.get(key), dict)), content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of named tensors, got a {type(content).__name__}")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            what = f"{type(value).__name__} under {name!r}"
            raise CheckpointError(f"{path}: expected a dictionary of named tensors, got one with a {what}")
    return content


class _NumpyNumber:
    """Holds nothing; takes the place of NumPy's numbers, such as the scores that nnU-Net keeps beside its weights."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...
