"""What a run is to do: recipes, and how one is put together from defaults, a file, and the settings of a command."""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from trifuse.architectures.data.layouts.cohort import Cohort, Split
from trifuse.architectures.data.layouts.cohort_options import CohortOptions, cohort_arguments
from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.architectures.data.layouts.split import hold_out, read_split, split_patients, verify_split
from trifuse.architectures.data.samples.augmentation_recipe import AugmentationKind, AugmentationRecipe
from trifuse.architectures.data.samples.preprocessing import Preprocessing, Slices
from trifuse.architectures.storage.config_json import config_from_json, config_to_json, current_name, dataclass_of
from trifuse.architectures.storage.file_names import composed
from trifuse.architectures.storage.text import listed, parse_json, read_parsed
from trifuse.kernels import CheckpointError, DataError, TrifuseError
from trifuse.kernels.choices import check_choice, nearest


@dataclass(frozen=True)
class DataRecipe(CohortOptions):
    """Which cases a run uses, and how their slices are prepared.

    The options of a cohort are fields, too: see `COHORT_OPTIONS`.

    Attributes:
        root: the cohort's folder.
        split: JSON file that says which cases train, validate and test; None takes the split that the cohort brings,
            or draws one.
        val_cases: patterns of the cases that validate, and
        test_cases: of those that test; given either, all other cases train and nothing is drawn. A cohort that brings
            a split keeps the part that is not given.
        val_patients: let so many patients of the training cases validate, drawn by ``split_seed``, where the split has
            no validation cases, as published ones may not; None takes the split as it is.
        val_from: what the drawn validation tenth is taken of: ``"all"`` patients, or those ``"remaining"`` for it.
        split_seed: of the drawn split, and of the patients drawn to validate.
        slices: which slices to train on: ``"all"``, those that show a target (``"foreground"``), or those on which
            anything is drawn (``"labelled"``).
        augment: ``"none"``, ``"flip_rot"``, or ``"transunet"``: that of TransUNet; for patches ``"none"`` or
            ``"nnunet"``: that of nnU-Net.
        augmentation: how strong it is.
        preprocessing: how volumes become the network's inputs, in training and prediction.

    Raises:
        ValueError: an augmentation that patches lack, or that only they have; a strength that it does not have; a
            negative seed; no patient to validate.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "preparation": "preprocessing",
        "image_size": "preprocessing.image_size",
        "nonfinite": "preprocessing.nonfinite",
        "patches": "preprocessing.patches",
        "keep": "slices",
    }

    root: str = ""
    split: str | None = None
    val_cases: tuple[str, ...] = ()
    test_cases: tuple[str, ...] = ()
    val_patients: int | None = None
    val_from: Literal["all", "remaining"] = "all"
    split_seed: int = 42
    slices: Slices = "all"
    augment: AugmentationKind = "none"
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        fitting = ("none", "nnunet") if self.preprocessing.patches is not None else ("none", "flip_rot", "transunet")
        which = "patches" if self.preprocessing.patches is not None else "whole slices"
        check_choice(f"augment for {which}", self.augment, fitting)
        self.augmentation.check(self.augment)
        if self.split_seed < 0:
            raise ValueError(f"split_seed must be at least 0, got {self.split_seed}")
        if self.val_patients is not None and self.val_patients < 1:
            raise ValueError(f"val_patients must be at least 1, or None for none, got {self.val_patients}")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: augment by default, draw no patients to validate, and know no frames."""
        return {"augmentation": {}, "val_patients": None, "frame": None, **values}

    def with_preprocessing(self, **changes: Any) -> DataRecipe:
        """Return the recipe with other values of some fields of its preprocessing."""
        return replace(self, preprocessing=replace(self.preprocessing, **changes))

    def open(self) -> Cohort:
        """Find the cases.

        Raises:
            DataError: see `open_cohort`; or the folder is not where the recipe says, as after it was moved.
        """
        if self.root and not Path(self.root).exists():
            hint = "if it was moved since, put it, or a link to it, back in its place"
            raise DataError(self.root, "folder", got="nothing there", want="the folder of the cohort", hint=hint)
        return open_cohort(Path(self.root), **cohort_arguments(self))

    def choose_split(self, cohort: Cohort) -> Split:
        """Read, build or draw the split, or take the cohort's own, whichever the recipe says.

        Raises:
            DataError: it says two things, as a file and patterns; or see `verify_split`.
        """
        for name in ("val_cases", "test_cases"):
            if self.split is not None and (given := getattr(self, name)):
                raise DataError(self.split, "split", got=listed(map(repr, given)), want=f"no {name} beside it")
        return self.said_split(cohort)

    def said_split(self, cohort: Cohort) -> Split:
        """Return that split; runs of older versions may have patterns beside a file, which wins."""
        split = self._given_split(cohort)
        return split if self.val_patients is None else hold_out(cohort, split, self.val_patients, self.split_seed)

    def _given_split(self, cohort: Cohort) -> Split:
        if self.split is not None:
            return read_split(Path(self.split), cohort)
        if not self.val_cases and not self.test_cases:
            if cohort.split is not None:
                return verify_split(cohort, cohort.split)
            return split_patients(cohort, seed=self.split_seed, val_from=self.val_from)
        names = [case.case_id for case in cohort.cases]
        own = cohort.split or Split((), (), ())
        test = matching_cases(cohort, names, self.test_cases) or own.test
        tests = set(test)
        val = matching_cases(cohort, names, self.val_cases) or tuple(name for name in own.val if name not in tests)
        held = tests.union(val)
        train = tuple(name for name in names if name not in held)
        return verify_split(cohort, Split(train, val, test))


