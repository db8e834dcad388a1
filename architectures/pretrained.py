"""Weights on disk: safetensors read with suspicion, and networks that save and load themselves.

A folder written by `Pretrained.save_pretrained` holds ``model.safetensors`` and ``config.json``; the latter names the
architecture, its configuration, and the SHA-256 of the former.

The safetensors format is small enough to be read and written here: eight bytes of little-endian header length, a JSON
header of ``name -> dtype, shape, data_offsets``, then the bytes of all tensors without a gap. Reading it ourselves
lets every error name the file, hashes the bytes in the same pass that reads them, and allocates nothing before the
header's arithmetic has been checked against the size of the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trifuse.kernels.errors import CheckpointError

from .files import atomic_write, describe_content, sha256_of, write_json

FORMAT = "trifuse"
SCHEMA_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_PENDING_FILE = "model.safetensors.new"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 100_000
_MAX_ELEMENTS = 2**62
_TIED_KEY = "trifuse.tied"
_ROWS_SHOWN = 10


# --- safetensors ------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors atomically and return the SHA-256 of the file.

    Tensors may lie on any device, need not be contiguous, and may share memory: those that are the very same view of
    the same memory are stored once and come back tied.

    Args:
        path: the file to write; its folder must exist.
        tensors: what to store, by name.
        metadata: free text by name, stored beside the tensors.

    Raises:
        TypeError: a tensor has a type that the format does not know.
    """
    unique, tied = _split_tied(tensors)
    order = sorted(unique, key=lambda name: (-unique[name].element_size(), name))  # wide types first: all are aligned
    header: dict[str, Any] = {}
    notes = dict(metadata or {}) | ({_TIED_KEY: json.dumps(tied)} if tied else {})
    if notes:
        header["__metadata__"] = notes
    end = 0
    for name in order:
        tensor = unique[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{path}: tensor {name!r} is {tensor.dtype}; expected one of {', '.join(_DTYPES)}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def verify(written: Path) -> None:
        if sha256_of(written) != digest.hexdigest():
            raise CheckpointError(f"{path}: what was written does not read back the same; is the disk failing?")

    with atomic_write(path, verify=verify) as stream:
        yet_to_write = (_bytes_of(unique[name]) for name in order)
        for part in itertools.chain((len(text).to_bytes(8, "little"), text), yet_to_write):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def read_safetensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file that may be damaged, mislabelled or hostile.

    Args:
        path: the file.
        sha256: the expected hexadecimal digest of the whole file; not checked if None.

    Raises:
        CheckpointError: the file is missing, is something else, ends early, contradicts itself, declares more than it
            holds, or does not have the expected digest.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    size = path.stat().st_size
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        header = _read_header(stream, path, size, digest)
        metadata = header.pop("__metadata__", {})
        entries = _checked_entries(header, path, size - stream.tell())
        tensors = {name: _read_tensor(stream, entry, path, digest) for name, entry in entries}
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{path}: the content has changed since it was written: expected SHA-256 {sha256}, "
            f"got {digest.hexdigest()}; restore the file from its source"
        )
    for alias, name in _tied_names(metadata, path, tensors).items():
        tensors[alias] = tensors[name]
    return tensors


