"""The synthetic ECG: leads that keep their laws, signs in the leads that face the scar, and news that gets old."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trifuse.architectures.data.ecg.median_beat import median_beat
from trifuse.architectures.data.ecg.signal import LEADS, arrange_leads
from trifuse.architectures.data.phantoms.ecg import scar_vector, synthetic_ecg
from trifuse.architectures.data.phantoms.heart_anatomy import segment_directions

TIME_S = np.arange(600) / 500 - 0.4
TERRITORIES = {
    "anteroseptal": ((2, 7, 8, 13, 14), ("V1", "V2", "V3")),
    "inferior": ((3, 4, 9, 10, 15), ("III", "aVF")),
    "lateral": ((5, 6, 11, 12, 16), ("I", "V5", "V6")),
    "anterior, high lateral": ((1, 6, 7, 12), ("I", "aVL")),
}


def shares(segments, of_each=0.6):
    scar = np.zeros(17)
    scar[[segment - 1 for segment in segments]] = of_each
    return scar


def clean(scar, seed=0, days=0.0):
    """Return a beat (12, 600) without noise."""
    return synthetic_ecg(np.random.default_rng(seed), scar, days).at(TIME_S)


def in_lead(beat, lead, at_s):
    return beat[LEADS.index(lead), np.abs(TIME_S - at_s).argmin()]


@settings(max_examples=20)
@given(seed=st.integers(0, 999), days=st.floats(0, 90), noise_mv=st.sampled_from([0.0, 0.02]))
def test_limb_leads_keep_einthoven_and_goldberger(seed, days, noise_mv):
    rng = np.random.default_rng(seed)
    ecg = synthetic_ecg(rng, rng.uniform(0, 1, 17), days)
    for signal in (ecg.median_beat(rng, noise_mv), ecg.record(rng, 2.0, noise_mv)):
        one, two, three, right, left, foot = signal[:6].astype(np.float64)
        for found, law in (
            (three, two - one),
            (right, -(one + two) / 2),
            (left, (one - three) / 2),
            (foot, (two + three) / 2),
        ):
            np.testing.assert_allclose(found, law, atol=1e-6)


@pytest.mark.parametrize("name", TERRITORIES)
@pytest.mark.parametrize("seed", range(3))
def test_signs_are_in_the_leads_that_face_the_scar(name, seed):
    segments, leads = TERRITORIES[name]
    healthy, scarred = clean(np.zeros(17), seed), clean(shares(segments), seed)
    for lead in leads:
        assert in_lead(scarred, lead, -0.017) < in_lead(healthy, lead, -0.017) - 0.1, f"{lead}: a Q wave, or less R"
        assert in_lead(scarred, lead, 0.12) > in_lead(healthy, lead, 0.12) + 0.02, f"{lead}: ST raised"
        assert in_lead(scarred, lead, 0.29) < in_lead(healthy, lead, 0.29) - 0.02, f"{lead}: T turned"


def test_each_territory_has_leads_of_its_own():
    """The lead with the deepest change early in the QRS is one that faces the scar, and no other territory's."""
    deepest = {}
    for name in ("anteroseptal", "inferior", "lateral"):
        change = clean(shares(TERRITORIES[name][0])) - clean(np.zeros(17))
        deepest[name] = LEADS[change[:, np.abs(TIME_S + 0.017).argmin()].argmin()]
    assert deepest["anteroseptal"] in ("V1", "V2", "V3", "V4")
    assert deepest["inferior"] in ("II", "III", "aVF")
    assert deepest["lateral"] in ("I", "aVL", "V5", "V6")


@given(segments=st.sets(st.integers(1, 17), min_size=1, max_size=5), size=st.floats(0.1, 0.5))
def test_signs_grow_with_the_scar(segments, size):
    small, large = (np.linalg.norm(scar_vector(shares(segments, share))) for share in (size, size + 0.3))
    assert large > small
    assert large <= 1.3 + 1e-9
    assert scar_vector(np.zeros(17)) == pytest.approx(0)


def test_segments_face_where_they_lie():
    """Left is the first, back the second, head the third coordinate."""
    facing = segment_directions()
    np.testing.assert_allclose(np.linalg.norm(facing, axis=1), 1)
    assert facing[[0, 6, 12], 2].min() > 0.5, "anterior: to the head"
    assert facing[[3, 9, 14], 2].max() < -0.5, "inferior: to the feet"
    assert facing[[1, 2, 7, 8], 1].max() < 0, "septal: to the front"
    assert facing[[1, 2], 0].max() < 0, "septal: to the right"
    assert facing[[4, 5, 10, 11, 15], 0].min() > 0, "lateral: to the left"
    for ring in (facing[:6], facing[6:12], facing[12:16]):
        across = ring - ring.mean(0)
        cosines = (across * np.roll(across, -1, 0)).sum(1) / np.linalg.norm(across, axis=1) ** 2
        np.testing.assert_allclose(cosines, np.cos(2 * np.pi / len(ring)), atol=1e-9)


def test_what_an_ecg_says_gets_old():
    """The nearest of three territories' mean beats is right when fresh, and hardly better than guessing at last."""

    def beats(days, seed):
        found = []
        for number in range(90):
            rng = np.random.default_rng([seed, number])
            scar = shares(list(TERRITORIES.values())[number % 3][0], rng.uniform(0.3, 0.8))
            found.append(synthetic_ecg(rng, scar, days).median_beat(rng)[:, 150:400:3].ravel())
        return np.array(found)

    fresh = beats(0.0, 1)
    middles = np.array([fresh[index::3].mean(0) for index in range(3)])
    right = []
    for days in (0.0, 10.0, 40.0, 90.0):
        distance = np.linalg.norm(beats(days, 2)[:, None] - middles, axis=-1)
        right.append(float((distance.argmin(1) == np.arange(90) % 3).mean()))
    assert right == sorted(right, reverse=True)
    assert right[0] > 0.9
    assert right[1] > 0.8
    assert 0.2 < right[-1] < 0.6


@pytest.mark.parametrize("seed", range(4))
def test_records_give_their_beat_back(seed):
    rng = np.random.default_rng(seed)
    ecg = synthetic_ecg(rng, shares(list(TERRITORIES.values())[seed][0]))
    record = arrange_leads(ecg.record(rng), LEADS, rate_hz=500, name="synthetic")
    beat = median_beat(record)
    assert record.notes == ()
    assert beat.usable.all()
    assert 8 <= beat.beats <= 16
    near = slice(100, 400)
    rows = [LEADS.index(lead) for lead in ("I", "II", "V2", "V6")]
    alike = max(  # at some heart rate, and some delay of what is taken for the R peak
        np.corrcoef(beat.signal_mv[rows, near].ravel(), np.roll(clean, shift, 1)[rows, near].ravel())[0, 1]
        for clean in (ecg.at(TIME_S, stretch) for stretch in np.linspace(0.8, 1.05, 6))
        for shift in range(-15, 16)
    )
    assert alike > 0.95


def test_the_seed_decides():
    first, again, other = (
        synthetic_ecg(rng := np.random.default_rng(seed), shares((1, 2)), 20.0).record(rng) for seed in (5, 5, 6)
    )
    assert first.shape == (12, 5000)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
