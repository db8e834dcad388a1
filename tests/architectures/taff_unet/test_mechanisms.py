"""What TAFF-UNet exchanges between cases: priors, beats and intervals, each alone, among the cases that have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trifuse.architectures.data.samples.side_inputs import SideInputs
from trifuse.architectures.taff_unet.mechanisms import fitted, mechanisms
from trifuse.architectures.taff_unet.model import TaffUNet, TaffUNetConfig

DAYS = {"a": 3.0, "b": 60.0, "c": None, "d": 40.0, "e": 10.0}  # c has no ECG


def prior(number, shape=(2, 4, 4)):
    labels = np.zeros(shape, np.uint8)
    labels[:, 1:3, 1:3] = number
    return labels


@pytest.fixture
def inputs():
    return {
        name: SideInputs(
            prior(number, (2, 4, 4 + number)),
            {
                "ecg": torch.full((12, 16), float(number) if days is not None else 0.0),
                "interval": torch.tensor(days or 0.0),
                "has_ecg": torch.tensor(days is not None),
            },
        )
        for number, (name, days) in enumerate(DAYS.items(), start=1)
    }


@pytest.fixture(scope="module")
def exchanges():
    model = TaffUNet(TaffUNetConfig("full", image_size=32, base_dim=2, fusion_stage=1))
    return {each.name: each.exchange for each in mechanisms(model) if each.exchange is not None}


def differing(before, after):
    """Return the names of what differs between inputs of a case."""
    names = {name for name, value in before.constants.items() if not torch.equal(value, after.constants[name])}
    return names | ({"prior"} if not np.array_equal(before.prior, after.prior) else set())


def test_each_exchange_changes_one_thing_in_the_cases_that_have_it(exchanges, inputs):
    with_ecg = {name for name, days in DAYS.items() if days is not None}
    expected = {
        "prior": ("prior", set(DAYS)),
        "prior of another case": ("prior", set(DAYS)),
        "ECG": ("has_ecg", with_ecg),
        "ECG of another case": ("ecg", with_ecg),
        "interval of another case": ("interval", with_ecg),
    }
    assert set(exchanges) == set(expected)
    for name, (what, cases) in expected.items():
        found = exchanges[name](inputs)
        assert set(found) == cases, name
        assert all(differing(inputs[case], found[case]) == {what} for case in cases), name


def test_intervals_are_exchanged_with_distant_ones(exchanges, inputs):
    """Of 3, 10, 40 and 60 days, each gets the one two ranks away."""
    found = exchanges["interval of another case"](inputs)
    assert {name: float(each.constants["interval"]) for name, each in found.items()} == {
        "a": 40.0,
        "e": 60.0,
        "d": 3.0,
        "b": 10.0,
    }


def test_an_exchanged_prior_is_brought_to_the_grid(exchanges, inputs):
    found = exchanges["prior of another case"](inputs)
    for name, each in found.items():
        assert each.prior.shape == inputs[name].prior.shape
        assert len(np.unique(each.prior)) == 2  # no new labels between
    assert not exchanges["prior"](inputs)["a"].prior.any()


def test_one_case_has_nobody_to_exchange_with(exchanges, inputs):
    for name in ("prior of another case", "ECG of another case", "interval of another case"):
        assert exchanges[name]({name: inputs[name] for name in ("a", "c")} if "prior" not in name else
                               {"a": inputs["a"]}) == {}  # fmt: skip


def test_labels_are_fitted_by_the_nearest():
    labels = np.arange(8, dtype=np.uint8).reshape(1, 2, 4)
    assert np.array_equal(fitted(labels, labels.shape), labels)
    assert np.array_equal(fitted(labels, (2, 2, 8))[1], labels[0].repeat(2, axis=1))
    assert fitted(labels, (1, 1, 2)).tolist() == [[[5, 7]]]


@pytest.mark.parametrize("gate_time", ["apart", "joined", "unseen"])
def test_without_time_the_days_make_no_difference(gate_time):
    """Neither by the modulation nor by the gate; the ECG itself still counts."""
    config = TaffUNetConfig("full", image_size=32, base_dim=2, fusion_stage=1, gate_time=gate_time)
    model, generator = TaffUNet(config).eval(), torch.Generator().manual_seed(3)
    for parameter in (*model.fusion.gate.parameters(), *model.fusion.film.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    image, ecg = (torch.randn(2, *shape, generator=generator) for shape in ((1, 32, 32), (12, 608)))
    segments = torch.zeros(2, 17, 32, 32)
    segments[:, 3, 8:24, 8:24] = 1
    young, old = torch.tensor([0.0, 3.0]), torch.tensor([80.0, 40.0])

    def logits(beats, days):
        with torch.inference_mode():
            return model(image, segments, beats, days)

    (without_time,) = (each.switch for each in mechanisms(model) if each.name == "time")
    assert not torch.allclose(logits(ecg, young), logits(ecg, old))
    with without_time(model, {}):
        assert torch.equal(logits(ecg, young), logits(ecg, old))
        assert not torch.allclose(logits(ecg, young), logits(None, young))


def test_the_gate_is_held_at_the_weight_of_the_ecg():
    """And watched over the samples that have one: their weights are no zeros."""
    model = TaffUNet(TaffUNetConfig("ecg", image_size=32, base_dim=2, fusion_stage=1)).eval()
    rows = {each.name: each for each in mechanisms(model)}
    image, ecg, has_ecg = torch.randn(2, 1, 32, 32), torch.randn(2, 12, 608), torch.tensor([True, False])
    kept = []
    (watch,) = rows["gate fixed"].watches
    with torch.inference_mode():
        with watch.record(model, kept.append):
            own = model.run(image, ecg=ecg, has_ecg=has_ecg).gate
        with rows["gate fixed"].switch(model, {watch.name: torch.tensor(0.2)}):
            held = model.run(image, ecg=ecg, has_ecg=has_ecg).gate
    assert [values.tolist() for values in kept] == [own[:1, 1].tolist()]
    torch.testing.assert_close(held, torch.tensor([[0.8, 0.2], [0.0, 0.0]]))
