"""Beats as samples: every record read or named as left out; leads masked by key, in training alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_ecg import limb_leads, median

from trifuse.architectures.data.ecg.beat_dataset import BeatDataset, BeatSource, NetworkBeat, load_beats
from trifuse.kernels import DataError


def source(folder, name: str, signal: np.ndarray, rate_hz: float | None = 500.0) -> BeatSource:
    np.save(folder / f"{name}.npy", signal.astype(np.float32))
    return BeatSource(name, folder / f"{name}.npy", rate_hz)


def beat(seed: int = 0, unusable: tuple[int, ...] = ()) -> NetworkBeat:
    usable = torch.tensor([lead not in unusable for lead in range(12)])
    ecg = torch.randn(12, 608, generator=torch.Generator().manual_seed(seed)) * usable[:, None]
    return NetworkBeat(f"r{seed}", ecg, usable)


def test_beats_are_z_scored_and_padded(tmp_path):
    signal = median()
    signal[8] = 0.0
    beats, left_out = load_beats([source(tmp_path, "a", signal)])
    assert left_out == []
    ecg, usable = beats[0].ecg, beats[0].usable
    assert (ecg.shape, ecg.dtype) == ((12, 608), torch.float32)
    assert usable.tolist() == [lead != 8 for lead in range(12)]
    assert torch.equal(ecg[:, :4], torch.zeros(12, 4))
    assert torch.equal(ecg[:, -4:], torch.zeros(12, 4))
    inner = ecg[usable][:, 4:-4]
    torch.testing.assert_close(inner.mean(1), torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(inner.std(1, correction=0), torch.ones(11), atol=1e-5, rtol=0)
    assert torch.equal(ecg[8], torch.zeros(608))
    assert inner[0].argmax() == 200


def test_beats_of_voltage_are_in_one_unit(tmp_path):
    signal = median()
    high = signal.copy()
    high[6] *= 3
    (beat, other), _ = load_beats([source(tmp_path, n, s) for n, s in (("a", signal), ("b", high))], scaling="voltage")
    torch.testing.assert_close(other.ecg[6], 3 * beat.ecg[6], atol=1e-4, rtol=0)
    torch.testing.assert_close(other.ecg[5], beat.ecg[5])


def test_what_gives_no_beat_is_left_out_and_named(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    sources = [
        source(tmp_path, "good", median()),
        source(tmp_path, "noise", limb_leads(0.3 * rng.standard_normal((12, 5000)))),
        BeatSource("broken", tmp_path / "broken.npy", 500.0),
        BeatSource("absent", tmp_path / "absent.npy", 500.0),
    ]
    beats, left_out = load_beats(sources)
    assert [found.record for found in beats] == ["good"]
    assert [missed.record for missed in left_out] == ["noise", "broken", "absent"]
    assert all(f"{missed.record}.npy" in missed.reason or missed.record in missed.reason for missed in left_out)


def test_samples_by_index_are_the_beats_themselves():
    dataset = BeatDataset([beat(0), beat(1, unusable=(3,))], lead_masking=0.9)
    assert len(dataset) == 2
    sample = dataset[1]
    assert set(sample) == {"ecg", "target", "usable", "record", "index"}
    assert (sample["record"], sample["index"]) == ("r1", 1)
    assert torch.equal(sample["ecg"], dataset.beats[1].ecg)
    assert torch.equal(sample["target"], sample["ecg"])
    assert sample["usable"].tolist() == [lead != 3 for lead in range(12)]


def test_a_key_alone_decides_which_leads_are_masked():
    dataset = BeatDataset([beat(0), beat(1)], lead_masking=0.5)
    sample, again = dataset[(7, 3, 1)], dataset[(7, 3, 1)]
    assert torch.equal(sample["ecg"], again["ecg"])
    masked = (sample["ecg"] == 0).all(1)
    assert 0 < masked.sum() < 12
    assert torch.equal(sample["ecg"][~masked], sample["target"][~masked])
    assert torch.equal(sample["target"], dataset.beats[1].ecg)
    others = [(dataset[key]["ecg"] == 0).all(1) for key in ((8, 3, 1), (7, 4, 1), (7, 3, 0))]
    assert all(not torch.equal(masked, other) for other in others)


def test_masking_hides_leads_as_often_as_it_says_but_never_all():
    dataset = BeatDataset([beat(0, unusable=(0, 1))], lead_masking=0.3)
    hidden = torch.stack([(dataset[(0, epoch, 0)]["ecg"] == 0).all(1) for epoch in range(400)])
    assert hidden[:, :2].all()
    assert 0.25 < hidden[:, 2:].float().mean() < 0.35
    nearly_all = BeatDataset([beat(0, unusable=tuple(range(1, 12)))], lead_masking=0.99)
    assert all(torch.equal(nearly_all[(0, epoch, 0)]["ecg"], nearly_all.beats[0].ecg) for epoch in range(50))


def test_mixing_adds_some_of_another_beat_where_both_are_usable():
    whole, part = scored(beat(0)), scored(beat(1, unusable=(3,)))
    dataset = BeatDataset([whole, part], mixing=0.5)
    own = 0
    for epoch in range(30):
        sample = dataset[(0, epoch, 1)]
        target = sample["target"]
        assert torch.equal(sample["ecg"], target)
        assert torch.equal(target[3], torch.zeros(608))
        assert sample["usable"].tolist() == part.usable.tolist()
        used = part.usable
        torch.testing.assert_close(target[used, 4:-4].std(1, correction=0), torch.ones(11))
        assert torch.equal(target[:, :4], torch.zeros(12, 4))
        shares = torch.linalg.lstsq(torch.stack((part.ecg[0], whole.ecg[0]), 1), target[0][:, None]).solution.flatten()
        assert -1e-6 < shares[1] / shares.sum() < 0.5
        assert (shares[0] * part.ecg[0] + shares[1] * whole.ecg[0] - target[0]).abs().max() < 1e-2
        own += bool(shares[1] < 1e-4)
    assert 5 < own < 25  # it drew itself
    assert torch.equal(dataset[1]["target"], part.ecg)
    others = [dataset[(0, epoch, 0)]["target"] for epoch in range(30)]
    assert all(torch.allclose(target[3], whole.ecg[3], atol=1e-5) for target in others)


def test_mixing_keeps_the_voltage():
    """The mixture of two beats of one heart, one of them ten times as high, is in between, and not z-scored."""
    low = scored(beat(0))
    high = NetworkBeat("high", 10 * low.ecg, low.usable)
    dataset, ratios = BeatDataset([low, high], mixing=0.5, scaling="voltage"), []
    for epoch in range(10):
        target = dataset[(0, epoch, 0)]["target"]
        ratios.append(target[0, 4:-4].std(correction=0))
        torch.testing.assert_close(target, ratios[-1] * low.ecg, atol=1e-4, rtol=0)
    assert 1 - 1e-4 < min(ratios) < 1.5 < max(ratios) < 5.5
    mixed = [BeatDataset([low, high], mixing=0.5)[(0, epoch, 0)]["target"] for epoch in range(10)]
    assert all(torch.allclose(target, low.ecg, atol=1e-4) for target in mixed)


def test_a_lead_that_the_other_beat_lacks_is_not_mixed():
    dataset = BeatDataset([scored(beat(0)), scored(beat(1, unusable=(3,)))], mixing=0.9, scaling="voltage")
    targets = [dataset[(0, epoch, 0)]["target"] for epoch in range(10)]
    assert all(torch.allclose(target[3], dataset.beats[0].ecg[3], atol=1e-5) for target in targets)
    assert not all(torch.allclose(target[4], dataset.beats[0].ecg[4]) for target in targets)


def scored(beat: NetworkBeat) -> NetworkBeat:
    ecg = torch.zeros(12, 608)
    inner = beat.ecg[:, 4:-4] - beat.ecg[:, 4:-4].mean(1, keepdim=True)
    ecg[:, 4:-4] = inner / inner.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return NetworkBeat(beat.record, ecg, beat.usable)


def test_without_masking_a_key_changes_nothing():
    dataset = BeatDataset([beat(0)])
    assert torch.equal(dataset[(1, 2, 0)]["ecg"], dataset[0]["ecg"])


def test_refusals():
    for name in ("lead_masking", "mixing"):
        for value in (-0.1, 1.0):
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\)"):
                BeatDataset([beat()], **{name: value})
    with pytest.raises(DataError, match="none that can be used"):
        BeatDataset([])
    with pytest.raises(DataError, match=r"r0.*none usable"):
        BeatDataset([beat(0, unusable=tuple(range(12)))])
