"""Text that people and their programs wrote, and words for people: numbers of things, lists, names in order."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .regular_file import open_regular

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_MOST_NESTED = 50
Named = TypeVar("Named", str, int)


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return the text of a file, without the byte order mark that Notepad, Excel and PowerShell put before it.

    It is UTF-8, or the UTF-16 that its mark says; line ends are as they are stored.

    Args:
        path: of the file.
        errors: what becomes of bytes that are no text, see ``bytes.decode``.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is no text.
    """
    with open_regular(path) as stream:
        content = stream.read()
    mark, encoding = next((each for each in _MARKS if content.startswith(each[0])), (b"", "utf-8"))
    return content[len(mark) :].decode(encoding, errors)


def read_parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    """Return what ``parse``, such as `parse_json` or ``tomllib.loads``, makes of a file's text.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text of that format, or lists and objects in it are nested too deep.
    """
    try:
        value = parse(read_text(path))
    except RecursionError:
        value = None
    else:
        if not _deeper_than(_MOST_NESTED, value):
            return value
    raise ValueError(f"lists or objects nested more than {_MOST_NESTED} deep")


def parse_json(text: str | bytes) -> Any:
    """Return what a text in JSON says; a name that one object has twice would leave open which of its values counts.

    Raises:
        ValueError: it is no JSON, or has such a name.
    """
    return json.loads(text, object_pairs_hook=_unique_names)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := repeated(name for name, _ in pairs):
        raise ValueError(f"{listed(map(repr, twice))} more than once in one object")
    return dict(pairs)


def repeated(names: Iterable[Named]) -> list[Named]:
    """Return the names, or numbers, that come more than once, each once, in their order."""
    return [name for name, times in Counter(names).items() if times > 1]


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a CSV file, and the cells of each line by column; blank lines are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or no CSV, names a column twice, or has a line of more or fewer cells than columns.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    columns = lines[0][1] if lines else []
    if twice := repeated(columns):
        raise ValueError(f"column {listed(twice)} more than once")
    for number, cells in lines[1:]:
        if len(cells) != len(columns):
            raise ValueError(f"line {number} has {len(cells)} cells, and the first line {len(columns)}")
    return columns, [dict(zip(columns, cells, strict=True)) for _, cells in lines[1:]]


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes of a file's name that are no text are spelled out, such as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def count(n: int, word: str) -> str:
    """Return ``1 case`` or ``2 cases``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``case_2`` before ``case_10``."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, len(digits), digits) if digits else (1, 0, part) for part in parts for digits in [_digits(part)])


def listed(names: Iterable[object], most: int = 10) -> str:
    """Join names for a message: ten of them, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _deeper_than(levels: int, value: Any) -> bool:
    """Tell whether lists and objects are nested deeper than that, without going down into them one by one."""
    inner = [value]
    for _ in range(levels):
        inner = [
            one
            for part in inner
            if isinstance(part, dict | list)
            for one in (part.values() if isinstance(part, dict) else part)
        ]
    return any(isinstance(part, dict | list) for part in inner)


def _digits(part: str) -> str:
    """Return a number, however long, without leading zeros; empty if the part is none."""
    return (part.lstrip("0") or "0") if part.isdecimal() else ""
