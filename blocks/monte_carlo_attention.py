"""Monte Carlo attention: channels weighed by a gate that, in training, looks at one randomly drawn cell of the map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trifuse.kernels import TrifuseError, channel_gate, monte_carlo_pool
from trifuse.kernels.choices import check_choice
from trifuse.kernels.torch_internals import inside_backward

from .conv_norm_relu import init_convs
from .image_input import check_map
from .plain_layers import pointwise

Gate = Literal["se", "none"]
Draw = Literal["batch", "sample"]
LEAST_HIDDEN = 32


class MonteCarloAttention(nn.Module):
    """Weigh the channels of a map by a pooled descriptor of it: (B, C, H, W) -> (B, C, H, W).

    In training the descriptor is the mean over one cell of a k x k adaptive grid: k is drawn from ``scales``, exactly
    one of them, the cell evenly from the k * k, and before that, with ``order_shuffle``, all positions are permuted. So
    the descriptor is a noisy global mean. In evaluation it is the global mean itself, and nothing is drawn.

    The draw comes from PyTorch's default generator of the map's device, or from the one that forward is given. Under
    activation checkpointing use the default generator, whose state checkpointing restores: the second pass then repeats
    the draw of the first. It cannot restore another one, so a generator that is given is refused there. Use the default
    generator in `torch.compile` and in a CUDA graph, too: nothing in the draw waits for the device, and every replay of
    a recorded graph draws anew.

    Args:
        dim: channels C.
        scales: the sides k that are drawn from.
        gate: ``"se"``: ``x * sigmoid(excite(relu(squeeze(descriptor))))``; ``"none"``: ``x * descriptor``.
        draw: ``"batch"``: all samples share a draw; ``"sample"``: each has its own.
        order_shuffle: whether positions are permuted before they are pooled.
        scale_probs: the probability of each scale; equal ones if not given.

    Raises:
        ValueError: an unknown gate or draw, a scale below 1, or probabilities that do not fit the scales or do not add
            up to 1.

    Source: FIAS, equations 9 and 10, with the gate of SvANet's Monte Carlo attention, which they cite.
    """

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
        even = (1 / max(1, len(self.scales)),) * len(self.scales)
        self.scale_probs = even if scale_probs is None else tuple(scale_probs)
        self._check_options()
        if gate == "se":
            self.squeeze = nn.Conv2d(dim, hidden_width(dim), 1)
            self.excite = nn.Conv2d(hidden_width(dim), dim, 1)
        self.reset_parameters()

    def _check_options(self) -> None:
        check_choice("MonteCarloAttention: gate", self.gate, Gate)
        check_choice("MonteCarloAttention: draw", self.draw, Draw)
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"MonteCarloAttention: scales must be whole numbers of at least 1, got {self.scales}")
        probs = self.scale_probs
        if len(probs) != len(self.scales) or min(probs) < 0 or not math.isclose(sum(probs), 1, rel_tol=1e-6):
            raise ValueError(
                f"MonteCarloAttention: scale_probs must be one probability for each of the scales {self.scales}, "
                f"adding up to 1, got {probs}"
            )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both weights from He's normal distribution over the fan-out, and set the biases to zero."""
        init_convs(self, generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Weigh the channels of x.

        Args:
            x: maps (B, C, H, W).
            generator: where the draw comes from in training; None is the default generator of the maps' device.

        Raises:
            ShapeError: x is not (B, C, H, W).
            TrifuseError: a generator is given while activation checkpointing repeats the pass.
        """
        check_map("MonteCarloAttention", "x", x, self.dim)
        if not self.training:
            descriptor = monte_carlo_pool(x, scale=1, cell=0)
        else:
            scale, cell, permutation = self.draw_cell(x, generator)
            descriptor = monte_carlo_pool(x, scale=scale, cell=cell, permutation=permutation)
        if self.gate == "none":
            return x * descriptor[:, :, None, None]
        return channel_gate(x, pointwise(self.excite, torch.relu(pointwise(self.squeeze, descriptor))))

    def draw_cell(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw what forward draws for maps x in training: arguments of `trifuse.kernels.monte_carlo_pool`.

        Returns:
            Scale and cell, int64 of shape (), or (B,) with a draw per sample, and the permutation, of shape (H * W,) or
            (B, H * W), None without order shuffle; on the device of x.
        """
        if generator is not None and inside_backward():
            raise TrifuseError(
                "MonteCarloAttention: activation checkpointing repeats this pass, but cannot repeat the draw of the "
                "generator that was given; pass no generator and seed the default one with torch.manual_seed"
            )
        device = x.device if generator is None else generator.device
        samples = () if self.draw == "batch" else (x.shape[0],)
        which_scale, which_cell = _evenly((2, *samples), generator, device)
        scale = torch.full_like(which_scale, self.scales[0], dtype=torch.int64)
        below = 0.0
        for previous, following, probability in zip(self.scales, self.scales[1:], self.scale_probs, strict=False):
            below += probability
            scale = scale + (which_scale >= below) * (following - previous)
        cells = scale.square()
        cell = torch.minimum((which_cell * cells).long(), cells - 1)
        permutation = None
        if self.order_shuffle:
            positions = x.shape[2] * x.shape[3]
            if samples:  # all at once: sorting distinct random numbers is a permutation for each sample
                permutation = _evenly((*samples, positions), generator, device).argsort(dim=1)
            else:
                permutation = torch.randperm(positions, generator=generator, device=device)
            permutation = permutation.to(x.device, non_blocking=True)
        return scale.to(x.device, non_blocking=True), cell.to(x.device, non_blocking=True), permutation

    def expected_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact mean and variance of the descriptor over the draw: (B, C, H, W) -> (B, C) twice.

        With order shuffle a cell of m of the N positions is a random subset, drawn without replacement: its mean has
        the global mean as its expectation, and the variance ``sigma^2 / m * (N - m) / (N - 1)``, where sigma^2 is the
        map's variance over its positions. Cells of one grid need not be equally large. Without, the descriptor is one
        of the cells' means. Both are mixed over scales and cells, in float32 or wider.
        """
        check_map("MonteCarloAttention", "x", x, self.dim)
        maps = x.to(torch.promote_types(x.dtype, torch.float32))
        grid = [(k, cell, p / k**2) for k, p in zip(self.scales, self.scale_probs, strict=True) for cell in range(k**2)]
        if not self.order_shuffle:
            weights = maps.new_tensor([probability for *_, probability in grid])[:, None, None]
            means = torch.stack([monte_carlo_pool(maps, scale=k, cell=cell) for k, cell, _ in grid])
            expected = (weights * means).sum(0)
            return expected, (weights * (means - expected).square()).sum(0)
        total = x.shape[2] * x.shape[3]
        sizes = [(_length(x.shape[2], k, cell // k) * _length(x.shape[3], k, cell % k), p) for k, cell, p in grid]
        factor = sum(p / m * (total - m) / max(1, total - 1) for m, p in sizes)
        return maps.mean((2, 3)), maps.var((2, 3), correction=0) * factor

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, scales={self.scales}, gate={self.gate!r}, draw={self.draw!r}, "
            f"order_shuffle={self.order_shuffle}"
        )


def _evenly(size: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """What `torch.rand` draws, whose form with a generator takes no size that a compiler leaves open."""
    return torch.empty(size, dtype=torch.float64, device=device).uniform_(generator=generator)


def hidden_width(dim: int) -> int:
    """Return the hidden channels of the gate: a quarter of ``dim`` as a multiple of 8, at least 32."""
    width = dim // 4
    rounded = max(8, (width + 4) // 8 * 8)
    return max(LEAST_HIDDEN, rounded + 8 if rounded < 0.9 * width else rounded)


def _length(length: int, scale: int, index: int) -> int:
    """Return how many of ``length`` positions lie in one interval of an adaptive grid."""
    return ((index + 1) * length + scale - 1) // scale - index * length // scale
