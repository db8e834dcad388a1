"""One check, one message, for every value that must be one of a few."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from trifuse.kernels import BackendError
from trifuse.kernels.choices import check_choice, check_choices, choice_problems, choices_of, nearest

Colour = Literal["red", "green"]


@dataclass(frozen=True)
class Paint:
    colour: Colour = "red"
    layers: Literal[1, 3] = 1
    gloss: Literal["matt", "silk"] | None = None
    name: str = "any"


@pytest.mark.parametrize("choices", [Colour, ("red", "green"), {"red": 1, "green": 2}, Literal["red", "green"] | None])
def test_a_choice_is_accepted_from_a_literal_a_list_and_a_table(choices):
    check_choice("colour", "green", choices)
    with pytest.raises(ValueError, match=r"^colour: expected one of 'red', 'green'.*, got 'blue'$"):
        check_choice("colour", "blue", choices)


@pytest.mark.parametrize(
    ("value", "advice"), [("gren", "; did you mean 'green'?"), ("xyz", ""), (3, ""), (None, ""), ([1], "")]
)
def test_the_message_names_the_choice_that_was_meant(value, advice):
    message = f"op: colour: expected one of 'red', 'green', got {value!r}{advice}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choice("op: colour", value, Colour)


def test_the_type_of_the_error_may_be_another():
    with pytest.raises(BackendError, match="backend: expected one of 'a', got 'b'"):
        check_choice("backend", "b", ("a",), BackendError)


@pytest.mark.parametrize("value", [True, 1.0, "1", 2])
def test_an_equal_value_of_another_type_is_no_choice(value):
    with pytest.raises(ValueError, match="layers: expected one of 1, 3, got"):
        check_choices(Paint(layers=value))


def test_all_fields_with_choices_are_checked_at_once_and_no_other_field():
    check_choices(Paint("green", 3, "silk", name="whatever"))
    check_choices(Paint(gloss=None))
    wrong = Paint("blue", 3, "mat")
    assert choice_problems(wrong) == [
        "colour: expected one of 'red', 'green', got 'blue'",
        "gloss: expected one of 'matt', 'silk', None, got 'mat'; did you mean 'matt'?",
    ]
    with pytest.raises(ValueError, match=r"^colour: .*\ngloss: .*$"):
        check_choices(wrong)


@pytest.mark.parametrize("hint", [str, str | None, Literal["a"] | int, tuple[str, ...]])
def test_other_types_have_no_choices(hint):
    assert choices_of(hint) is None


def test_the_nearest_word():
    assert nearest("lerning_rate", ["learning_rate", "epochs"]) == "learning_rate"
    assert nearest("lr", ["epochs"]) is None
    assert nearest("headz", ["heads"], cutoff=0.95) is None
