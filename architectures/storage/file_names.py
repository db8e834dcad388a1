"""Names that files give to other files: they come from anywhere, and must not lead anywhere.

Every name of a file or of a case that is read from a table, a list or a description goes through one of these. The same
name may be stored in two ways: an accented letter as one sign, as keyboards write it (NFC), or as letter and accent, as
macOS unpacks it (NFD). Cases go by the composed form; files are found in either.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

_LONGEST_NAME = 240  # in bytes: most file systems take 255, the ending included


def composed(name: str) -> str:
    """Return a name with every accented letter as one sign (NFC)."""
    return unicodedata.normalize("NFC", name)


def as_stored(folder: Path, name: str) -> Path:
    """Return the path of a file that is called so in either form of its accents; as it is named if there is none."""
    forms = [] if name.isascii() else [name, composed(name), unicodedata.normalize("NFD", name)]
    return next((folder / form for form in forms if os.path.exists(folder / form)), folder / name)


def real_path(path: Path) -> Path:
    """Return a path with its links followed; where they lead round in a circle, as far as they lead."""
    return Path(os.path.realpath(path))


def path_below(root: Path, name: str) -> Path | None:
    """Return the path of a file that another file names, with either system's separators; None if it leaves the folder.

    What counts is how the name is written: links that lie in the folder are followed.
    """
    path = PurePosixPath(PureWindowsPath(name).as_posix())
    outside = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts
    if not path.parts or outside or "\0" in name or _encoded(name) is None:
        return None
    return as_stored(root, str(path))


def can_name_files(name: str) -> bool:
    """Tell whether a file can be called so, an ending behind it, and lie where it is meant to: results of a case do."""
    controls = any(ord(character) < ord(" ") for character in name)
    encoded = _encoded(name)
    short = encoded is not None and len(encoded) <= _LONGEST_NAME
    return short and not controls and not set(name) & set("/\\") and name not in ("", ".", "..")


def _encoded(name: str) -> bytes | None:
    """Return the bytes that a file system knows a name by; None for halves of a character, which JSON can hold."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None
