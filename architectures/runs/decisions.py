"""What a run had to settle: what the publication says of it, what the run did, and the option that switches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from trifuse.architectures.evaluation.report import markdown_table
from trifuse.architectures.storage.config_json import dataclass_of
from trifuse.architectures.storage.text import count

from .prepared_data import PreparedData

HEADING = "Read from the paper, or decided"
NOT_SAID = "not said"
OURS = "trifuse"
_MOST_NAMED = 5  # fields of one section in a row

Answer = Callable[[Any, PreparedData | None], Any]


@dataclass(frozen=True)
class Decision:
    """A question that a run of a network settles: a row of the table in its report and on its page.

    Attributes:
        question: in a few words.
        paper: what the publication says, in a few words; `NOT_SAID` where it is silent.
        field: dotted name of the recipe's field that settles it, or the names of several; none where it is fixed.
        agrees: answers that do what the publication says, none where it leaves the answer open; where it is silent,
            answers that count as the default.
        by: whose choice, or reading, the default is, where the publication leaves one.
        answer: what a recipe, and the data of a run if there are any, do; None takes the values of the fields.
        applies: whether the question comes up in a run of a recipe; else it has no row.
    """

    question: str
    paper: str
    field: str | tuple[str, ...]
    agrees: tuple[Any, ...] = ()
    by: str = ""
    answer: Answer | None = None
    applies: Callable[[Any], bool] = lambda recipe: True

    @property
    def fields(self) -> tuple[str, ...]:
        """The dotted names of its fields."""
        return (self.field,) if isinstance(self.field, str) else self.field

    @property
    def is_said(self) -> bool:
        """Whether the publication speaks of it."""
        return self.paper != NOT_SAID

    @property
    def is_settled(self) -> bool:
        """Whether the publication says enough for a run to differ from it."""
        return self.is_said and bool(self.agrees)

    def values(self, recipe: Any) -> tuple[Any, ...]:
        """Return the values of its fields."""
        return tuple(field_value(recipe, name) for name in self.fields)

    def answered(self, recipe: Any, data: PreparedData | None = None) -> Any:
        """Return what a run of a recipe does."""
        if self.answer is not None:
            return self.answer(recipe, data)
        values = self.values(recipe)
        if len(values) == 1:
            return values[0]
        return ", ".join(f"{n.rpartition('.')[2]} {shown(v)}" for n, v in zip(self.fields, values, strict=True))

    def differs_from(self, recipe: Any, data: PreparedData | None = None) -> list[str]:
        """Return what a run differs from in this: the ``"paper"``, where that settles it, and the ``"default"``."""
        answer, default = self.answered(recipe, data), type(recipe)()
        agrees = answer in self.agrees
        is_changed = self.values(recipe) != self.values(default) and answer != self.answered(default, data)
        return ["paper"] * (self.is_settled and not agrees) + ["default"] * (
            is_changed and (self.is_said or not agrees)
        )


def decision_parts(decisions: Sequence[Decision], recipe: Any, data: PreparedData | None = None) -> list[str]:
    """Return the section of a report on the questions that a run settled: none for a network that names none.

    Args:
        decisions: of the network.
        recipe: of the run.
        data: of the run.
    """
    asked = [decision for decision in decisions if decision.applies(recipe)]
    if not asked:
        return []
    differing = [(decision.question, decision.differs_from(recipe, data)) for decision in asked]
    from_paper = [question for question, whom in differing if "paper" in whom]
    from_default = [question for question, whom in differing if whom == ["default"]]
    said = sum(decision.is_said for decision in asked)
    summary = (
        f"Of {count(len(asked), 'point')} the paper speaks of {said}; this run differs from it in "
        f"{len(from_paper)}{_named(from_paper)}, and from the default alone in {len(from_default)}"
        f"{_named(from_default)}. In brackets stands whose choice, or reading, the default is. Options are set with "
        "`--set OPTION=VALUE`."
    )
    return [f"## {HEADING}", summary, decision_table(asked, recipe, data)]


def assumptions(decisions: Sequence[Decision], recipe: Any, flags: Mapping[str, str]) -> list[str]:
    """Return a line for each question that the publication leaves open, or in which a recipe differs from it.

    A line says what is done, what the publication says, whose choice or reading is taken, and the options.

    Args:
        decisions: of the network.
        recipe: of a run that may not have begun.
        flags: the option of the command for each field that has one of its own.
    """
    return [
        f"{decision.question}: {shown(decision.answered(recipe))} ({_ground(decision, recipe)}; "
        f"{_flags(decision.fields, flags)})"
        for decision in decisions
        if decision.applies(recipe) and (decision.by or "paper" in decision.differs_from(recipe))
    ]


def _ground(decision: Decision, recipe: Any) -> str:
    """Say what the publication says, or that it is silent, and on what an answer stands."""
    paper = f"paper: {decision.paper}" if decision.is_said else f"paper: {NOT_SAID}"
    stands = ["differs"] if "paper" in decision.differs_from(recipe) else []
    given = ["yours"] if "default" in decision.differs_from(recipe) else [decision.by]
    return "; ".join([paper, *stands, *filter(None, given)])


def _flags(names: Sequence[str], flags: Mapping[str, str]) -> str:
    if len(names) > _MOST_NAMED:
        return f"--set {names[0].rpartition('.')[0]}.*"
    return ", ".join(flags.get(name) or f"--set {name}" for name in names) or "no option"


def _named(questions: Sequence[str]) -> str:
    return f" ({'; '.join(questions)})" if questions else ""


def decision_table(
    decisions: Sequence[Decision],
    recipe: Any,
    data: PreparedData | None = None,
    *,
    heading: str = "This run",
    aligned: bool = True,
) -> str:
    """Return the table of the questions that come up with a recipe.

    Args:
        decisions: of the network.
        recipe: whose answers are shown.
        data: of the run, if there is one.
        heading: of the answers.
        aligned: whether the cells of a column are equally wide, for a terminal.
    """
    rows = [
        [
            decision.question,
            f"{decision.paper} ({decision.by})" if decision.by else decision.paper,
            shown(decision.answered(recipe, data)),
            ", ".join(decision.differs_from(recipe, data)).replace("paper", "**paper**"),
            _options(decision.fields),
        ]
        for decision in decisions
        if decision.applies(recipe)
    ]
    return markdown_table(["Question", "The paper says", heading, "Differs from", "Option"], rows, aligned=aligned)


def _options(names: Sequence[str]) -> str:
    """Name fields; of those that lie beside the one before, the last part alone; of many, their section."""
    sections = [name.rpartition(".")[0] for name in names]
    if len(names) > _MOST_NAMED and len({*sections}) == 1:
        return f"`{sections[0]}.*`"
    words = [
        name.rpartition(".")[2] if place and section == sections[place - 1] else name
        for place, (name, section) in enumerate(zip(names, sections, strict=True))
    ]
    return ", ".join(f"`{word}`" for word in words)


def shown(value: Any) -> str:
    """Return a field's value as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else str(value)


def field_value(recipe: Any, dotted: str) -> Any:
    """Return a recipe's field by its dotted name; None where its section is not there."""
    for name in dotted.split("."):
        if recipe is None:
            return None
        recipe = getattr(recipe, name)
    return recipe


def field_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of each field of a recipe, those of its sections included.

    A section that may be None has its fields; a value that may be a name or a description is a field itself.
    """
    hints = get_type_hints(kind)
    for field in fields(kind):
        section = dataclass_of(hints[field.name])
        others = {*get_args(hints[field.name])} - {section, type(None)}
        if section is None or others:
            yield prefix + field.name
        else:
            yield from field_names(section, f"{prefix}{field.name}.")


def undecided_fields(kind: type, decisions: Sequence[Decision], no_row: Sequence[str]) -> list[str]:
    """Return the fields of a recipe that no question covers and that are not known to need none.

    Args:
        kind: the recipe's dataclass.
        decisions: of the network.
        no_row: dotted names of fields that need no row.
    """
    covered = {name for decision in decisions for name in decision.fields} | {*no_row}
    return [name for name in field_names(kind) if name not in covered]