def matching_cases(cohort: Cohort, names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names that match any of the patterns.

    Raises:
        DataError: a pattern matches none.
    """
    known, chosen = dict.fromkeys(names), set()
    for pattern in map(composed, patterns):
        matching = [pattern] if pattern in known else fnmatch.filter(names, pattern)  # a name may have brackets
        if not matching:
            want = f"some of {listed(map(repr, names))}"
            raise DataError(cohort.root, "cases", got=f"0 cases that match {pattern!r}", want=want)
        chosen.update(matching)
    return tuple(name for name in names if name in chosen)


def inputs_of(recipe: Any) -> list[Path]:
    """Return the files and folders that a recipe names, as far as they exist, and the files of its cohort's cases.

    Raises:
        DataError: there is no such cohort.
    """
    data = getattr(recipe, "data", None)
    cases = data.open().cases if isinstance(data, DataRecipe) else ()
    return [*_named_paths(config_to_json(recipe)), *(file for case in cases for file in case.files)]


def _named_paths(value: Any) -> list[Path]:
    if isinstance(value, dict | list):
        return [path for part in (value.values() if isinstance(value, dict) else value) for path in _named_paths(part)]
    return [Path(value)] if isinstance(value, str) and value and os.path.exists(value) else []


class RecipeError(TrifuseError):
    """A recipe names a field that there is none of, or gives one a value that it cannot have."""


def recipe_from(
    kind: type,
    file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Build a run's recipe from its defaults, a TOML file, values by dotted name, and ``"field=value"`` settings.

    Later sources win; ``defaults``, by dotted name, are the first. A value in a setting is JSON where it can be, and
    text where not. Fields may have the names of older versions, see `config_json`; no source names one twice.

    Raises:
        RecipeError: naming the field and, for one that is unknown, the nearest known one.
    """
    sources = [("", *pair) for pair in (defaults or {}).items()]
    if file is not None:
        try:
            named = _dotted(read_parsed(Path(file), tomllib.loads))
            _refuse_repeated(kind, [name for name, _ in named], f"{file}: ")
        except OSError as error:
            raise RecipeError(f"{file}: expected a TOML file, got {error.strerror}") from error
        except ValueError as error:
            raise RecipeError(f"{file}: expected TOML, got {error}") from error
        sources += [(f"{file}: ", *pair) for pair in named]
    sources += [("", name, _as_value(value)) for name, value in (given or {}).items()]
    _refuse_repeated(kind, [setting.partition("=")[0] for setting in settings], "--set ")
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError(f"{setting!r}: expected FIELD=VALUE, for example training.lr=1e-4")
        sources.append(("", name, _parsed(text)))
    values = _laid_on(kind, sources)
    if not values["data"]["root"]:
        where = "" if file is None else f"{file}: "
        raise RecipeError(f"{where}data.root: expected the folder of the cohort")
    try:
        return config_from_json(kind, values, "recipe")
    except CheckpointError as error:
        raise RecipeError(f"{_first_with(str(error), kind, sources)}{error}") from error


def _laid_on(kind: type, sources: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Return the values of a recipe after each source, (where it is from, dotted name, value), had its say."""
    values: dict[str, Any] = config_to_json(kind())
    for where, name, value in sources:
        try:
            _put(values, kind, current_name(kind, name), value)
        except RecipeError as error:
            raise RecipeError(f"{where}{error}") from None
    return values


def _first_with(fault: str, kind: type, sources: Sequence[tuple[str, str, Any]]) -> str:
    """Return where the first source is from that brings a fault."""
    for count, (where, *_) in enumerate(sources, start=1):
        try:
            config_from_json(kind, _laid_on(kind, sources[:count]), "recipe")
        except CheckpointError as error:
            if str(error) == fault:
                return where
    return ""


def _refuse_repeated(kind: type, names: Sequence[str], where: str) -> None:
    """Refuse fields that one source names more than once, be it by the names of an older version and of today."""
    by_field: dict[str, list[str]] = {}
    for name in names:
        by_field.setdefault(current_name(kind, name), []).append(name)
    for field_name, given in by_field.items():
        if len(given) > 1:
            raise RecipeError(f"{where}{field_name}: expected one value, got {' and '.join(given)}")


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in table.items():
        below = _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        pairs += below or [(f"{prefix}{name}", value)]
    return pairs


def _as_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_value(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text


def _put(values: dict[str, Any], kind: type, dotted: str, value: Any) -> None:
    """Set a field of nested values, after checking that each name on the way is one of the dataclass's."""
    *sections, name = dotted.split(".")
    for section in sections:
        part = _section(values, kind, section)
        if part is None:
            raise RecipeError(f"{dotted}: there is no section {section!r}{_suggestion(section, kind)}")
        if values[section] is None:  # it is not there by default, and begins with defaults of its own
            values[section] = config_to_json(part())
        values, kind = values[section], part
    part = _section(values, kind, name)
    if part is not None and value == {}:  # it is to be there, whatever is in it
        value = values[name] or config_to_json(part())
    elif name not in _names(kind) or is_dataclass(get_type_hints(kind)[name]):
        raise RecipeError(f"{dotted}: there is no field {name!r}{_suggestion(name, kind)}")
    values[name] = value


def _section(values: Mapping[str, Any], kind: type, name: str) -> type | None:
    """Return the dataclass of a section, whether it is set or None; None if the name is no section's."""
    return dataclass_of(get_type_hints(kind).get(name)) if isinstance(values.get(name), dict | None) else None


def _suggestion(name: str, kind: type) -> str:
    """Say which field may have been meant, by its name of today or of an older version, or which there are."""
    near = nearest(name, [*_names(kind), *getattr(kind, "RENAMED", {})])
    return f"; did you mean {near!r}?" if near else f"; known are {', '.join(_names(kind))}"


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
