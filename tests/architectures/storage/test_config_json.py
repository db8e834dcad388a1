"""Configurations as JSON: round trips, and every value that is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from trifuse.architectures.storage.config_json import config_from_json, config_to_json
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
        ({"rate": "fast"}, "field 'rate': expected float, got 'fast'"),
        ({"flag": 1}, "field 'flag': expected bool, got 1"),
        ({"count": True}, "field 'count'.*got True"),
        ({"sizes": 3}, "field 'sizes'.*got 3"),
        ({"sizes": [1, "2"]}, "field 'sizes': expected int, got '2'"),
        ({"pair": [1]}, "field 'pair'"),
        ({"name": {"width": 1, "kind": "z"}}, "field 'name'"),
        ({"rate": -1.0}, "rate must not be negative"),
        ([], "expected the fields of Outer"),
    ],
)
def test_c12_config_values_that_are_refused(values, message):
    with pytest.raises(CheckpointError, match=rf"c.json.*{message}"):
        config_from_json(Outer, values, "c.json")
