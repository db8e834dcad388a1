"""The plain convolutional U-Net of nnU-Net in two dimensions: its encoder, its decoder, and how their size is planned.

Names of parameters are those of nnU-Net v2, whose weights load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trifuse.kernels.errors import ShapeError, TrifuseError

from .image_input import check_map
from .normalization import InstanceNorm
from .plain_layers import norm_leaky_relu

CONVS_PER_STAGE = 2
NEGATIVE_SLOPE = 0.01  # of the leaky rectifier, and what the initialisation counts on
_LEAST_EDGE = 4  # in pixels, of the coarsest map


def planned_stages(side: int) -> int:
    """Return how many stages suit images whose shorter side is ``side`` pixels: halve while both halves have 4 pixels.

    Source: Isensee et al., nnU-Net, Nature Methods 2021, supplement on the network's topology.
    """
    stages = 1
    while side >= 2 * _LEAST_EDGE:
        side = -(-side // 2)
        stages += 1
    return stages


def planned_features(stages: int, base_dim: int = 32, max_dim: int = 512) -> tuple[int, ...]:
    """Return the channels of each stage, finest first: doubled from stage to stage up to ``max_dim``."""
    return tuple(min(base_dim * 2**stage, max_dim) for stage in range(stages))


def check_sides(network: str, image: Tensor, stages: int) -> None:
    """Refuse images (B, C, H, W) that ``stages`` stages cannot halve without a remainder, or halve to a single pixel.

    Raises:
        ShapeError: with the sides to use instead.
    """
    step = 2 ** (stages - 1)
    height, width = image.shape[2:]
    if height % step or width % step or not (height and width):
        fitting = f"{max(-(-height // step), 1) * step} x {max(-(-width // step), 1) * step}"
        raise ShapeError(
            f"{network}: {stages} stages need sides that are multiples of {step}, got {height} x {width}; pad or "
            f"resize to {fitting}, or build the network with fewer stages"
        )
    if height == width == step:
        raise ShapeError(
            f"{network}: {stages} stages leave a single pixel of {height} x {width}, which cannot be normalised; use "
            f"{2 * step} x {2 * step} or more, or build the network with fewer stages"
        )


class ConvUnit(nn.Module):
    """Convolve 3x3, normalise each sample's channels, rectify: (B, in_dim, H, W) -> (B, out_dim, H', W').

    Args:
        in_dim: input channels.
        out_dim: output channels.
        stride: H' and W' are H and W divided by it, rounded up.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride, padding=1)
        self.norm = InstanceNorm(out_dim)

    def forward(self, x: Tensor, means: list[Tensor] | None = None) -> Tensor:
        """Apply the unit; ``means``, if given, is appended what its norm takes away.

        These are the means (B, C) of the convolution's map, in float32 or wider.
        """
        convolved = self.conv(x)
        if means is not None:
            means.append(convolved.mean((2, 3), dtype=torch.promote_types(convolved.dtype, torch.float32)))
        return norm_leaky_relu(self.norm, convolved, NEGATIVE_SLOPE)


class UnitSequence(nn.Sequential):
    """Run `ConvUnit`, or what holds some, one after the other; the last one's ``means`` are those of the sequence."""

    def forward(self, x: Tensor, means: list[Tensor] | None = None) -> Tensor:
        *before, last = self
        for unit in before:
            x = unit(x)
        out: Tensor = last(x) if means is None else last(x, means)
        return out


