"""Context-aware fusion: two maps of one scene, weighed by channel and by position, become one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import ShapeError, spatial_gate
from trifuse.kernels.choices import check_choice
from trifuse.kernels.ops._context_aware_fusion import mean_projection, pooled_projection, recalibrated_sum

from .conv_norm_relu import init_convs
from .image_input import check_map
from .normalization import RunningNorm
from .plain_layers import dtype_of, is_plain, pointwise

SpatialPool = Literal["channel", "local3", "none"]
ChannelWeights = Literal["normalised", "literal"]


class ContextAwareFusion(nn.Module):
    """Fuse a global map F1 and a local map F2: two of (B, C, H, W) -> (B, C, H, W).

    With X = cat(F1, F2), 2C channels:

        U    = pre(X)                                                1x1
        w_ch = sigmoid(channel(N(cat(mean of U, maximum of U))))     (B, 2C), over all positions
        F'   = reduce(w_ch * X)                                      1x1
        T    = spatial_global(F1) + spatial_local(F2)                1x1
        w_sp = sigmoid(spatial(mean of T over its channels))         (B, 1, H, W)
        out  = w_sp * F'

    The result is the same as these lines give, in fewer passes: neither X nor T is made, and X is never scaled (see
    `trifuse.kernels.ops._context_aware_fusion`). Under ``backend("reference")`` it is computed as written, and so is
    each line whose layer is not plain any more (see `is_plain`).
    The average over all positions is taken in float32. Maps of one position are legal.

    N normalises over the images of training (`RunningNorm`), and ``channel`` starts at zero: every channel weight is
    1/2 at first, and then depends on how an image's pooled channels differ from other images'. As the equations are
    written, without N and with random weights, maxima over thousands of positions saturate the sigmoid before training
    begins, and the weights end as a mask that is the same for every image.

    Args:
        dim: channels C of each map.
        channel_weights: ``"normalised"``, as above; ``"literal"``: as the equations are written, N left out and
            ``channel`` drawn at random. The parameters are the same.
        spatial_pool: how T becomes the gate's map: ``"channel"``, the mean over channels; ``"local3"``, the mean of
            3x3 neighbours inside the map, all channels kept; ``"none"``, T has one channel and is the gate.
        spatial_kernel: side of the convolution that makes the gate; odd.
        max_pool: whether the channels' weight sees the maxima of U as well.
        pre_conv: whether U is a projection of X, or X itself.

    Raises:
        ValueError: unknown ``channel_weights`` or ``spatial_pool``, or an even ``spatial_kernel``.

    Source: FIAS, equations 3 to 6. In equation 5 the pooling is over channels, since one over positions would leave no
    map for equation 6.
    """

    def __init__(
        self,
        dim: int,
        spatial_pool: str = "channel",
        spatial_kernel: int = 7,
        max_pool: bool = True,
        pre_conv: bool = True,
        channel_weights: str = "normalised",
    ) -> None:
        super().__init__()
        check_choice("ContextAwareFusion: channel_weights", channel_weights, ChannelWeights)
        check_choice("ContextAwareFusion: spatial_pool", spatial_pool, SpatialPool)
        if spatial_kernel % 2 != 1:
            raise ValueError(f"ContextAwareFusion: spatial_kernel must be odd, got {spatial_kernel}")
        self.dim, self.spatial_pool, self.max_pool = dim, spatial_pool, max_pool
        self.channel_weights = channel_weights
        gate_only = spatial_pool == "none"
        self.pre = nn.Conv2d(2 * dim, 2 * dim, 1, bias=False) if pre_conv else None
        pooled = (4 if max_pool else 2) * dim
        self.norm = RunningNorm(pooled) if channel_weights == "normalised" else None
        self.channel = nn.Conv2d(pooled, 2 * dim, 1)
        self.reduce = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.spatial_global = nn.Conv2d(dim, 1 if gate_only else dim, 1, bias=gate_only)
        self.spatial_local = nn.Conv2d(dim, 1 if gate_only else dim, 1, bias=False)
        self.spatial: nn.Conv2d | None = None
        if not gate_only:
            channels = 1 if spatial_pool == "channel" else dim
            self.spatial = nn.Conv2d(channels, 1, spatial_kernel, padding=spatial_kernel // 2)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from He's normal distribution over the fan-out; biases 0, and 0 for normalised channels."""
        init_convs(self, generator)
        if self.norm is not None:
            self.norm.reset_statistics()
            nn.init.zeros_(self.channel.weight)

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """Fuse two maps.

        Raises:
            ShapeError: a map that is not (B, C, H, W), or maps of different shapes, naming the branch.
        """
        check_map("ContextAwareFusion", "global_features", global_features, self.dim)
        check_map("ContextAwareFusion", "local_features", local_features, self.dim)
        if local_features.shape != global_features.shape:
            raise ShapeError(
                f"ContextAwareFusion: local_features has shape {tuple(local_features.shape)}; expected "
                f"{tuple(global_features.shape)}, the shape of global_features; bring both branches to one size first"
            )
        scale = torch.sigmoid(self.channel_logits(global_features, local_features))
        fused = self._recalibrated(global_features, local_features, scale)
        return spatial_gate(fused, self.spatial_logits(global_features, local_features))

    def _recalibrated(self, global_features: Tensor, local_features: Tensor, scale: Tensor) -> Tensor:
        if is_plain(self.reduce):
            return recalibrated_sum(global_features, local_features, self.reduce.weight, scale)
        joined = torch.cat([global_features, local_features], dim=1)
        fused: Tensor = self.reduce(joined * scale.to(joined.dtype)[:, :, None, None])
        return fused

    def channel_logits(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """Return the weights of the 2C channels before the sigmoid: (B, 2C)."""
        maps, weight = (global_features, local_features), None
        if self.pre is not None and is_plain(self.pre):
            weight = self.pre.weight
        elif self.pre is not None:
            maps = self.pre(torch.cat(maps, dim=1)).chunk(2, dim=1)
        pooled = pooled_projection(*maps, weight, self.max_pool)
        if self.norm is not None:
            pooled = self.norm(pooled)
        return pointwise(self.channel, pooled.to(dtype_of(self.channel)))

    def spatial_logits(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """Return the weights of the positions before the sigmoid: (B, 1, H, W)."""
        if self.spatial_pool != "local3" and is_plain(self.spatial_global, self.spatial_local):
            weights = self.spatial_global.weight, self.spatial_local.weight
            gate = mean_projection(global_features, local_features, *weights)
            gate = gate if self.spatial_global.bias is None else gate + self.spatial_global.bias
        else:
            total = self.spatial_global(global_features) + self.spatial_local(local_features)
            if self.spatial_pool == "local3":
                gate = F.avg_pool2d(total, 3, stride=1, padding=1, count_include_pad=False)
            else:
                gate = total.mean(1, keepdim=True)
        return gate if self.spatial is None else self.spatial(gate)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, spatial_pool={self.spatial_pool!r}, max_pool={self.max_pool}, "
            f"channel_weights={self.channel_weights!r}"
        )
