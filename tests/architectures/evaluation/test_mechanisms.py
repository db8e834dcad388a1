"""Switches do to a network what they say and leave no trace; exchanges give every case something of a distant one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.evaluation.mechanisms import (
    Mechanism,
    answering,
    attributes,
    cut,
    exchanged,
    holding,
    skipped,
    together,
    with_constants,
    zeroed,
)


class Chain(nn.Module):
    """Two convolutions, the second of which sees the first one's map; and a method that shifts the result."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)
        self.shift = 1.0

    def shifted(self, x):
        return x + self.shift

    def forward(self, x):
        return self.shifted(self.second(self.first(x)))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain()


X = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def expected_of(chain, first, second=None):
    return chain.second(first(X)) + 1.0 if second is None else second


SWITCHES = {  # what is entered, and what the network then gives
    "zeroed": (
        lambda chain: zeroed([chain.first]),
        lambda chain: chain.second(torch.zeros_like(X)) + 1,
    ),
    "skipped": (lambda chain: skipped([chain.first]), lambda chain: chain.second(X) + 1),
    "answering": (
        lambda chain: answering([chain.first], lambda given, result: result - given),
        lambda chain: chain.second(chain.first(X) - X) + 1,
    ),
    "cut": (
        lambda chain: cut([chain.second], slice(1, None)),
        lambda chain: chain.second(chain.first(X) * torch.tensor([1.0, 0.0])[:, None, None]) + 1,
    ),
    "holding a number": (
        lambda chain: holding([(chain.second.bias, 0.5)]),
        lambda chain: nn.functional.conv2d(chain.first(X), chain.second.weight) + 0.5 + 1,
    ),
    "holding a tensor": (
        lambda chain: holding([(chain.first.weight, torch.eye(2)[:, :, None, None])]),
        lambda chain: chain.second(X + chain.first.bias[:, None, None]) + 1,
    ),
    "attributes": (
        lambda chain: attributes(chain, shifted=lambda x: 2 * x),
        lambda chain: 2 * chain.second(chain.first(X)),
    ),
    "attributes that are its own": (
        lambda chain: attributes(chain, shift=3.0),
        lambda chain: chain.second(chain.first(X)) + 3,
    ),
    "together": (
        lambda chain: together([skipped([chain.first]), attributes(chain, shift=0.0)]),
        lambda chain: chain.second(X),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_does_what_it_says_and_leaves_no_trace(name, chain):
    enter, expect = SWITCHES[name]
    with torch.no_grad():
        before, state = chain(X), {key: value.clone() for key, value in chain.state_dict().items()}
        expected = expect(chain)
        with enter(chain):
            torch.testing.assert_close(chain(X), expected)
        assert not torch.equal(expected, before)
        assert torch.equal(chain(X), before)
    assert all(torch.equal(value, state[key]) for key, value in chain.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chain.modules())
    assert vars(chain).get("shifted") is None
    assert chain.shift == 1.0


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_leaves_no_trace_when_something_fails_inside(name, chain):
    before = chain(X)
    with pytest.raises(RuntimeError, match="stop"), SWITCHES[name][0](chain):
        raise RuntimeError("stop")
    assert torch.equal(chain(X), before)


def test_zeros_are_those_of_every_map():
    class Two(nn.Module):
        def forward(self, x):
            return [x, (x + 1, x + 2)]

    two = Two()
    with zeroed([two]):
        first, (second, third) = two(X)
    assert not any(map.any() for map in (first, second, third))


def test_cut_leaves_what_it_was_given(chain):
    given = torch.ones(1, 2, 3, 3)
    with cut([chain.first], slice(0, 1)):
        chain.first(given)
    assert given.all()


def test_a_mechanism_is_measured_in_one_way():
    switch = lambda model, means: nullcontext()  # noqa: E731
    for wrong in ({}, {"switch": switch, "unmeasured": "why"}, {"switch": switch, "exchange": dict}):
        with pytest.raises(ValueError, match=r"'it': expected one of switch, exchange and unmeasured, got .*; measure"):
            Mechanism("it", "something", **wrong)


def case(value):
    return SideInputs(constants={"value": torch.tensor(value)})


@pytest.mark.parametrize("number", [2, 3, 4, 7])
def test_every_case_gets_something_of_a_distant_one(number):
    inputs = {f"case{i}": case(i) for i in range(number)}
    found = exchanged(inputs, [*inputs], lambda own, other: with_constants(own, value=other.constants["value"]))
    values = [int(found[name].constants["value"]) for name in inputs]
    assert sorted(values) == list(range(number))  # nobody's is used twice
    assert all(abs(value - i) >= number // 2 for i, value in enumerate(values))


def test_cases_without_one_and_cases_that_would_stay_the_same_are_left_out():
    inputs = {"a": case(1), "b": case(1), "c": case(2)}

    def take(own, other):
        same = torch.equal(own.constants["value"], other.constants["value"])
        return None if same else with_constants(own, value=other.constants["value"])

    assert exchanged(inputs, ["a", "b"], take) == {}
    assert exchanged(inputs, ["a"], take) == {}
    assert exchanged(inputs, [], take) == {}
    assert set(exchanged(inputs, ["a", "c"], take)) == {"a", "c"}
    assert int(inputs["a"].constants["value"]) == 1
