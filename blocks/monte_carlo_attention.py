"""Monte Carlo attention: channels weighed by a squeeze-and-excitation gate that looks at one randomly drawn cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import channel_gate, monte_carlo_pool

from .conv_norm_relu import init_convs

GATES = ("se", "none")
DRAWS = ("batch", "sample")
LEAST_HIDDEN = 32


class MonteCarloAttention(nn.Module):
    """Weigh the channels of a map by what one randomly drawn cell of it holds: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        scales: Sequence[int] = (1, 2, 3),
        gate: str = "se",
        draw: str = "batch",
        order_shuffle: bool = True,
        scale_probs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.scales, self.gate, self.draw, self.order_shuffle = dim, tuple(scales), gate, draw, order_shuffle
        self.scale_probs = tuple(scale_probs) if scale_probs is not None else (1 / len(self.scales),) * len(self.scales)
        if gate == "se":
            self.squeeze = nn.Conv2d(dim, hidden_width(dim), 1)
            self.excite = nn.Conv2d(hidden_width(dim), dim, 1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both weights from He's normal distribution over the fan-out, and set the biases to zero."""
        init_convs(self, generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        scale: int | Tensor = 1
        cell: int | Tensor = 0
        permutation = None
        if self.training:
            device = x.device if generator is None else generator.device
            u, v = torch.rand((2,), dtype=torch.float64, generator=generator, device=device)
            edge = 0.0
            scale = torch.full_like(u, self.scales[0], dtype=torch.int64)
            for k, following, probability in zip(self.scales, self.scales[1:], self.scale_probs, strict=False):
                edge += probability
                scale = scale + (u >= edge) * (following - k)
            cell = (v * scale.square()).long()
            if self.order_shuffle:
                permutation = torch.randperm(x.shape[2] * x.shape[3], generator=generator, device=device)
        pooled = monte_carlo_pool(x, scale=scale, cell=cell, permutation=permutation)
        if self.gate == "none":
            return x * pooled[:, :, None, None]
        hidden = torch.relu(F.linear(pooled, self.squeeze.weight.flatten(1), self.squeeze.bias))
        return channel_gate(x, F.linear(hidden, self.excite.weight.flatten(1), self.excite.bias))

    def extra_repr(self) -> str:
        return f"scales={self.scales}, gate={self.gate!r}, draw={self.draw!r}, order_shuffle={self.order_shuffle}"


def hidden_width(dim: int) -> int:
    """Return the hidden channels of the gate: a quarter of ``dim`` as a multiple of 8, at least 32."""
    width = dim // 4
    rounded = max(8, (width + 4) // 8 * 8)
    return max(LEAST_HIDDEN, rounded + 8 if rounded < 0.9 * width else rounded)