class ConvStack(nn.Module):
    """Two `ConvUnit`, the first of which takes the stride."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        units = [ConvUnit(in_dim, out_dim, stride)]
        units += [ConvUnit(out_dim, out_dim) for _ in range(CONVS_PER_STAGE - 1)]
        self.convs = UnitSequence(*units)

    def forward(self, x: Tensor, means: list[Tensor] | None = None) -> Tensor:
        out: Tensor = self.convs(x, means)
        return out


class PlainUNetEncoder(nn.Module):
    """Halve images stage by stage: (B, in_channels, H, W) -> maps (B, C_s, H / 2^s, W / 2^s), finest first.

    Args:
        in_channels: channels of the images.
        features: channels C_s of each stage, finest first.

    Attributes:
        stages: may also be called one by one, each on the map of the one before.

    Source: Isensee et al., nnU-Net, Nature Methods 2021.
    """

    def __init__(self, in_channels: int, features: Sequence[int]) -> None:
        super().__init__()
        self.in_channels, dims = in_channels, (in_channels, *features)
        self.stages = nn.ModuleList(
            UnitSequence(ConvStack(dims[stage], dims[stage + 1], stride=2 if stage else 1))
            for stage in range(len(features))
        )
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights from He's normal distribution for leaky rectifiers; biases are 0."""
        init_leaky_convs(self, generator)

    def forward(
        self, image: Tensor, fuse_at: int | None = None, fuse: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Return the map of each stage, finest first.

        Args:
            image: (B, in_channels, H, W).
            fuse_at: a stage, counted from 0, and
            fuse: what the next stage sees instead of its map: a function of that map, and of the means (B, C) that its
                last norm takes away. The list holds the map itself.

        Raises:
            ShapeError: not a batch of images, or not the declared channels.
            TrifuseError: a stage was replaced by one that tells no means, and means are asked for.
        """
        check_map("PlainUNetEncoder", "image", image, self.in_channels)
        maps, x = [], image
        for index, stage in enumerate(self.stages):
            if fuse is None or index != fuse_at:
                x = stage(x)
                maps.append(x)
            else:
                means: list[Tensor] = []
                maps.append(stage(x, means))
                x = fuse(maps[-1], _told_by(stage, index, means))
        return maps


def _told_by(stage: nn.Module, index: int, means: list[Tensor]) -> Tensor:
    if means:
        return means[-1]
    raise TrifuseError(
        f"PlainUNetEncoder: expected stage {index} to append the means that its last norm takes away, as a ConvUnit "
        f"does; a {type(stage).__name__} stands there and appended none; let it pass its second argument on to a "
        "ConvUnit, or change a layer inside the stage"
    )


class PlainUNetDecoder(nn.Module):
    """Turn the maps of a `PlainUNetEncoder`, finest first, into logits at all resolutions but the coarsest.

    Each stage upsamples by a learned transposed convolution, joins the encoder's map of that size behind it, and
    convolves twice; each has a head.

    Args:
        features: channels of the maps, finest first; at least two.
        num_classes: channels of the logits.

    Attributes:
        stages, transpconvs, seg_layers: in the order of running, coarsest first.

    Raises:
        ValueError: fewer than two maps.

    Source: Isensee et al., nnU-Net, Nature Methods 2021.
    """

    def __init__(self, features: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"PlainUNetDecoder: expected the channels of at least two maps, got {tuple(features)}")
        self.features = tuple(features)
        steps = list(zip(features[:0:-1], features[-2::-1], strict=True))  # (from, to), coarsest first
        self.stages = nn.ModuleList(ConvStack(2 * dim, dim) for _, dim in steps)
        self.transpconvs = nn.ModuleList(nn.ConvTranspose2d(below, dim, 2, stride=2) for below, dim in steps)
        self.seg_layers = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _, dim in steps)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights from He's normal distribution for leaky rectifiers; biases are 0."""
        init_leaky_convs(self, generator)

    def forward(self, skips: Sequence[Tensor], *, all_heads: bool = True) -> list[Tensor]:
        """Return logits (B, K, H / 2^i, W / 2^i), full resolution first.

        Args:
            skips: maps (B, C_s, H / 2^s, W / 2^s), finest first.
            all_heads: else only the last head is run, and the list has one element.

        Raises:
            ShapeError: the maps are not as many, as wide or as large as expected.
        """
        self._check(skips)
        x = skips[-1]
        logits: list[Tensor] = []
        for up, stage, head, skip in zip(self.transpconvs, self.stages, self.seg_layers, skips[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            if all_heads or skip is skips[0]:
                logits.insert(0, head(x))
        return logits

    def _check(self, skips: Sequence[Tensor]) -> None:
        got = [tuple(skip.shape) for skip in skips]
        coarsest = got[-1] if got else (0, 0, 1, 1)
        wanted = [
            (coarsest[0], dim, *(side * 2 ** (len(self.features) - 1 - stage) for side in coarsest[2:]))
            for stage, dim in enumerate(self.features)
        ]
        if got != wanted:
            raise ShapeError(f"PlainUNetDecoder: expected maps of shapes {wanted}, finest first, got {got}")


def init_leaky_convs(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise all convolutions in ``module``: He's normal distribution over the fan-in for leaky rectifiers, bias 0.

    Source: He et al., Delving Deep into Rectifiers, Eq. 10 and 12.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, a=NEGATIVE_SLOPE, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
