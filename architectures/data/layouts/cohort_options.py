"""The options of a cohort: those that every layout has, and those that the layouts declare."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

from . import LAYOUTS
from .layout import Option

AUTO = "auto"
"""The layout is told by the files that are there."""

LAYOUT_OPTION = Option(
    "data.layout",
    "--layout",
    f"layout of the folder ({AUTO}: recognise it)",
    {"choices": (AUTO, *(layout.name for layout in LAYOUTS))},
    default=AUTO,
)
TARGETS = Option(
    "data.targets",
    "--target",
    "label to segment, e.g. lv=3; repeat",
    {"action": "append", "metavar": "[NAME=]VALUE"},
    default=(),
)
PATIENT_PATTERN = Option(
    "data.patient_pattern",
    "--patient",
    "finds the patient in a case's name (default: each case is its own patient)",
    {"metavar": "REGEX"},
)
FRAME = Option(
    "data.frame",
    "--frame",
    "of images of four dimensions, the frame to take, counted from 0",
    {"type": int, "metavar": "NUMBER"},
)

COHORT_OPTIONS: tuple[Option, ...] = (
    LAYOUT_OPTION,
    TARGETS,
    PATIENT_PATTERN,
    FRAME,
    *(option for layout in LAYOUTS for option in layout.options),
)

CohortOptions: Any = make_dataclass(
    "CohortOptions",
    [(option.name, option.value_type, option.default) for option in COHORT_OPTIONS],
    namespace={"__doc__": "One field for each of `COHORT_OPTIONS`.", "__module__": __name__},
    frozen=True,
    kw_only=True,
)
"""A dataclass with one keyword field per option; the recipe of a run's data inherits them."""


def cohort_arguments(said: Any) -> dict[str, Any]:
    """Return the arguments of ``open_cohort`` beside the folder.

    Args:
        said: has the options as attributes: a recipe, or what the parser of the command returned; None means that
            the option is not given.
    """
    values = {option.name: getattr(said, option.name) for option in COHORT_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def image_arguments(said: Any) -> dict[str, Any]:
    """Return the arguments of ``open_images`` beside the path, from what `cohort_arguments` takes."""
    needed = {option.name for option in COHORT_OPTIONS if option.tells_images}
    return {name: value for name, value in cohort_arguments(said).items() if name in needed}
