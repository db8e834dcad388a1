"""Which blocks of a network are selected: a fixed list, or those with the largest weights; and their maps.

Source: left-atrium segmentation with DINOv2, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from trifuse.kernels import weighted_block_fusion
from trifuse.kernels.library import values_at_hand

Order = Literal["depth", "weight"]
LAST4 = "last4"


def fixed_blocks(
    blocks: Sequence[int] | Literal["last4"] | None, num_blocks: int, index_base: int = 0
) -> tuple[int, ...] | None:
    """Return the 0-based indices of fixed blocks, in the order in which they are listed; None where they are learned.

    Args:
        blocks: block indices; ``"last4"`` for blocks N-1, N-2, N-3 and N-4; None for a learned selection.
        num_blocks: number of blocks N.
        index_base: the index of the first block in a list, 0 or 1.

    Raises:
        ValueError: another string, another base, or a block that does not exist.
    """
    if index_base not in (0, 1):
        raise ValueError(f"index_base must be 0 or 1, got {index_base}")
    if blocks is None:
        return None
    if isinstance(blocks, str):
        if blocks != LAST4:
            raise ValueError(
                f"blocks: expected a list of block indices such as [7, 5, 3, 1], 'last4', or None for a learned "
                f"selection, got {blocks!r}"
            )
        indices = tuple(num_blocks - 1 - i for i in range(4))
    else:
        indices = tuple(index - index_base for index in blocks)
    missing = [index for index in indices if not 0 <= index < num_blocks]
    if missing:
        raise ValueError(
            f"blocks {described(blocks)} asks for blocks {missing} (0-based), but there are only 0 to {num_blocks - 1}"
        )
    return indices


def described(blocks: Sequence[int] | str | None) -> str:
    """Return blocks as a message shows them: ``'last4'``, ``[7, 5, 3, 1]`` or None."""
    return repr(blocks) if blocks is None or isinstance(blocks, str) else str(list(blocks))


def heaviest_blocks(logits: Tensor, top_k: int, order: Order) -> Tensor:
    """Return the indices of the ``top_k`` largest logits, ties to the lower index: int64 of shape (k,).

    Args:
        logits: the blocks' logits, of shape (N,).
        top_k: number of selected blocks k.
        order: ``"depth"``, deepest block first, or ``"weight"``, largest logit first.
    """
    heaviest = torch.argsort(logits.detach(), descending=True, stable=True)[:top_k]
    return heaviest.sort(descending=True).values if order == "depth" else heaviest


class SelectedMaps:
    """The maps of the selected blocks, collected while the maps of all blocks are fused, or iterated over.

    Where the host can read the selection, they are the maps themselves. On a GPU, where reading would wait for the
    device, and where operations are recorded, they are copies, made by the same launches whatever the selection is:
    the fusion writes those that are selected; iterating writes each map to the position of its block in the selection,
    or to a spare position.

    Args:
        indices: the selected blocks, int64 of shape (k,).
        num_blocks: number of blocks N.
        fixed: the same blocks, where they are known without reading ``indices``.

    Attributes:
        known: the selected blocks; None where they cannot be read.
        indices: the same as a tensor of shape (k,).
    """

    def __init__(self, indices: Tensor, num_blocks: int, fixed: tuple[int, ...] | None = None) -> None:
        self.indices = indices
        self.known = tuple(indices.tolist()) if fixed is None and values_at_hand((indices,)) else fixed
        self._kept: dict[int, Tensor] = {}
        self._copies: Tensor | list[Tensor] | None = None
        self._num_blocks = num_blocks

    def fuse(self, maps: Sequence[Tensor] | Tensor, logits: Tensor) -> Tensor:
        """Fuse the maps (B, M, D) of all blocks by their logits (N,), and keep what is selected."""
        if self.known is not None:
            self._kept = {index: maps[index] for index in self.known}
            return weighted_block_fusion(maps, logits)
        fused, *self._copies = weighted_block_fusion(maps, logits, self.indices)
        return fused

    def collect_from(self, maps: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Yield every (block index, map (B, M, D)) unchanged, and keep what is selected."""
        for index, tokens in maps:
            self.collect(index, tokens)
            yield index, tokens
            del tokens  # or it would stay in memory while the next one is made

    def collect(self, index: int, tokens: Tensor) -> None:
        """Keep the map of a block if it is selected."""
        if self.known is None:
            self._copy(index, tokens)
        elif index in self.known:
            self._kept[index] = tokens

    def collected(self) -> list[Tensor]:
        """Return the selected maps in the order of the selection, once all maps have been fused or iterated over."""
        if self.known is not None:
            return [self._kept[index] for index in self.known]
        assert self._copies is not None
        return [self._copies[position] for position in range(len(self.indices))]

    def _copy(self, index: int, tokens: Tensor) -> None:
        top_k = len(self.indices)
        if self._copies is None:
            order = torch.arange(top_k, device=self.indices.device)
            self._positions = self.indices.new_full((self._num_blocks,), top_k).scatter(0, self.indices, order)
            self._copies = tokens.new_empty(top_k + 1, *tokens.shape)
        assert isinstance(self._copies, Tensor)
        self._copies.index_copy_(0, self._positions[index : index + 1], tokens.detach()[None])
