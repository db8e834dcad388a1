"""Names that files give to other files: they come from anywhere, and must not lead anywhere.

Every name of a file or of a case that is read from a table, a list or a description goes through one of these.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

_LONGEST_NAME = 240  # in bytes: most file systems take 255, the ending included


def path_below(root: Path, name: str) -> Path | None:
    """Return the path of a file that another file names, with either system's separators; None if it leaves the folder.

    What counts is how the name is written: links that lie in the folder are followed.
    """
    path = PurePosixPath(PureWindowsPath(name).as_posix())
    if not path.parts or path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        return None
    return root / path


def can_name_files(name: str) -> bool:
    """Tell whether a file can be called so, an ending behind it, and lie where it is meant to: results of a case do."""
    controls = any(ord(character) < ord(" ") for character in name)
    short = len(name.encode("utf-8", "surrogateescape")) <= _LONGEST_NAME
    return short and not controls and not set(name) & set("/\\") and name not in ("", ".", "..")
