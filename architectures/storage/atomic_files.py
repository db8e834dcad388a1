"""Files that are never half written, and files that are looked at before they are trusted.

All that the package writes goes through here, and so does what file systems refuse: see `replace` and `sync_folder`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from .regular_file import open_regular
from .text import printable

TEMPORARY_PREFIX = ".trifuse-"
_CHUNK_BYTES = 1 << 20
_ABANDONED_SECONDS = 3600  # a temporary file that nobody has written to for that long has no writer any more
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_CANNOT_OPEN_FOLDER = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
_CANNOT_REPLACE = {errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENOTSUP, errno.ENOSYS}


_written: ContextVar[set[Path] | None] = ContextVar("written", default=None)


@contextmanager
def written_files() -> Iterator[set[Path]]:
    """Yield a set of paths that grows by every file which is written in this context."""
    paths: set[Path] = set()
    token = _written.set(paths)
    try:
        yield paths
    finally:
        _written.reset(token)


@contextmanager
def atomic_write(path: Path, *, verify: Callable[[Path], object] | None = None) -> Iterator[IO[bytes]]:
    """Write a file so that ``path`` holds either its old content or the whole new content, whatever happens.

    The bytes go to a temporary file in the same folder, are flushed to the disk, checked by ``verify`` if given
    (which raises when it does not like what it reads back), and take the place of ``path`` in one rename.
    """
    path = Path(path)
    temporary = temporary_path(path, ending="".join(path.suffixes[-2:]))
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
    folder = temporary_path(path)
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


def temporary_path(path: Path, ending: str = "") -> Path:
    """Return a new path beside another one, whose name says which process writes there: see `remove_leftovers`."""
    return path.with_name(f"{TEMPORARY_PREFIX}{_here()}-{os.getpid()}-{uuid4().hex}{ending}")


def _replace(path: Path, temporary: Path, verify: Callable[[Path], object] | None) -> None:
    """Let a file that was written take the place of another, once it lies on the disk and was checked."""
    _sync(temporary)
    if verify is not None:
        verify(temporary)
    replace(temporary, path)
    sync_folder(path.parent)
    if (written := _written.get()) is not None:
        written.add(path)


def replace(source: Path, target: Path) -> None:
    """Give a file another's name in one rename; in two where the file system renames over nothing that is there.

    In the latter case a process that is killed in between leaves the old file under a temporary name beside the new.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_REPLACE or not target.is_file():
            raise
        aside = temporary_path(target)
        try:
            os.rename(target, aside)
        except OSError:
            raise error from None
        try:
            os.rename(source, target)
        except OSError:
            os.rename(aside, target)
            raise
        aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; names of files that are no text are spelled out."""
    with atomic_write(path) as stream:
        stream.write(printable(text).encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove temporary files and folders that killed processes left in ``folder``, and none that is being written.

    With ``below``, also those in the folders below it.

    A process of this machine that no longer runs left what has its number; of another machine's processes nothing is
    known, and what they have not written to for an hour counts as left.
    """
    pattern = f"{TEMPORARY_PREFIX}*"
    for leftover in list(folder.rglob(pattern) if below else folder.glob(pattern)):
        with suppress(FileNotFoundError):  # another process may remove it, too
            if _is_being_written(leftover):
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def _is_being_written(temporary: Path) -> bool:
    here, _, rest = temporary.name.removeprefix(TEMPORARY_PREFIX).partition("-")
    process = rest.partition("-")[0]
    if here == _here() and process.isdecimal() and not is_running(int(process)):
        return False
    inside = temporary.iterdir() if temporary.is_dir() else ()
    newest_s = max(path.stat().st_mtime for path in (temporary, *inside))
    return time.time() - newest_s <= _ABANDONED_SECONDS


def is_running(process: int) -> bool:
    """Tell whether this machine, or this container of it, has a process of that number."""
    if os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


@cache
def _here() -> str:
    """Name the place where process numbers mean something: the machine, and the container in it."""
    container = ""
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {container}".encode()).hexdigest()[:8]


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_content(path: Path) -> str:
    """Say what a file really is, judged by its first bytes and not by its name."""
    with open_regular(path) as stream:
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
        return "a DICOM file (dcm2niix makes NIfTI files of its series)"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "an unknown binary file"


def damage_advice(error: Exception) -> str:
    """Return what helps where a library could not read a file: another copy if it is damaged, nothing if not."""
    told = isinstance(error, EOFError | zlib.error | zipfile.BadZipFile)
    return "copy it again" if told or re.search(r"truncated|\bEOF\b|\bCRC\b|checksum", str(error)) else ""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: without this a rename may be lost with the power.

    Some file systems cannot sync a folder (shares of Windows, some of FUSE): there, names last when the system says so.
    """
    _sync(folder, refused=_CANNOT_OPEN_FOLDER)


def _sync(path: Path, refused: Set[int] = frozenset()) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in refused:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC | refused:
            raise
    finally:
        os.close(handle)
