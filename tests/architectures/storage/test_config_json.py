"""Configurations as JSON: round trips, and every value that is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from trifuse.architectures.storage.config_json import (
    config_from_json,
    config_to_json,
    current_name,
    upgraded_json,
)
from trifuse.kernels import CheckpointError


@dataclass(frozen=True)
class Inner:
    width: int
    kind: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Outer:
    name: str | Inner = "n"
    rate: float = 0.5
    flag: bool = False
    count: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    source: str | None = field(default=None, metadata={"saved": False})

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must not be negative")


@pytest.mark.parametrize(
    "config", [Outer(), Outer(name=Inner(3, "y"), rate=2.0, flag=True, count=4, sizes=(), pair=(2, "b"))]
)
def test_config_round_trip(config):
    assert config_from_json(Outer, json.loads(json.dumps(config_to_json(config))), "c.json") == config


def test_fields_that_are_not_saved():
    assert "source" not in config_to_json(Outer(source="/somewhere"))


def test_a_whole_number_is_a_float():
    assert isinstance(config_from_json(Outer, {"rate": 2}, "c.json").rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"unknown field 'nmae' of Outer"),
        ({"sizs": "x"}, r"unknown field 'sizs' of Outer  \(nearest: sizes\).*schema version 1"),
        ({"rate": "fast"}, "field 'rate': expected a finite number, got 'fast'"),
        ({"rate": float("nan")}, "field 'rate': expected a finite number, got nan"),
        ({"rate": float("-inf")}, "field 'rate': expected a finite number, got -inf"),
        ({"flag": 1}, "field 'flag': expected bool, got 1"),
        ({"count": True}, "field 'count'.*got True"),
        ({"count": "many"}, "field 'count': expected int or None, got 'many'"),
        ({"sizes": 3}, "field 'sizes': expected a list of int, got 3"),
        ({"sizes": [1, "2"]}, "field 'sizes': expected int, got '2'"),
        ({"pair": [1]}, "field 'pair': expected a list of int, str, got"),
        ({"name": {"width": 1, "kind": "z"}}, "field 'name'"),
        ({"rate": -1.0}, "rate must not be negative"),
        ([], "expected the fields of Outer"),
    ],
)
def test_c12_config_values_that_are_refused(values, message):
    with pytest.raises(CheckpointError, match=rf"c.json.*{message}"):
        config_from_json(Outer, values, "c.json")


@dataclass(frozen=True)
class Size:
    side: int = 1
    unit: str = "mm"


@dataclass(frozen=True)
class Section:
    RENAMED: ClassVar[dict[str, str]] = {"width": "size.side", "scale.unit": "size.unit", "shape": "size"}

    size: Size = Size()
    note: str = ""

    @staticmethod
    def upgraded(values):
        return {**values, "note": "new"} if values.get("note") == "old" else values


@dataclass(frozen=True)
class Whole:
    RENAMED: ClassVar[dict[str, str]] = {"part": "section"}

    section: Section = Section()
    maybe: Section | None = None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"section": {"width": 3}}, {"section": {"size": {"side": 3}}}),
        ({"part": {"width": 3, "note": "n"}}, {"section": {"note": "n", "size": {"side": 3}}}),
        (
            {"section": {"scale": {"unit": "px"}, "width": 3}},
            {"section": {"scale": {}, "size": {"side": 3, "unit": "px"}}},
        ),
        ({"section": {"shape": {"unit": "px"}, "width": 3}}, {"section": {"size": {"side": 3, "unit": "px"}}}),
        ({"section": {"width": 3, "size": {"side": 4}}}, {"section": {"size": {"side": 4}}}),
        (
            {"section": {"shape": {"side": 3, "unit": "px"}, "size": {"side": 4}}},
            {"section": {"size": {"side": 4, "unit": "px"}}},
        ),
        ({"section": {"note": "old", "scale": 3}}, {"section": {"note": "new", "scale": 3}}),
        ({"maybe": {"width": 3}, "architecture": "x"}, {"maybe": {"size": {"side": 3}}, "architecture": "x"}),
        ({"maybe": None, "section": {}}, {"maybe": None, "section": {}}),
    ],
)
def test_fields_of_older_versions(old, new):
    before = json.loads(json.dumps(old))
    assert upgraded_json(Whole, old) == new
    assert old == before
    assert upgraded_json(Whole, new) == new


def test_configurations_of_older_versions_load():
    old = {"part": {"width": 3, "note": "old"}, "maybe": {"shape": {"unit": "px"}}}
    new = Whole(Section(Size(3), "new"), Section(Size(unit="px")))
    assert config_from_json(Whole, old, "run.json") == new
    assert config_from_json(Section, {"width": 3}, "run.json") == Section(Size(3))
    with pytest.raises(CheckpointError, match=r"run.json: field 'section': expected the fields of Section, got 3"):
        config_from_json(Whole, {"part": 3}, "run.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("part.width", "section.size.side"),
        ("section.shape.unit", "section.size.unit"),
        ("section.scale.unit", "section.size.unit"),
        ("section.scale.other", "section.scale.other"),
        ("maybe.width", "maybe.size.side"),
        ("section.size.side", "section.size.side"),
        ("part", "section"),
        ("partly.width", "partly.width"),
        ("section.widths", "section.widths"),
    ],
)
def test_names_of_older_versions(old, new):
    assert current_name(Whole, old) == new
