"""The error family: every error says what was expected, what came, and what to do about it."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

_NEXT = "\n  - "


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


class NamespaceTaken(TrifuseError, ImportError):
    """The operators cannot be registered: another package, or another copy of this one, took their namespace."""


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
        self.errors: Sequence[DataError] = ()
        super().__init__(self.told())

    def told(self, reword: Callable[[str], str] = str) -> str:
        """Return the message.

        Args:
            reword: puts the names of arguments, in what is the matter, wanted and advised, into the words of whoever
                asked: the command has options for them. What was found stays as it is.
        """
        if "errors" not in vars(self):  # it came from another process, as words
            return str(self)
        if self.errors:
            return f"{self.file}{''.join(f'{_NEXT}{error.told(reword)}' for error in self.errors)}"
        message = f"{self.file}: {reword(self.field)}" if self.field else str(self.file)
        got = self.got.told(reword) if isinstance(self.got, DataError) else self.got
        details = [f"expected {reword(str(self.want))}"] if self.want is not None else []
        details += [f"got {got}"] if got is not None else []
        hint = f"; {reword(self.hint)}" if self.hint else ""
        return message + (f": {', '.join(details)}" if details else "") + hint

    @classmethod
    def merge(cls, errors: Sequence[DataError]) -> DataError:
        """Make one error of many, so that all problems are reported at once."""
        if len(errors) == 1:
            return errors[0]
        merged = cls(f"{len(errors)} problems in the data")
        merged.errors = errors
        merged.args = (merged.told(),)
        return merged


class CheckpointError(TrifuseError):
    """A checkpoint is missing, damaged, unsafe, or does not fit the network it is loaded into."""


class NumericError(TrifuseError, ArithmeticError):
    """A loss or a weight stopped being finite."""


class MissingExtra(TrifuseError, ImportError):
    """An optional package is needed for this; the message gives the exact command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'trifuse[{extra}]'")


def require(package: str, extra: str, purpose: str) -> None:
    """Raise MissingExtra if a package is not installed; it is looked for, not imported.

    Args:
        package: as it is imported.
        extra: of trifuse, that installs it.
        purpose: what needs it, as the message begins.

    Raises:
        MissingExtra: it is not there.
    """
    if find_spec(package) is None:
        raise MissingExtra(package, extra, purpose)
