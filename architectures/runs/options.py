"""Options of a command that set fields of a recipe, each declared once; read without torch, numpy or a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trifuse.architectures.data.layouts.layout import Option


def positive(text: str) -> int:
    """Read the value of an option that counts something.

    Raises:
        ArgumentTypeError: no whole number of at least 1.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def memory_size(text: str) -> int:
    """Read the value of an option that is an amount of memory, such as 4G, 4GiB (both 4 x 1024^3), 500M or bytes.

    Raises:
        ArgumentTypeError: no such amount, or none at all.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:([KMGT])(?:iB)?)?", text, re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper())) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected an amount of memory such as 4G, 500M or bytes, got {text!r}")
    return size


def duration(text: str) -> float:
    """Read the value of an option that is a time in seconds.

    Raises:
        ArgumentTypeError: no finite number of at least 0.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got {text!r}")
    return seconds


@dataclass(frozen=True, kw_only=True)
class RecipeOption(Option):
    """An option of ``trifuse train`` or ``trifuse ablate``, which may set more than its own field.

    Attributes:
        sets: values, by dotted name, of further fields that are set where the option is given.
        weights: for an option that names a folder of weights, ``"<file>:<function>"`` of the network's package, which
            returns the fields of the section that the folder decides.
    """

    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str = ""

    @property
    def name(self) -> str:
        """The attribute of the parsed arguments with its value, named after the flag: two options may set one field."""
        return self.flag.lstrip("-").replace("-", "_")

    def add_to(self, parser: Any) -> None:
        """Add the flag, or the positional argument where it has no dashes; None means that it is not given."""
        parser.add_argument(self.flag, *self.aliases, help=self.help, **self.keywords)


@dataclass(frozen=True)
class OptionGroup:
    """Options that ``--help`` shows under one title."""

    title: str
    options: tuple[Option, ...]
