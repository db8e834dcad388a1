"""Weighted block fusion: learn how much each block of a frozen network matters, and select the blocks that matter most.

How the selected blocks are found is in `block_selection`, fusion without keeping all maps in `streamed_block_fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trifuse.kernels import weighted_block_fusion
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import TrifuseError

from .block_selection import Order, SelectedMaps, described, fixed_blocks, heaviest_blocks
from .streamed_block_fusion import Receive, StreamedFusion, hand_out, hand_out_anew

INIT_STD = 0.01


class WeightedBlockFusion(nn.Module):
    """Fuse the maps of N blocks by learned weights, and select the k blocks that matter most.

    ``w = softmax(logits)``; ``fused = sum_i w_i F_i``; the selection is the k largest weights, ties to the lower index,
    computed from the logits each time it is asked for.

    Args:
        num_blocks: number of blocks N.
        top_k: number of selected blocks k.
        blocks: None for a learned selection; or an ablation without logits: ``"last4"``, blocks N-1, N-2, N-3 and N-4,
            or a list of block indices such as ``(7, 5, 3, 1)``. With fixed blocks nothing is fused, and the selected
            blocks share the weight equally.
        order: in which order learned blocks are selected: ``"depth"``, deepest first, or ``"weight"``, heaviest first.
            A fixed list is taken in the order in which it is written.
        index_base: the index of the first block in a fixed list, 0 or 1.

    Attributes:
        logits: parameter of shape (N,), None with fixed blocks.
        frozen_selection: buffer of shape (k,): the selection once it is frozen, -1 as long as it is free.

    Source: left-atrium segmentation with DINOv2, Eqs. 1-2.
    """

    frozen_selection: Tensor

    def __init__(
        self,
        num_blocks: int,
        top_k: int = 4,
        blocks: Sequence[int] | Literal["last4"] | None = None,
        order: Order = "depth",
        index_base: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_blocks:
            raise ValueError(f"WeightedBlockFusion: top_k must be from 1 to the {num_blocks} blocks, got {top_k}")
        check_choice("WeightedBlockFusion: order", order, Order)
        self.num_blocks, self.top_k, self.blocks, self.order = num_blocks, top_k, blocks, order
        fixed = fixed_blocks(blocks, num_blocks, index_base)
        if fixed is not None and len(fixed) != top_k:
            raise ValueError(
                f"WeightedBlockFusion: blocks {described(blocks)} selects {len(fixed)} blocks, but top_k is {top_k}"
            )
        self._fixed = fixed  # known without the buffer: on meta, or while exporting
        self.logits = nn.Parameter(torch.empty(num_blocks)) if fixed is None else None
        self.register_buffer("frozen_selection", torch.tensor([-1] * top_k if fixed is None else fixed))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start near uniform: logits from a normal distribution of deviation 0.01."""
        if self.logits is not None:
            nn.init.normal_(self.logits, std=INIT_STD, generator=generator)

    @property
    def weights(self) -> Tensor:
        """The weight of each block: shape (N,), adding up to 1, differentiable, float32 or wider."""
        if self.logits is None:
            weights = torch.zeros(self.num_blocks, device=self.frozen_selection.device)
            return weights.index_fill(0, self.frozen_selection, 1 / self.top_k)
        return torch.softmax(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), dim=0)

    @property
    def selected(self) -> tuple[int, ...]:
        """The indices of the k selected blocks, in the order of the decoder's stages, coarsest first."""
        return tuple(self.selection.tolist()) if self._fixed is None else self._fixed

    @property
    def selection(self) -> Tensor:
        """`selected` as a tensor, int64 of shape (k,), computed without waiting for a GPU."""
        if self.logits is None:
            return self.frozen_selection
        heaviest = heaviest_blocks(self.logits, self.top_k, self.order)
        return torch.where(self.frozen_selection >= 0, self.frozen_selection, heaviest)

    def selected_maps(self) -> SelectedMaps:
        """Return a collector of the maps of the blocks that are selected now."""
        return SelectedMaps(self.selection, self.num_blocks, self._fixed)

    def freeze_selection(self) -> None:
        """Keep the present selection from now on, whatever the logits become; saved with the weights."""
        self.frozen_selection.copy_(torch.tensor(self.selected))

    def forward(self, features: Sequence[Tensor] | Tensor, selected: SelectedMaps | None = None) -> Tensor:
        """Fuse N maps of shape (B, M, D), a list or stacked, into one of that shape; or N maps of shape (B, D, h, w).

        ``selected``, from `selected_maps`, then has the maps of the selected blocks, at the cost of one more write of
        each at most.
        """
        logits = self._learned_logits()
        if len(features) and features[0].ndim == 4:  # channels come second: tokens are the same memory, seen otherwise
            fused = self([tokens.flatten(2).mT for tokens in features], selected)
            maps: Tensor = fused.mT.unflatten(-1, features[0].shape[2:])
            return maps
        return weighted_block_fusion(features, logits) if selected is None else selected.fuse(features, logits)

    def stream(
        self,
        maps: Iterable[tuple[int, Tensor]],
        keep: Collection[int],
        weight: Tensor | None,
        recompute: Callable[[], Iterable[tuple[int, Tensor]]] | None = None,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Compute ``linear(self(all_maps), weight)`` from maps as they are produced; see `streamed`.

        Args:
            maps: (block index, map (B, M, D)), frozen; each map is released before the next one is asked for.
            keep: the blocks whose maps are wanted afterwards.
            weight: (r, D), of the linear layer without bias that consumes the fused map; None fuses nothing.
            recompute: produces the same maps again, in backward.

        Returns:
            The kept maps by block index, and the projected fused map (B, M, r), None without a weight.
        """
        fusion = self.streamed(keep, weight, None if recompute is None else partial(hand_out_anew, recompute))
        hand_out(maps, fusion.add)
        return fusion.result()

    def streamed(
        self,
        keep: Collection[int],
        weight: Tensor | None,
        recompute: Callable[[Receive], None] | None = None,
    ) -> StreamedFusion:
        """Return what computes ``linear(self(all_maps), weight)`` from maps that are handed to its ``add``.

        For maps that are at hand only while the network that makes them runs, as in its hooks; see `StreamedFusion`.
        """
        return StreamedFusion(keep, None if weight is None else self._learned_logits(), weight, recompute)

    def _learned_logits(self) -> Tensor:
        if self.logits is None:
            raise TrifuseError(
                f"WeightedBlockFusion: the fixed blocks {described(self.blocks)} have no weights to fuse with; "
                "use blocks=None"
            )
        return self.logits

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, top_k={self.top_k}, blocks={self.blocks!r}, order={self.order!r}"
