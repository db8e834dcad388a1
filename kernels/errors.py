"""The error family: every error says what was expected, what came, and what to do about it."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import Any


class TrifuseError(Exception):
    """Base of every error that trifuse raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross to another process as kind and words: not all that an error was made of can."""
        return copyreg.__newobj__, (type(self), str(self))  # type: ignore[attr-defined]


class ShapeError(TrifuseError, ValueError):
    """A tensor or a size does not have the shape that was asked for."""


class BackendError(TrifuseError, RuntimeError):
    """A backend was forced that cannot run here, or an unknown one was named."""


class UnusableKernel(BackendError):
    """A Triton kernel cannot be built or loaded on this device; without a forced backend, plain PyTorch takes over."""


class NoKernelRan(TrifuseError, AssertionError):
    """Plain PyTorch ran, or nothing, where Triton kernels were expected: what was timed or checked means nothing."""


class DataError(TrifuseError, ValueError):
    """A file or a case is not what it should be.

    Args:
        file: path of the file, or the name of the case or folder.
        field: what is wrong with it, e.g. ``"affine"``.
        got: what was found.
        want: what was expected.
        hint: what the user can do about it.
    """

    def __init__(
        self, file: object, field: str = "", *, got: object = None, want: object = None, hint: str = ""
    ) -> None:
        self.file, self.field, self.got, self.want, self.hint = file, field, got, want, hint
        message = f"{file}: {field}" if field else str(file)
        details = [f"expected {want}" if want is not None else "", f"got {got}" if got is not None else ""]
        details = [part for part in details if part]
        if details:
            message += ": " + ", ".join(details)
        if hint:
            message += f"; {hint}"
        super().__init__(message)

    @classmethod
    def merge(cls, errors: Sequence[DataError]) -> DataError:
        """Make one error of many, so that all problems are reported at once."""
        if len(errors) == 1:
            return errors[0]
        lines = "".join(f"\n  - {error}" for error in errors)
        return cls(f"{len(errors)} problems in the data{lines}")


class CheckpointError(TrifuseError):
    """A checkpoint is missing, damaged, unsafe, or does not fit the network it is loaded into."""


class NumericError(TrifuseError, ArithmeticError):
    """A loss or a weight stopped being finite."""


class MissingExtra(TrifuseError, ImportError):
    """An optional package is needed for this; the message gives the exact command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'trifuse[{extra}]'")
