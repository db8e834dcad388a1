"""What TAFF-UNet learns from: segmentation, the reconstruction of ECGs, and the entropy of the gate between them.

As every loss here, each adds up its sums over samples and ranks (``reduce``) before it applies its formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trifuse.kernels.choices import check_choices

from .distributed import Reduce
from .losses import SegmentationLoss

EntropySign = Literal["maximise", "literal"]
PADDING = 4  # zeros before and after a beat of 600 samples, which make it one of 608
_LEAST_WEIGHT = 1e-8  # below which the logarithm of a weight falls no further


class ScarOutput(Protocol):
    """What `ScarLoss` takes from a network.

    Attributes:
        logits: (B, K, H / 2**i, W / 2**i), full resolution first.
        gate: weights (B, 2) of image and ECG; None for a network without an ECG.
        reconstruction: ECGs (B, 12, T); None likewise.
    """

    @property
    def logits(self) -> Sequence[Tensor]: ...
    @property
    def gate(self) -> Tensor | None: ...
    @property
    def reconstruction(self) -> Tensor | None: ...


def reconstruction_loss(
    reconstruction: Tensor,
    ecg: Tensor,
    has_ecg: Tensor | None = None,
    *,
    usable: Tensor | None = None,
    mask_padding: bool = False,
    sample_weight: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Return the mean squared error of the ECGs that are there, over samples, leads and time; 0 where none is.

    Args:
        reconstruction: of shape (B, 12, T).
        ecg: what it should be; rows of absent ECGs may hold anything, NaN too.
        has_ecg: which samples have an ECG, of shape (B,); None means all.
        usable: which of their leads count, of shape (B, 12); None means all.
        mask_padding: leave out the four padded samples at either end.
        sample_weight: of shape (B,); 0 makes a sample count for nothing.
        reduce: sums over all ranks; None for one rank.
    """
    present = _present(reconstruction, has_ecg)
    target = torch.where(present[:, None, None], ecg, 0.0)  # NaN times zero would be NaN
    errors = (_wide(reconstruction) - _wide(target)).square()
    if mask_padding:
        errors = errors[..., PADDING:-PADDING]
    counted = torch.ones_like(errors[..., 0]) if usable is None else usable.to(errors)
    by_sample = (errors.mean(2) * counted).sum(1) / counted.sum(1).clamp(min=1.0)
    return _mean_of_present(by_sample, present, sample_weight, reduce)


def gate_entropy(
    weights: Tensor,
    has_ecg: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Return the mean entropy -sum w log w of gate weights (B, 2), over the samples that have an ECG; 0 where none has.

    Args: see `reconstruction_loss`.
    """
    w = _wide(weights)
    entropy = -(w * w.clamp(min=_LEAST_WEIGHT).log()).sum(1)
    return _mean_of_present(entropy, _present(w, has_ecg), sample_weight, reduce)


def quadratic_warmup(epoch: float, lambda_max: float = 1.0, warmup_epochs: float = 10.0) -> float:
    """Return ``lambda_max * min(1, epoch / warmup_epochs)**2``, or ``lambda_max`` where there is no warm-up.

    Args:
        epoch: counted from 0; may be a fraction.
        lambda_max: the weight after the warm-up.
        warmup_epochs: 0 for none.
    """
    if warmup_epochs == 0:
        return lambda_max
    return lambda_max * min(1.0, epoch / warmup_epochs) ** 2


@dataclass
class ScarLoss:
    """Deeply supervised segmentation, reconstruction of the ECG, entropy of the gate: a loss for `fit`.

    segmentation + quadratic_warmup(epoch) * reconstruction - lambda_entropy * entropy. The paper adds the entropy,
    which drives the gate to one side, and says that it keeps it from there: ``entropy_sign="literal"`` does so.

    Attributes:
        segmentation: the loss of the logits.
        lambda_ecg: weight of the reconstruction, after the warm-up.
        warmup_epochs: over which that weight rises from 0.
        lambda_entropy: weight of the entropy of the gate.
        entropy_sign: ``"maximise"`` the entropy, or ``"literal"``: minimise it, as the paper's formula does.
        mask_padding: see `reconstruction_loss`.
        epoch: where training is, counted from 0; `fit` sets it.

    Raises:
        ValueError: a negative or infinite weight or warm-up, or an unknown sign.
    """

    segmentation: SegmentationLoss = field(default_factory=SegmentationLoss)
    lambda_ecg: float = 1.0
    warmup_epochs: float = 10.0
    lambda_entropy: float = 3e-3
    entropy_sign: EntropySign = "maximise"
    mask_padding: bool = False
    epoch: float = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("lambda_ecg", "warmup_epochs", "lambda_entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite, and must not be negative, got {getattr(self, name)}")
        check_choices(self)

    def words(self, *, with_ecg: bool) -> str:
        """Say what it is of a network with or without an ECG, for a report."""
        if not with_ecg:
            return self.segmentation.words
        sign = {"maximise": "-", "literal": "+"}[self.entropy_sign]
        warmup = f", reached in {self.warmup_epochs:g} epochs" if self.warmup_epochs else ""
        ecg = f"{self.lambda_ecg:g} reconstruction of the ECG{warmup}"
        return f"{self.segmentation.words}; + {ecg}; {sign} {self.lambda_entropy:g} entropy of the gate"

    def start_epoch(self, epoch: float) -> None:
        """Take the weight of the reconstruction that belongs to an epoch, counted from 0."""
        self.epoch = epoch

    def __call__(self, outputs: ScarOutput, batch: Mapping[str, Any], reduce: Reduce | None) -> Tensor:
        """Return the loss for ``batch["target"]`` and ``batch["ecg"]``.

        ``batch["has_ecg"]`` and ``batch["sample_weight"]`` may silence samples.
        """
        loss = self.segmentation(outputs.logits, batch, reduce)
        if outputs.gate is None or outputs.reconstruction is None:
            return loss
        has_ecg = batch.get("has_ecg")
        shared: dict[str, Any] = {"sample_weight": batch.get("sample_weight"), "reduce": reduce}
        ecg = reconstruction_loss(
            outputs.reconstruction, batch["ecg"], has_ecg, mask_padding=self.mask_padding, **shared
        )
        entropy = gate_entropy(outputs.gate, has_ecg, **shared)
        sign = {"maximise": -1.0, "literal": 1.0}[self.entropy_sign]
        weight = quadratic_warmup(self.epoch, self.lambda_ecg, self.warmup_epochs)
        return loss + weight * ecg + sign * self.lambda_entropy * entropy


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _present(of: Tensor, has_ecg: Tensor | None) -> Tensor:
    if has_ecg is None:
        return torch.ones(len(of), dtype=torch.bool, device=of.device)
    return has_ecg.reshape(-1).bool()


def _mean_of_present(values: Tensor, present: Tensor, sample_weight: Tensor | None, reduce: Reduce | None) -> Tensor:
    """Return the weighted mean of values (B,) over the present samples of all ranks; 0 where there is none."""
    weight = present.to(values.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.to(weight)
    total = torch.stack([(weight * values).sum(), weight.sum()])
    total = total if reduce is None else reduce(total)
    return total[0] / total[1].clamp(min=1.0)