def _split_tied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor.detach()
    return unique, tied


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_header(stream: IO[bytes], path: Path, size: int, digest: Any) -> dict[str, Any]:
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if size < 8:
        raise CheckpointError(f"{path}: expected a safetensors file, found {describe_content(path)} of {size} bytes")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        content = describe_content(path)
        hint = "; PyTorch pickles are converted with: trifuse convert" if content == "a zip file" else ""
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {content} "
            f"(as a header length its first bytes would mean {length} bytes){hint}"
        )
    text = stream.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path}: the file is truncated: its header has {length} bytes, but the file only {size}")
    digest.update(start + text)
    try:
        header = json.loads(text, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a header that maps names to tensors, got a {type(header).__name__}")
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: declares {len(header)} tensors; expected at most {_MAX_TENSORS}")
    return header


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _checked_entries(header: dict[str, Any], path: Path, available: int) -> list[tuple[str, dict[str, Any]]]:
    """Check every entry against the bytes that are there, and return them in file order."""
    for name, entry in header.items():
        _check_entry(name, entry, path)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    position = 0
    for name, entry in entries:
        start, end = entry["data_offsets"]
        if start != position:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {start} of the data; expected {position}")
        position = end
    if position > available:
        raise CheckpointError(
            f"{path}: the file is truncated: it declares {position} bytes of tensors but holds {available}"
        )
    if position < available:
        raise CheckpointError(f"{path}: {available - position} bytes follow the last tensor; expected none")
    return entries


def _check_entry(name: str, entry: Any, path: Path) -> None:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_formed = all(type(value) is int and value >= 0 for value in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed; the file is damaged")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if math.prod(max(length, 1) for length in shape) > _MAX_ELEMENTS:
        raise CheckpointError(f"{path}: tensor {name!r} declares the impossible shape {shape}")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - start != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and type {dtype} needs {expected} bytes, "
            f"but the header gives it {end - start}"
        )


def _read_tensor(stream: IO[bytes], entry: dict[str, Any], path: Path, digest: Any) -> Tensor:
    start, end = entry["data_offsets"]
    content = torch.empty(end - start, dtype=torch.uint8)
    buffer = content.numpy().data
    if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError(f"{path}: the file became shorter while it was read")
    digest.update(buffer)
    return content.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _tied_names(metadata: Any, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    try:
        tied = json.loads(metadata.get(_TIED_KEY, "{}"))
        sound = all(name in tensors and alias not in tensors for alias, name in tied.items())
    except (AttributeError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header's metadata is malformed; the file is damaged")
    return tied


# --- a state dict and the module that it is meant for -----------------------------------------------------------------


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module, only if every name, every shape and every value is in order.

    Args:
        module: is left unchanged when anything is wrong. One on the meta device takes the tensors as they are.
        tensors: one tensor for each entry of ``module.state_dict()``; converted to the module's type and device.
        path: where the tensors came from, for the message.

    Raises:
        CheckpointError: a table of all missing, unexpected, misshapen and non-finite tensors.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    common = [name for name in wanted if name in tensors]
    misshapen = [name for name in common if tensors[name].shape != wanted[name].shape]
    non_finite = [name for name in common if not bool(tensors[name].isfinite().all())]
    sections = [
        ("missing", (f"{name}{_nearest(name, unexpected)}" for name in missing), len(missing)),
        ("unexpected", (f"{name}{_nearest(name, missing)}" for name in unexpected), len(unexpected)),
        (
            "of the wrong shape",
            (f"{name}: expected {tuple(wanted[name].shape)}, got {tuple(tensors[name].shape)}" for name in misshapen),
            len(misshapen),
        ),
        ("not finite (NaN or infinity)", iter(non_finite), len(non_finite)),
    ]
    problems = "".join(_section(title, rows, count) for title, rows, count in sections if count)
    if problems:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}:{problems}")
    assign = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, assign=assign)


def _section(title: str, rows: Iterable[str], count: int) -> str:
    shown = "".join(f"\n    {row}" for _, row in zip(range(_ROWS_SHOWN), rows, strict=False))
    rest = f"\n    and {count - _ROWS_SHOWN} more" if count > _ROWS_SHOWN else ""
    return f"\n  {count} {title}:{shown}{rest}"


def _nearest(name: str, candidates: list[str]) -> str:
    match = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f"  (nearest: {match[0]})" if match else ""


# --- configurations ---------------------------------------------------------------------------------------------------


def config_to_json(config: Any) -> dict[str, Any]:
    """Turn a configuration dataclass into JSON values; fields with ``metadata={"saved": False}`` are left out."""
    return {
        field.name: config_to_json(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(config)
        if field.metadata.get("saved", True)
        for value in [getattr(config, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def config_from_json(config_type: type, values: Any, source: object) -> Any:
    """Build a configuration dataclass from JSON values, every one of them checked against the field's type.

    Raises:
        CheckpointError: an unknown field, a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: expected the fields of {config_type.__name__}, got {values!r}")
    hints = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type)]
    for name in values:
        if name not in known:
            raise CheckpointError(
                f"{source}: unknown field {name!r} of {config_type.__name__}{_nearest(name, known)}; this trifuse "
                f"reads schema version {SCHEMA_VERSION}: was the file written by a newer one?"
            )
    arguments = {name: _typed(value, hints[name], f"{source}: field {name!r}") for name, value in values.items()}
    try:
        return config_type(**arguments)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as the type that ``hint`` asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return config_from_json(typing.cast(type, hint), value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_typed(item, kind, where) for item, kind in zip(value, items, strict=True))
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _typed(value, option, where)
            except CheckpointError:
                continue
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise CheckpointError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


# --- networks ---------------------------------------------------------------------------------------------------------


class Pretrained:
    """Let a network save itself to a folder and be loaded from it.

    A network that inherits from this and from `torch.nn.Module` declares ``architecture``, its name on disk, and
    ``config_type``, the frozen dataclass that its constructor takes and keeps as ``self.config``.
    """

    architecture: ClassVar[str]
    config_type: ClassVar[type]
    config: Any

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` and ``config.json``; the folder is made if need be.

        A save over an older one may be cut short at any moment: the folder then still loads, either as the old
        network or as the new one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pending = folder / _PENDING_FILE
        digest = write_safetensors(pending, typing.cast(nn.Module, self).state_dict(), {"format": "pt"})
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "architecture": self.architecture,
            "config": config_to_json(self.config),
            "sha256": {WEIGHTS_FILE: digest},
        }
        write_json(folder / CONFIG_FILE, description)  # from here on the folder means the new network
        pending.replace(folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Load the network that `save_pretrained` wrote to ``folder``.

        Raises:
            CheckpointError: something is missing, damaged, from another architecture or from a newer trifuse.
        """
        folder = Path(folder)
        description = read_description(folder, cls.architecture)
        config = config_from_json(cls.config_type, description.get("config"), folder / CONFIG_FILE)
        digests = description.get("sha256")
        digest = digests.get(WEIGHTS_FILE) if isinstance(digests, dict) else None
        if not isinstance(digest, str):
            raise CheckpointError(f"{folder / CONFIG_FILE}: expected the SHA-256 of {WEIGHTS_FILE}, got {digest!r}")
        weights = _weights_file(folder, digest)
        with torch.device("meta"):  # no weight is drawn only to be loaded over
            network = typing.cast(Any, cls)(config)
        load_strict(network, read_safetensors(weights, digest), weights)
        return network.to(torch.get_default_device())


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
        missing = path if folder.is_dir() else folder
        raise CheckpointError(f"{missing}: not found; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {describe_content(path)} ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
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
    return description


def _weights_file(folder: Path, digest: str) -> Path:
    """The file that config.json speaks of: a save that was cut short has not given it its final name yet."""
    pending = folder / _PENDING_FILE
    return pending if pending.is_file() and sha256_of(pending) == digest else folder / WEIGHTS_FILE
