"""A gzip file, decompressed to its very end, and never beyond what its content promises to be.

Only at the end of a stream its checksum stands: who stops reading earlier takes damaged voxels for good ones. A stream
that inflates without end ("gzip bomb") is cut off as soon as it is longer than promised, whatever it would grow to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from trifuse.kernels.errors import DataError

_DEFLATE_MAX_RATIO = 1032  # zlib's own technical notes: no stream inflates further
_SLACK_BYTES = 1 << 20  # padding that some writers leave behind the last voxel
_CHUNK_BYTES = 1 << 20


def gunzip(
    path: Path, header_bytes: int, promised_bytes: Callable[[bytearray], int], *, only_header: bool = False
) -> bytearray:
    """Decompress a gzip file to its end, checksum included, but never beyond what its header promises.

    Args:
        path: the file.
        header_bytes: how much of the content holds its header, at most.
        promised_bytes: reads that much, and returns the size of the whole content by its header.
        only_header: stop there, where nothing that follows has been checked.

    Raises:
        DataError: the file is damaged, truncated, too short for what it promises, or inflates beyond it.
    """
    content, limit = bytearray(), None
    try:
        for piece in _inflated(path):
            content += piece
            if limit is None and len(content) >= header_bytes:
                limit = _plausible(path, promised_bytes(content[:header_bytes])) + _SLACK_BYTES
                if only_header:
                    break
            if limit is not None and len(content) > limit:
                hint = "it inflates to more than the image it claims to hold, and was not read further"
                raise DataError(path, "gzip stream", got=f"more than {limit} bytes", want="what it promises", hint=hint)
    except zlib.error as error:
        hint = "it was damaged while being stored or copied: fetch it again"
        raise DataError(
            path, "gzip stream", got=f"{error}, in byte {len(content)}", want="no damage", hint=hint
        ) from error
    except EOFError as error:
        got = f"an end after {len(content)} decompressed bytes"
        hint = "it is truncated: fetch it again"
        raise DataError(path, "gzip stream", got=got, want="a complete file", hint=hint) from error
    return content


def _inflated(path: Path) -> Iterator[bytes]:
    """Yield the content of a gzip file piece by piece; zlib checks every member, EOFError says that one is cut off."""
    decoder, pending = zlib.decompressobj(wbits=31), b""
    with open(path, "rb") as stream:
        while chunk := pending or stream.read(_CHUNK_BYTES):
            if decoder.eof:  # behind a complete member: zero padding, or one more member
                chunk = chunk.lstrip(b"\0")
                if chunk:
                    decoder = zlib.decompressobj(wbits=31)
            if chunk:
                yield decoder.decompress(chunk, _CHUNK_BYTES)
                chunk = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            pending = chunk
    if not decoder.eof:
        raise EOFError


def _plausible(path: Path, promised: int) -> int:
    """Return the promised size, unless the file is too short to inflate to it."""
    size = path.stat().st_size
    if promised > size * _DEFLATE_MAX_RATIO:
        got = f"{size} bytes, too few to hold that however well compressed"
        raise DataError(path, "dim", got=got, want=f"{promised} bytes, by its header")
    return promised
