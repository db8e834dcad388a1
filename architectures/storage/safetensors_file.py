"""Safetensors files: written whole, read with suspicion.

The format is small enough to be read and written here: eight bytes of little-endian header length, a JSON header of
``name -> dtype, shape, data_offsets``, then the bytes of all tensors without a gap. Reading it ourselves lets every
error name the file, hashes the bytes in the same pass that reads them, and allocates nothing before the header's
arithmetic has been checked against the size of the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trifuse.kernels.errors import CheckpointError

from .atomic_files import atomic_write, describe_content, sha256_of

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
        yet_to_write = (bytes_of(unique[name]) for name in order)
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


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and bytes, whatever the order, device or strides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor.detach()))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on any device as a buffer, row by row whatever its strides."""
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
