"""Median beats of many ECGs, as samples for training an autoencoder.

Every record is read down to one beat in the form that networks take, see `median_beat.network_ecg`. A record that
gives none is not an error of the whole: it is left out, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.storage.lead_scaling import LeadScaling
from trifuse.kernels.errors import DataError

from .median_beat import load_beat, network_ecg


@dataclass(frozen=True)
class BeatSource:
    """Where an ECG lies.

    Attributes:
        record: its name.
        path: its file.
        rate_hz: samples per second, where the file does not say.
    """

    record: str
    path: Path
    rate_hz: float | None = None


@dataclass(frozen=True, eq=False)
class NetworkBeat:
    """A beat as networks take it.

    Attributes:
        record: the name of its ECG.
        ecg: float32 (12, T), scaled as `network_ecg` does it, zero in leads that are not usable.
        usable: bool (12,).
        notes: what was changed or is odd, a sentence each.
    """

    record: str
    ecg: Tensor
    usable: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A record that gives no beat, and why."""

    record: str
    reason: str


def load_beats(
    sources: Sequence[BeatSource], *, min_beats: int = 3, scaling: LeadScaling = "zscore"
) -> tuple[list[NetworkBeat], list[LeftOut]]:
    """Read the beats of many ECGs; what cannot be used is left out and named.

    Args:
        sources: the ECGs.
        min_beats: heart beats that a median beat needs.
        scaling: what becomes of the leads' voltage.
    """
    beats, left_out = [], []
    for source in sources:
        try:
            beat = load_beat(source.path, rate_hz=source.rate_hz, min_beats=min_beats)
        except DataError as error:
            left_out.append(LeftOut(source.record, str(error).replace(f"{source.path.parent}/", "")))
            continue
        ecg = network_ecg(beat, scaling)  # zero in leads that are not usable or do not vary
        beats.append(NetworkBeat(source.record, ecg, (ecg != 0).any(1), tuple(beat.notes)))
    return beats, left_out


class BeatDataset(Dataset[dict[str, Any]]):
    """Beats as samples for training an autoencoder.

    A sample is asked for by its index, or by ``(seed, epoch, index)``: then it is mixed and masked as a generator says
    that these three numbers alone decide. It is a dictionary of ``ecg`` (12, T) float32, what the network sees;
    ``target`` (12, T), what it is to draw: the same without masking; ``usable`` (12,) bool, the leads that count;
    ``record`` and ``index``.

    Args:
        beats: all of the same length.
        lead_masking: probability with which a usable lead is zeroed in ``ecg``; at least one stays.
        mixing: largest share of another beat's leads, where both are usable, that is mixed into a beat: with few
            records there are then more hearts to learn from than were recorded.
        scaling: of the beats; with ``"zscore"`` mixed leads are z-scored again.

    Raises:
        ValueError: a probability or share outside [0, 1).
        DataError: there are no beats, or one has no usable lead.
    """

    def __init__(
        self,
        beats: Sequence[NetworkBeat],
        *,
        lead_masking: float = 0.0,
        mixing: float = 0.0,
        scaling: LeadScaling = "zscore",
    ) -> None:
        for name, value in (("lead_masking", lead_masking), ("mixing", mixing)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if not beats:
            raise DataError("beats", "records", got="none that can be used", want="at least one")
        for beat in beats:
            if not bool(beat.usable.any()):
                raise DataError(beat.record, "leads", got="none usable", want="at least one")
        self.beats, self.lead_masking, self.mixing, self.scaling = tuple(beats), lead_masking, mixing, scaling

    def __len__(self) -> int:
        """Return the number of beats."""
        return len(self.beats)

    def name_of(self, key: tuple[int, int, int]) -> str:
        """Say whose beat a sample is."""
        return f"record {self.beats[key[2]].record}"

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict[str, Any]:
        """Return the sample of that index; with ``(seed, epoch, index)`` mixed and masked."""
        index = key[2] if isinstance(key, tuple) else key
        beat = self.beats[index]
        ecg = target = beat.ecg
        if isinstance(key, tuple):
            generator = _generator(*key)
            target = self._mixed(beat, generator)
            ecg = target * self._kept_leads(beat, generator)[:, None]
        return {"ecg": ecg, "target": target, "usable": beat.usable, "record": beat.record, "index": index}

    def _mixed(self, beat: NetworkBeat, generator: torch.Generator) -> Tensor:
        """Draw another beat, its share, and mix."""
        other = self.beats[int(torch.randint(len(self.beats), (), generator=generator))]
        share = self.mixing * float(torch.rand((), generator=generator))
        if share == 0.0:
            return beat.ecg
        mixture = (1 - share) * beat.ecg + share * other.ecg
        there = (beat.ecg != 0).any(0)  # not the padding
        spread = mixture[:, there].std(1, correction=0)
        mixed = beat.usable & other.usable & (spread > 0)
        mixture = torch.where(there, mixture - mixture[:, there].mean(1, keepdim=True), 0.0)
        if self.scaling == "zscore":
            mixture = mixture / spread[:, None]
        return torch.where(mixed[:, None], mixture, beat.ecg)

    def _kept_leads(self, beat: NetworkBeat, generator: torch.Generator) -> Tensor:
        """Draw which leads (12,) are not masked: one usable lead for certain, each other one by itself."""
        draw = torch.rand(len(beat.usable), generator=generator)
        draw[~beat.usable] = 0.0
        return (draw >= self.lead_masking) | (draw == draw.max())


def _generator(*key: int) -> torch.Generator:
    """Make a generator that the key alone decides."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
