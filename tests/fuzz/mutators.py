"""Damage done to files: to their bytes, and to what those stand for.

Every function draws from the generator that it is given, and from nothing else.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

LONGEST = 1 << 16
"""Bytes of a damaged file, at most, unless its seed is longer."""

_TOKEN = re.compile(rb"[A-Za-z0-9_+-]+(?:\.[0-9]+)?|[\s]+|.", re.DOTALL)
_NUMBERS = (
    *(b"0", b"-1", b"1", b"255", b"256", b"32768", b"2147483648", b"9223372036854775808", b"9" * 5000, b"1e999"),
    *(b"-1e999", b"nan", b"inf", b"-inf", b"1e-320", b"0x10", b"1_000", b"01", b"1,5", b"\xd9\xa3", b"\xc2\xb2"),
)
_NAMES = (
    *(
        "",
        ".",
        "..",
        "../../escaped",
        "/etc/passwd",
        "/dev/zero",
        "pipe",
        "loop",
        "/",
        "C:\\x",
        "\\\\host\\x",
        "a/b",
        "a\x00b",
        "\x00",
        "x" * 300,
    ),
    *("\n", "\r\n", "\t", "é", "e\u0301", "\u202e", "\ufeff", "²", "None", "true", " ", "-", "--help", "a=b", '"', "'"),
)
_WORDS = (
    *(name.encode() for name in _NAMES),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b",", b";", b'"', b"[", b"]", b"{", b"}", b"=", b":", b"#"),
    *(b"[" * 3000, b"null", b"None", b"open('x')", b"1970-01-01", b"0000-00-00"),
)
_RAW = {  # what json.dumps has no words for, by what stands for it until the text is there
    "@huge@": "9" * 5000,
    "@infinite@": "1e999",
    "@nan@": "NaN",
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deep object@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@surrogate@": '"\\ud800"',
    "@long@": "123456789012345678901234567890",
}
_VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 255, 300, 2**31, 2**63, 2**64, 0.5, -0.0, 1e308, [], {})
_VALUES += ([[]], {"": None}, [None], [0] * 50, [True], *_NAMES, *_RAW)


def damaged(content: bytes, form: str, draw: Random, others: Sequence[bytes]) -> bytes:
    """Return a damaged copy of a file.

    Args:
        content: of the file.
        form: what it is, one of `FORMS`; its bytes may be damaged whatever it is.
        draw: decides everything.
        others: more files of that form, pieces of which may be put in.
    """
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        change = FORMS[form] if draw.random() < 0.75 else _bytes
        content = change(content, draw, others)[: max(LONGEST, len(others[0]))]
    return content


def _bytes(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Flip, cut, repeat, exchange or overwrite bytes."""
    at, kind = draw.randrange(len(content) + 1), draw.randrange(8)
    until = min(at + draw.choice((1, 2, 4, 8, 16, draw.randrange(1, 512))), len(content))
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + content[until:]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + content[at:until] * draw.choice((2, 3, 100)) + content[until:]
    if kind == 4:
        other = draw.choice(others)
        begin = draw.randrange(len(other) + 1)
        return content[:at] + other[begin : begin + draw.choice((4, 16, 64, 1 << 15))] + content[until:]
    if kind == 5:
        new = draw.choice((draw.randbytes(4), draw.choice(_WORDS), draw.choice(_NUMBERS)))
        return content[:at] + new + content[at if draw.random() < 0.5 else until :]
    return _overwritten(content, draw, len(content))


