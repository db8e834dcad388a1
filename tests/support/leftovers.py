"""Temporary files of processes that were killed while they wrote."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from trifuse.architectures.storage.atomic_files import temporary_path


def leave_half(path: Path) -> Path:
    """Write what a killed process leaves behind that was writing ``path``, and return where that lies."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    temporary = temporary_path(path, ending="".join(path.suffixes[-2:]))
    left = temporary.with_name(temporary.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    left.write_bytes(b"half")
    return left
