"""The ECG autoencoder: a median beat of twelve leads becomes a code of 64 numbers, and a beat again.

Where published weights load, the parameters have the published names; `convert` renames those of the attentions.

Source: the dual-attention ECG autoencoder that TAFF-UNet builds on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.storage.lead_scaling import LeadScaling
from trifuse.architectures.storage.pretrained import Pretrained, weights_generator
from trifuse.blocks.ecg_attention import EcgAttention, EcgDualAttention
from trifuse.blocks.normalization import BatchNormOfPresent
from trifuse.blocks.plain_layers import dtype_of
from trifuse.kernels import ShapeError
from trifuse.kernels.choices import check_choices

NUM_LEADS = 12
HEADS = 8
LeadLayout = Literal["correct", "upstream"]
STEM_KERNEL = KERNEL = 5
SLOPE = 0.01  # of the leaky ReLU inside residual blocks


@dataclass(frozen=True)
class EcgAutoencoderConfig:
    """Everything that defines an `EcgAutoencoder`; the defaults are the paper's.

    Args:
        time_steps: samples T of a beat; a multiple of 2 ** downsample. A beat of 600 samples is padded to 608.
        z_dim: width of the code, even.
        base_dim: features of a lead after the first convolutions.
        downsample: how often the time axis is halved.
        lead_layout: ``"correct"`` keeps the features of a lead together; ``"upstream"`` mixes leads and features as the
            published network does, for its weights.
        lead_scaling: what the beats are: each lead z-scored (``"zscore"``), or the ``"voltage"``, in units that all
            leads have in common. With the voltage the first norms are over all leads together, lest they take it away,
            and the reconstruction is not normalised.
        final_linear: whether a linear layer follows the pooled features.
        pooled_dim: width of the pooled features before it, even; None means ``z_dim``.
        dropout: of the positioned tokens and within the MLPs of the attentions.
        batchwise_dropout: drop the same entries of the positioned tokens in all samples of a batch, as upstream does.
        init_seed: seed of all random weights.

    Raises:
        ValueError: a value that is not allowed.
    """

    time_steps: int = 608
    z_dim: int = 64
    base_dim: int = 4
    downsample: int = 5
    lead_layout: LeadLayout = "correct"
    lead_scaling: LeadScaling = "zscore"
    final_linear: bool = False
    pooled_dim: int | None = None
    dropout: float = 0.2
    batchwise_dropout: bool = False
    init_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_steps", "z_dim", "base_dim", "downsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.downsample >= self.time_steps.bit_length():
            most = self.time_steps.bit_length() - 1
            raise ValueError(
                f"downsample {self.downsample} leaves nothing of {self.time_steps} samples; at most {most}"
            )
        check_choices(self)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.features % HEADS:
            raise ValueError(
                f"the {HEADS} attention heads do not divide the {self.features} features of base_dim {self.base_dim} "
                f"after {self.downsample} halvings; use an even base_dim"
            )
        if self.pooled_dim is not None and not self.final_linear:
            raise ValueError("pooled_dim is the width before the final linear layer; it needs final_linear=True")
        if self.pooled < 2 or self.pooled % 2:
            raise ValueError(f"the pooled features are half means, half maxima: their width {self.pooled} must be even")
        self._check_time()

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: beats were z-scored."""
        return {"lead_scaling": "zscore", **values}

    def __str__(self) -> str:
        return repr(self).replace("Config", "", 1)

    def _check_time(self) -> None:
        factor = 2**self.downsample
        lacking = -self.time_steps % factor
        if lacking:
            raise ValueError(
                f"time_steps {self.time_steps} is not divisible by {factor} (2 ** downsample); pad the beats to "
                f"{self.time_steps + lacking} samples, with {_either_side(lacking)}"
            )

    @property
    def instants(self) -> int:
        """Length of the time axis after all halvings."""
        return self.time_steps // 2**self.downsample

    @property
    def widths(self) -> tuple[int, ...]:
        """Features after each halving."""
        return tuple(self.base_dim * min(2**i, 4) for i in range(1, self.downsample + 1))

    @property
    def features(self) -> int:
        """Features that the attentions see."""
        return self.widths[-1]

    @property
    def pooled(self) -> int:
        """Width of the pooled features."""
        return self.z_dim if self.pooled_dim is None else self.pooled_dim