def _overwritten(content: bytes, draw: Random, until: int) -> bytes:
    """Put a number that is hard to take into the first bytes, in any width and order."""
    code = draw.choice("bhiqfd")
    width = struct.calcsize(code)
    if until < width:
        return content
    at = draw.randrange(0, until - width + 1, draw.choice((1, width)))
    numbers: tuple[Any, ...] = (0.0, -1.0, 1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"), 1e9, 4.5)
    if code not in "fd":
        most = 1 << 8 * width - 1
        numbers = (0, 1, 2, 3, 4, 7, 8, 16, 64, -1, -most, most - 1, most >> 1, draw.randrange(-most, most))
    return content[:at] + struct.pack(draw.choice("<>") + code, draw.choice(numbers)) + content[at + width :]


def _nifti(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    return _overwritten(content, draw, min(len(content), draw.choice((120, 352, 544))))


def _gzip(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Damage what is inside, or pack something else in, or two things."""
    try:
        inside = zlib.decompressobj(wbits=31).decompress(content, LONGEST)
    except zlib.error:
        return _bytes(content, draw, others)
    kind = draw.randrange(8)
    if kind == 0:
        inside += bytes(draw.choice((1, 1 << 12, 1 << 22)))  # more than is promised
    elif kind == 1:
        return content + draw.choice((b"\0" * 100, content, b"x", content[:20]))
    else:
        inside = _nifti(inside, draw, [inside])
    return gzip.compress(inside, 1, mtime=0)


def _text(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Exchange, repeat or remove words or lines."""
    if draw.random() < 0.3:
        lines = content.splitlines(keepends=True) or [b""]
        at, kind = draw.randrange(len(lines)), draw.randrange(4)
        if kind == 0:
            lines.insert(draw.randrange(len(lines) + 1), lines[at])
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, draw.choice(_WORDS) + b"\n")
        else:
            lines[at] = lines[at] * draw.choice((2, 200))
        return b"".join(lines)
    words = _TOKEN.findall(content[: 1 << 14]) or [b""]
    at = draw.randrange(len(words))
    words[at] = draw.choice((draw.choice(_WORDS), draw.choice(_NUMBERS), draw.choice(words), words[at] * 2))
    return b"".join(words) + content[1 << 14 :]


def _json(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Exchange, remove, rename or repeat a part of a JSON value."""
    try:
        value = [json.loads(content)]
        places = list(_places(value))
    except (ValueError, RecursionError):
        return _text(content, draw, others)
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0 and holder is not value:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice((*_NAMES, key.upper(), key + " "))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder["@twice@" + key] = draw.choice((holder[key], *_VALUES))
    elif kind == 3:
        other_holder, other_key = draw.choice(places)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    else:
        holder[key] = json.loads(json.dumps(draw.choice(_VALUES)))
    text = json.dumps(value[0], ensure_ascii=draw.random() < 0.5).replace("@twice@", "")
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    """Yield every container and key in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _safetensors(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Damage the JSON of the header, and mostly correct the length before it."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    header = _json(header, draw, [header])
    said = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**62, len(header) + 1))
    return said.to_bytes(8, "little") + header + rest


def _zip(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Damage what is in a member, its name, or how it is packed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist() if info.file_size <= LONGEST]
    except Exception:
        return _bytes(content, draw, others)
    if not members:
        return _bytes(content, draw, others)
    at, kind = draw.randrange(len(members)), draw.randrange(10)
    name, inside = members[at]
    if kind == 0:
        members[at] = (draw.choice((*_NAMES, name.upper(), name + ".npy", name[:-4]))[:200] or "x", inside)
    elif kind == 1:
        del members[at]
    elif kind == 2:
        members.append((name, draw.choice(members)[1]))
    elif kind == 3:
        inside += bytes(draw.choice((1, 1000, 1 << 22)))
    elif kind < 8 and inside.startswith(b"\x93NUMPY"):
        inside = _numpy(inside, draw, [inside])
    else:
        inside = _bytes(inside, draw, [inside])
    if kind > 2:
        members[at] = (name, inside)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, inside in members:
            archive.writestr(zipfile.ZipInfo(name), inside, compress_type=archive.compression)
    return packed.getvalue()


def _numpy(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Damage the header of an array, and mostly correct the length before it."""
    length = int.from_bytes(content[8:10], "little")
    header, rest = content[10 : 10 + length], content[10 + length :]
    swaps: tuple[tuple[bytes, bytes], ...] = (
        (
            rb"'descr': '[^']*'",
            b"'descr': '" + draw.choice((b"|O", b"<f8", b"<c16", b"|b1", b"V8", b"S0", b"<U3")) + b"'",
        ),
        (
            rb"'descr': '[^']*'",
            b"'descr': " + draw.choice((b"[('a', '<f4')]", b"('<f4', (3,))", b"'<M8[s]'", b"'<g'", b"5")),
        ),
        (rb"\(\d[^)]*\)", draw.choice((b"()", b"(True, 4)", b"(-1, 4)", b"(0, 4)", b"(%d, 4)" % 2**40, b"(2.5, 4)"))),
        (rb"\(\d", b"(" + draw.choice((b"1", b"9" * 30, b"9" * 5000, b"-", b"'a', "))),
        (rb"False|True", draw.choice((b"True", b"False", b"None", b"1"))),
        (rb"\}", draw.choice((b"", b"}" * 2, b", 'x': 1}", b"\n}\n\n "))),
        (rb"^\{", draw.choice((b"", b"{" * 500, b"(" * 3000, b"{'shape': (1, 1), "))),
    )
    pattern, new = draw.choice(swaps)
    header = re.sub(pattern, lambda found: new, header) if draw.random() < 0.8 else _text(header, draw, [header])
    version = content[6:8] if draw.random() < 0.9 else draw.choice((b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"))
    said = (len(header) if draw.random() < 0.9 else draw.choice((0, 1, 65535))).to_bytes(8, "little")
    return b"\x93NUMPY" + version + said[: 4 if version in (b"\2\0", b"\3\0") else 2] + header + rest


FORMS: dict[str, Callable[[bytes, Random, Sequence[bytes]], bytes]] = {
    "bytes": _bytes,
    "text": _text,
    "json": _json,
    "nifti": _nifti,
    "gzip": _gzip,
    "safetensors": _safetensors,
    "zip": _zip,
    "numpy": _numpy,
}
"""What a file may be, and how files of that kind are damaged."""
