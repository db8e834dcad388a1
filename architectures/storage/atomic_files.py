"""Files that are never half written, and files that are looked at before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

TEMPORARY_PREFIX = ".trifuse-"
_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_write(path: Path, *, verify: Callable[[Path], object] | None = None) -> Iterator[IO[bytes]]:
    """Write a file so that ``path`` holds either its old content or the whole new content, whatever happens.

    The bytes go to a temporary file in the same folder, are flushed to the disk, checked by ``verify`` if given
    (which raises when it does not like what it reads back), and take the place of ``path`` in one rename.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY_PREFIX + uuid4().hex + "".join(path.suffixes[-2:]))
    try:
        with open(temporary, "xb") as stream:
            yield stream
        _replace(path, temporary, verify)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path, *, verify: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Write a file as `atomic_write` does, by a library that takes a path: yields that of the temporary file.

    It has a temporary folder for itself, where the library may have temporary files of its own.
    """
    path = Path(path)
    folder = path.with_name(TEMPORARY_PREFIX + uuid4().hex)
    temporary = folder / path.name
    try:
        folder.mkdir()
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a library may have replaced it by a file that only its owner can read
        _replace(path, temporary, verify)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(path: Path, temporary: Path, verify: Callable[[Path], object] | None) -> None:
    """Let a file that was written take the place of another, once it lies on the disk and was checked."""
    _sync(temporary)
    if verify is not None:
        verify(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_leftovers(folder: Path, *, older_than_seconds: float | None = None) -> None:
    """Remove temporary files and folders that a killed process left in ``folder``.

    Args:
        folder: where they lie.
        older_than_seconds: leave what was written later than that: another process may still be writing it.
    """
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(FileNotFoundError):  # another process may remove it, too
            if older_than_seconds is not None and time.time() - leftover.stat().st_mtime <= older_than_seconds:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_content(path: Path) -> str:
    """Say what a file really is, judged by its first bytes and not by its name."""
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip file"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (the real file was not downloaded)"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that needed a login?)"
    if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0":
        return "an uncompressed NIfTI file"
    if head[344:348] == b"ni1\0":
        return "the header of a NIfTI pair (.hdr and .img)"
    if head[128:132] == b"DICM":
        return "a DICOM file"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "an unknown binary file"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: without this a rename may be lost with the power."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