class DownBlock(nn.Module):
    """A residual block over time that halves it: (B, in_dim, L, T) -> (B, out_dim, L, T / 2)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = _time_conv(in_dim, out_dim, stride=2)
        self.bn1 = BatchNormOfPresent(out_dim)
        self.conv2 = _time_conv(out_dim, out_dim)
        self.bn2 = BatchNormOfPresent(out_dim)
        self.idfunc_1 = nn.Conv2d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        return F.gelu(_convolved(self, x, present) + self.idfunc_1(F.max_pool2d(x, (1, 2))))


class UpBlock(nn.Module):
    """A residual block over time, which it doubles where asked: (B, in_dim, L, T) -> (B, out_dim, L, 2 T or T).

    Args:
        in_dim: features that come in.
        out_dim: features that go out.
        upsample: whether a transposed convolution doubles the time axis first.
    """

    def __init__(self, in_dim: int, out_dim: int, upsample: bool) -> None:
        super().__init__()
        self.idfunc_0 = nn.ConvTranspose2d(in_dim, in_dim, (1, 4), (1, 2), (0, 1)) if upsample else None
        self.idfunc_1 = nn.Conv2d(in_dim, out_dim, 1, bias=not upsample)
        self.conv1 = _time_conv(out_dim if upsample else in_dim, out_dim)
        self.bn1 = BatchNormOfPresent(out_dim)
        self.conv2 = _time_conv(out_dim, out_dim)
        self.bn2 = BatchNormOfPresent(out_dim)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        if self.idfunc_0 is None:
            return F.gelu(_convolved(self, x, present) + self.idfunc_1(x))
        x = self.idfunc_1(self.idfunc_0(x))
        return F.gelu(_convolved(self, x, present) + x)


class BlockSequence(nn.Sequential):
    """Run blocks one after the other, and tell each which samples are present."""

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, present)
        return x


class EcgEncoder(nn.Module):
    """Encode beats (B, 12, T) as codes (B, z_dim)."""

    def __init__(self, config: EcgAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, apart = NUM_LEADS * config.base_dim, NUM_LEADS if config.lead_scaling == "zscore" else 1
        self.input_conv = nn.Sequential(
            nn.Conv1d(NUM_LEADS, width, STEM_KERNEL, padding=STEM_KERNEL // 2, groups=NUM_LEADS),
            nn.GroupNorm(apart, width),
            nn.GELU(),
            nn.Conv1d(width, width, STEM_KERNEL, padding=STEM_KERNEL // 2),
            nn.GroupNorm(apart, width),
            nn.GELU(),
        )
        dims = (config.base_dim, *config.widths)
        self.encoder = BlockSequence(*(DownBlock(dims[i], dims[i + 1]) for i in range(config.downsample)))
        self.attention = EcgDualAttention(
            config.features, config.instants, NUM_LEADS, HEADS, config.dropout, config.batchwise_dropout
        )
        self.mean_head = nn.Conv1d(config.features * NUM_LEADS, config.pooled // 2, 1)
        self.max_head = nn.Conv1d(config.features * NUM_LEADS, config.pooled // 2, 1)
        self.linear = nn.Linear(config.pooled, config.z_dim) if config.final_linear else None

    def features(self, ecg: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the features of beats (B, 12, T) that the attentions take: (B, C, 12, M)."""
        x = self.input_conv(ecg)
        if self.config.lead_layout == "correct":
            x = rearrange(x, "b (l f) t -> b f l t", l=NUM_LEADS)  # the grouped convolution makes channel l * F + f
        else:
            x = rearrange(x, "b (f l) t -> b f l t", l=NUM_LEADS)
        return self.encoder(_channels_last(x), present)

    def pool(self, x: Tensor) -> Tensor:
        """Return the pooled features (B, pooled_dim) of attended ones (B, C, 12, M)."""
        x = rearrange(x, "b c l m -> b (c l) m")
        return torch.cat((self.mean_head(x.mean(-1, keepdim=True)).squeeze(-1), self.max_head(x).amax(-1)), dim=1)

    def forward(self, ecg: Tensor, present: Tensor | None = None) -> Tensor:
        pooled = self.pool(self.attention(self.features(ecg, present)))
        return pooled if self.linear is None else self.linear(pooled)


