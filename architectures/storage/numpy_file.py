"""NumPy's files of arrays, ``.npy`` and ``.npz``: read with suspicion.

The header of an array says how large it is. That is compared with what its file can hold, and with what the reader
expects, before memory is asked for. Nothing is unpickled, and every byte that a checksum covers has been checked.
"""

from __future__ import annotations

import ast
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from trifuse.kernels.errors import DataError

from .regular_file import open_regular

NUMBERS, TEXT = "buif", "US"
"""Kinds of data type that are read."""

_MOST_COMPRESSED = 1100  # bytes per byte on disk: deflate's limit is 1032
_PLAIN_BYTES, _MOST_TIMES = 64 << 20, 100  # measured values of more bytes than that are not compressed a hundredfold
_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000  # in bytes; NumPy's own limit
_LARGEST_CODE_POINT, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError)


class Limit(NamedTuple):
    """How large an array may be, and why not larger."""

    most_bytes: int
    reason: str

    @classmethod
    def of_file(cls, path: Path) -> Limit:
        """Return the limit of an array of measured values in a file; one of nothing but zeros may exceed it."""
        size = path.stat().st_size
        return cls(min(_MOST_COMPRESSED * size, max(_PLAIN_BYTES, _MOST_TIMES * size)), "as its file is that small")

    def check(self, path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Refuse an array that is larger, by its shape and type alone."""
        if (size := math.prod(shape) * dtype.itemsize) > self.most_bytes:
            want = f"at most {self.most_bytes} bytes, {self.reason}"
            raise DataError(path, name, got=f"shape {shape} of {size} bytes", want=want)


class _Header(NamedTuple):
    """What an array is: see `numpy.lib.format`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    columns_first: bool


def read_npy(path: Path, limit: Limit, kinds: str = NUMBERS) -> np.ndarray:
    """Read the array of a ``.npy`` file.

    Args:
        path: of the file.
        limit: how large the array may be.
        kinds: of data types that are expected: `NUMBERS`, `TEXT` or both.

    Raises:
        OSError: the file cannot be opened.
        DataError: it is damaged, holds objects or something else than expected, or more than that.
    """
    with open_regular(path) as stream, _named_damage(path, "array"):
        return _read(stream, path, "array", kinds, limit)


class NpzFile:
    """The arrays of an open ``.npz`` file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(self._members) < len(archive.infolist()):
            got = f"arrays {', '.join(sorted(archive.namelist()))}"
            raise DataError(path, "archive", got=got, want="each name once")

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._members)

    def read(self, name: str, limit: Limit, kinds: str = NUMBERS) -> np.ndarray:
        """Read an array.

        Args:
            name: one of `names`.
            limit, kinds: see `read_npy`.

        Raises:
            DataError: as `read_npy`; or there is no such array.
        """
        with self._opened(name) as stream:
            return _read(stream, self._path, name, kinds, limit)

    def described(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape and the type of an array, by its header; raises as `read`."""
        with self._opened(name) as stream:
            header = _header(stream)
            return header.shape, header.dtype

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        info = self._members.get(name)
        if info is None:
            got = f"arrays {', '.join(sorted(self._members)) or 'none'}"
            raise DataError(self._path, name, got=got, want=f"an array named {name!r}")
        with _named_damage(self._path, name):
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"a member packed by method {info.compress_type}, which NumPy does not use")
            with self._archive.open(info) as stream:
                yield stream


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Open a ``.npz`` file.

    Raises:
        OSError: it cannot be opened.
        DataError: it is no archive.
    """
    with open_regular(path) as stream:
        with _named_damage(path, "archive"):
            archive = zipfile.ZipFile(stream)
            opened = NpzFile(path, archive)
        with archive:
            yield opened


@contextmanager
def _named_damage(path: Path, name: str) -> Iterator[None]:
    """Say which file and array it was that could not be read."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(path, name, got="more than the memory holds", want="a smaller array") from error
    except (OSError, *_DAMAGED) as error:
        got = str(error) or repr(error)
        raise DataError(path, name, got=got, want="an intact array", hint="copy it again") from error


def _read(stream: IO[bytes], path: Path, name: str, kinds: str, limit: Limit) -> np.ndarray:
    """Read an array to the end of its file or member: only there its checksum stands."""
    header = _header(stream)
    if header.dtype.kind not in kinds:
        hint = "objects are pickles, which can execute code: they are never read" if header.dtype.hasobject else ""
        want = "numbers" if kinds == NUMBERS else "text" if kinds == TEXT else "numbers or text"
        raise DataError(path, name, got=f"values of type {header.dtype}", want=want, hint=hint)
    limit.check(path, name, header.shape, header.dtype)
    size = math.prod(header.shape) * header.dtype.itemsize
    content = stream.read(size)
    if len(content) < size or stream.read(1):
        got = f"{len(content)} bytes" if len(content) < size else "more bytes"
        raise ValueError(f"{got}, where its header says {size}")
    return _values(content, header.dtype).reshape(header.shape, order="F" if header.columns_first else "C")


def _values(content: bytes, dtype: np.dtype) -> np.ndarray:
    """Return values of bytes that may be anything: a truth is no other number, and text is of characters."""
    if dtype.kind == "b":
        return np.frombuffer(content, np.uint8) != 0
    if dtype.kind == "U":
        points = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.byteorder))
        low, high = _SURROGATES
        if (points > _LARGEST_CODE_POINT).any() or ((points >= low) & (points <= high)).any():
            raise ValueError("text with what is no character")
    return np.frombuffer(content, dtype)


def _header(stream: IO[bytes]) -> _Header:
    """Read what stands before the values.

    Raises:
        ValueError: it is no header, or one that says what cannot be.
    """
    start = stream.read(8)
    if start[:6] != _MAGIC or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("no header of NumPy's versions 1 to 3")
    length = int.from_bytes(stream.read(2 if start[6:] == b"\1\0" else 4), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    values = _literal(stream.read(length).decode("utf-8" if start[6:] == b"\3\0" else "latin-1"))
    if not isinstance(values, dict) or values.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("a header that does not name descr, fortran_order and shape")
    shape, kind, columns_first = values["shape"], values["descr"], values["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ValueError(f"the shape {str(shape)[:80]}")
    if type(columns_first) is not bool:
        raise ValueError(f"fortran_order {columns_first!r}")
    return _Header(shape, _dtype(kind), columns_first)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(re.sub(r"(\d)L\b", r"\1", text).strip())  # Python 2 wrote 3L
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("a header that is no dictionary") from error


def _dtype(kind: Any) -> np.dtype:
    """Return a data type by its name; one of several fields is none that is read, whatever they are."""
    if isinstance(kind, str):
        try:
            dtype = np.dtype(kind)
        except (TypeError, SyntaxError) as error:
            raise ValueError(f"the data type {kind!r}") from error
        if dtype.itemsize and dtype.fields is None and dtype.subdtype is None:
            return dtype
    raise ValueError(f"the data type {str(kind)[:80]!r}")
