"""What every layout declares of itself, and how an option is declared once for the recipe and for the command.

Nothing heavy is imported here or in the files of the layouts: the command's parser reads them when it starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trifuse.kernels.errors import DataError

from .found import Classes, Found

if TYPE_CHECKING:
    from trifuse.architectures.data.volumes.volume import Volume

    from .cohort import Case, Cohort

Values = Mapping[str, Any]
"""Values of options by their names: all those of a layout, with the default of each that is not given."""


@dataclass(frozen=True)
class Option:
    """An option, declared once: a field of a recipe and a flag of the command.

    Attributes:
        field: dotted name of the field in the recipe of a run, such as ``"data.label_space"``.
        flag: of the command, such as ``"--label-space"``.
        help: what the command's help says; the default in brackets at its end.
        keywords: further arguments of ``ArgumentParser.add_argument``: ``choices``, ``type``, ``metavar``, ``action``.
        default: the field's value if the option is not given. The parser has none: it leaves that to the recipe.
        aliases: further flags that mean the same.
        tells_images: whether it is needed even where images are predicted and no labels are asked for.
    """

    field: str
    flag: str
    help: str
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    default: Any = None
    aliases: tuple[str, ...] = ()
    tells_images: bool = False

    @property
    def name(self) -> str:
        """The last part of the field's name: a keyword of functions, and the attribute that the parser sets."""
        return self.field.rpartition(".")[2]

    @property
    def value_type(self) -> Any:
        """The type of the field, as in the recipe's dataclass."""
        kind: Any = self.keywords.get("type", str)
        if "choices" in self.keywords:
            kind = Literal[tuple(self.keywords["choices"])]
        if self.keywords.get("action") == "append":
            kind = tuple[kind, ...]
        return kind | None if self.default is None else kind

    def add_to(self, parser: Any) -> None:
        """Add the flag to a parser, or to one of its groups; None means that the option is not given."""
        parser.add_argument(self.flag, *self.aliases, dest=self.name, help=self.help, **self.keywords)


@dataclass(frozen=True)
class Export:
    """How a layout is written, by ``export.py``.

    Attributes:
        options: further options of the writing, by the names of the writer's keywords.
        note: returns what the layout does not keep of a cohort, as a sentence for the user; empty where it keeps all.
    """

    options: tuple[Option, ...]
    note: Callable[[Cohort], str]


@dataclass(frozen=True)
class Layout:
    """One way to arrange a cohort in a folder.

    Attributes:
        name: what ``--layout`` calls it.
        summary: what it is, in a phrase for the help and the documentation.
        signs: the files that it is known by, for messages.
        detect: tells whether a folder, which exists, has the layout.
        scan: finds the cases of a folder by names alone: ``scan(root, values)``.
        lacking: what a folder in which no case was found lacks.
        classes: says what the label values mean: ``classes(root, values)``. None takes what ``scan`` found, or 0 for
            the background and 1 for the foreground.
        takes_targets: whether the user may choose among the label values; if not, the classes are fixed.
        options: the options that only this layout has.
        check_case: further checks of ``trifuse data check``: ``check_case(case, image, labels)`` returns errors and
            warnings.
        check_sizes: warnings about the number of voxels that each class has in all cases, by class name.
        prepared_window_hu: the values in the files were clipped to this window, in HU, and scaled to [0, 1] by those
            who published them; None where they are as the scanner stored them.
        export: how it is written; None where it cannot be.
    """

    name: str
    summary: str
    signs: str
    detect: Callable[[Path], bool]
    scan: Callable[[Path, Values], Found]
    lacking: str
    classes: Callable[[Path, Values], Classes] | None = None
    takes_targets: bool = True
    options: tuple[Option, ...] = ()
    check_case: Callable[[Case, Volume, Volume | None], tuple[list[DataError], list[str]]] | None = None
    check_sizes: Callable[[Mapping[str, int]], list[str]] = lambda voxels: []
    prepared_window_hu: tuple[float, float] | None = None
    export: Export | None = None