class EcgDecoder(nn.Module):
    """Decode codes (B, z_dim) to beats (B, 12, T), of z-scored leads with mean 0 and, once learned, variance 1."""

    def __init__(self, config: EcgAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, instants = config.base_dim, config.instants
        # two linear maps in a row, as published: together a single one of low rank
        self.linear = nn.Sequential(
            nn.Linear(config.z_dim, dim * instants), nn.Linear(dim * instants, dim * NUM_LEADS * instants)
        )
        self.decoder = BlockSequence(
            *(UpBlock(dim, dim, upsample=True) for _ in range(config.downsample)), UpBlock(dim, 1, upsample=False)
        )
        self.final_conv = nn.Sequential(
            nn.Conv1d(NUM_LEADS, NUM_LEADS, 1, groups=NUM_LEADS),
            nn.InstanceNorm1d(NUM_LEADS) if config.lead_scaling == "zscore" else nn.Identity(),
        )

    def forward(self, code: Tensor, present: Tensor | None = None) -> Tensor:
        x = self.linear(code).unflatten(1, (self.config.base_dim, NUM_LEADS, self.config.instants))
        return self.final_conv(self.decoder(_channels_last(x), present).squeeze(1))


class EcgAutoencoder(Pretrained, nn.Module):
    """Reconstruct median beats (B, 12, T) from codes (B, z_dim).

    Beats are scaled as the configuration's ``lead_scaling`` says, leads in the order I, II, III, aVR, aVL, aVF, V1 to
    V6; a lead of zeros is one without a signal.

    Attributes:
        encoder: the `EcgEncoder`.
        decoder: the `EcgDecoder`.

    Source: the dual-attention ECG autoencoder that TAFF-UNet builds on.
    """

    architecture: ClassVar[str] = "ecg_autoencoder"
    config_type: ClassVar[type] = EcgAutoencoderConfig

    def __init__(self, config: EcgAutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = EcgAutoencoderConfig() if config is None else config
        self.encoder = EcgEncoder(self.config)
        self.decoder = EcgDecoder(self.config)
        self.reset_parameters(weights_generator(self.config.init_seed))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: evenly from +-1 / sqrt(fan-in), as PyTorch's own layers do."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.encoder.attention.reset_parameters(generator)

    def forward(self, ecg: Tensor) -> Tensor:
        """Return the reconstruction (B, 12, T) of beats (B, 12, T).

        Raises:
            ShapeError: not a batch of beats of twelve leads and the configured length.
        """
        return self.decode(self.encode(ecg))

    def encode(self, ecg: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the codes (B, z_dim) of beats (B, 12, T).

        Samples that are absent, where ``present`` (B,) is false, count in no statistics of a batch in training; what
        comes out for them means nothing.
        """
        return self.encoder(self.taken(ecg), present)

    def decode(self, code: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the beats (B, 12, T) of codes (B, z_dim); for ``present`` see `encode`.

        Raises:
            ShapeError: not a batch of codes of the configured width.
        """
        if code.dim() != 2 or code.shape[1] != self.config.z_dim:
            raise ShapeError(f"EcgAutoencoder: expected codes (B, {self.config.z_dim}), got {tuple(code.shape)}")
        return self.decoder(code, present)

    def attention(self, ecg: Tensor) -> EcgAttention:
        """Return the attention weights of beats: over leads (B, 12, 12), and in each lead over time (B, 12, M, M).

        They are averaged over heads, without dropout; M is T / 2 ** downsample. In training mode the batch's own
        statistics normalise the features, so call it in evaluation mode.
        """
        return self.encoder.attention.weights(self.encoder.features(self.taken(ecg)))

    def taken(self, ecg: Tensor) -> Tensor:
        """Return beats in the type of the weights: NumPy makes float64 of nearly everything.

        Raises:
            ShapeError: not a batch of beats of twelve leads and the configured length.
            TypeError: whole numbers, which are counts of a converter and not scaled.
        """
        steps = self.config.time_steps
        if not ecg.is_floating_point():
            advice = "scale them as network_ecg does"
            raise TypeError(f"EcgAutoencoder: expected beats of a floating-point type, got {ecg.dtype}; {advice}")
        if ecg.dim() == 3 and ecg.shape[1:] == (NUM_LEADS, steps):
            return ecg.to(dtype_of(self.encoder))
        message = f"EcgAutoencoder: expected beats of shape (B, {NUM_LEADS}, {steps}), got {tuple(ecg.shape)}"
        if ecg.dim() == 3 and ecg.shape[1] == NUM_LEADS and ecg.shape[2] < steps:
            message += f"; pad them with {_either_side(steps - ecg.shape[2])}"
        raise ShapeError(message)


def _convolved(block: Any, x: Tensor, present: Tensor | None) -> Tensor:
    x = F.leaky_relu(block.bn1(block.conv1(x), present), SLOPE)
    return F.leaky_relu(block.bn2(block.conv2(x), present), SLOPE)


def _channels_last(x: Tensor) -> Tensor:
    """The layout in which a CPU convolves few channels about twice as fast."""
    return x.contiguous(memory_format=torch.channels_last)


def _time_conv(in_dim: int, out_dim: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, (1, KERNEL), (1, stride), (0, KERNEL // 2), bias=False)


def _either_side(lacking: int) -> str:
    """Describe how ``lacking`` zeros are divided before and after a beat."""
    words = {1: "one zero", 4: "four zeros"}
    before, after = lacking // 2, lacking - lacking // 2
    if before == after:
        return f"{words.get(before, f'{before} zeros')} on either side"
    return f"{before} zeros before and {after} after"
