"""Safetensors files: written whole, read with suspicion.

The `safetensors` library reads and writes them. What it leaves open is here: a file is verified before it takes its
name, its digest is compared when it is read, tensors that are one stay one, the size of a header is limited, and every
error names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from trifuse.kernels.errors import CheckpointError

from .atomic_files import atomic_path, describe_content, sha256_of
from .regular_file import open_regular
from .text import parse_json

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
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 100_000
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
        TypeError: a tensor has a type that is not stored.
        OSError: the disk is full, or the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise TypeError(f"{path}: tensor {name!r} is {tensor.dtype}; convert it to one of {', '.join(_DTYPES)}")
    unique, tied = _split_tied(tensors)
    stored = _with_memory_of_their_own(unique)
    notes = dict(metadata or {}) | ({_TIED_KEY: json.dumps(tied)} if tied else {})

    digest = ""

    def verify(written: Path) -> None:
        if sha256_of(written) != digest:
            raise CheckpointError(f"{path}: what was written does not read back the same; is the disk failing?")

    with atomic_path(path, verify=verify) as temporary:
        try:
            save_file(stored, temporary, notes or None)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        digest = _digest_of_file(*_read_header(temporary), stored)
    return digest


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
    start, header = _read_header(path)
    try:
        tensors = _read_tensors(path, [name for name in header if name != "__metadata__"])
    except (SafetensorError, TypeError) as error:  # a TypeError for a side that PyTorch cannot count
        raise CheckpointError(
            f"{path}: the file is damaged or truncated ({str(error).splitlines()[0]}); restore it from its source"
        ) from error
    if sha256 is not None and (digest := _digest_of_file(start, header, tensors)) != sha256:
        raise CheckpointError(
            f"{path}: the content has changed since it was written: expected SHA-256 {sha256}, got {digest}; "
            "restore the file from its source"
        )
    for alias, name in _tied_names(header.get("__metadata__", {}), path, tensors).items():
        tensors[alias] = tensors[name]
    return tensors


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


def _read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read tensors into memory of their own, one by one where the library takes the path: one of valid UTF-8."""
    if os.fsencode(path) == str(path).encode(errors="replace"):
        with safe_open(path, framework="pt") as file:
            return {name: _copied(file.get_tensor(name)) for name in names}
    content = load(path.read_bytes())
    return {name: _copied(content[name]) for name in names}


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor that lies in a file, which may be changed or cut; every bit, those of a damaged flag included."""
    return tensor.reshape(-1).view(torch.uint8).clone().view(tensor.dtype).reshape(tensor.shape)


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


def _with_memory_of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU; only those that are not, or share the memory of another, are copied."""
    taken: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        here = tensor.cpu().contiguous()
        if here.untyped_storage().data_ptr() in taken:
            here = here.clone()
        taken.add(here.untyped_storage().data_ptr())
        own[name] = here
    return own


def _digest_of_file(start: bytes, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a file that begins with ``start`` and holds these tensors in the order of its header."""
    digest = hashlib.sha256(start)
    for name in sorted(tensors, key=lambda name: header[name]["data_offsets"]):
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _as_os_error(error: SafetensorError) -> OSError:
    """Return the operating system's error that the library hides in a text."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


def _read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes before the tensors and the JSON in them, after the checks that the library does not make.

    These are smaller limits, names that occur twice, types that are not for networks, and what the file is instead.
    """
    with open_regular(path) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        size = path.stat().st_size
        if size < 8:
            raise CheckpointError(
                f"{path}: expected a safetensors file, found {describe_content(path)} of {size} bytes"
            )
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
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a header that maps names to tensors, got a {type(header).__name__}")
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: declares {len(header)} tensors; expected at most {_MAX_TENSORS}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue  # free text, which may have a key of any name
        if isinstance(entry, dict) and isinstance(kind := entry.get("dtype", "F32"), str) and kind not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has type {kind!r}; this trifuse reads {', '.join(_DTYPES)}")
    return start + text, header


def _tied_names(metadata: Any, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    try:
        tied = json.loads(metadata.get(_TIED_KEY, "{}"))
        sound = all(name in tensors and alias not in tensors for alias, name in tied.items())
    except (AttributeError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header's metadata is malformed; the file is damaged")
    return tied
