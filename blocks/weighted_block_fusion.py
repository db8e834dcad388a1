"""Weighted block fusion: learn how much each block of a frozen network matters, and which ones to look at closely."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trifuse.kernels import weighted_block_fusion
from trifuse.kernels.choices import check_choice
from trifuse.kernels.errors import ShapeError, TrifuseError
from trifuse.kernels.library import values_at_hand

INIT_STD = 0.01
Order = Literal["depth", "weight"]
_FIXED = re.compile(r"fixed:\[\s*\d+\s*(,\s*\d+\s*)*\]")


class WeightedBlockFusion(nn.Module):
    """Fuse the maps of N blocks by learned weights, and select the k blocks that matter most.

    ``w = softmax(logits)``; ``fused = sum_i w_i F_i``; the selection is the k largest weights, ties to the lower index,
    read off the logits each time it is asked for.

    Args:
        num_blocks: number of blocks N.
        top_k: number of selected blocks k.
        mode: ``"learned"``; or an ablation without logits: ``"last4"``, blocks N-1, N-2, N-3 and N-4, or a literal
            list such as ``"fixed:[7,5,3,1]"``. With fixed blocks nothing is fused, and the selected blocks share the
            weight equally.
        order: in which order learned blocks are selected: ``"depth"``, deepest first, or ``"weight"``, heaviest first.
            A fixed list is taken in the order in which it is written.
        index_base: what the first block is called in a fixed list, 0 or 1.

    Attributes:
        logits: parameter of shape (N,), None with fixed blocks.
        frozen_selection: buffer of shape (k,): the selection once it is frozen, -1 as long as it is free.

    Source: left-atrium segmentation with DINOv2, Eqs. 1-2.
    """

    frozen_selection: Tensor

    def __init__(
        self, num_blocks: int, top_k: int = 4, mode: str = "learned", order: str = "depth", index_base: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_blocks:
            raise ValueError(f"WeightedBlockFusion: top_k must be from 1 to the {num_blocks} blocks, got {top_k}")
        check_choice("WeightedBlockFusion: order", order, Order)
        self.num_blocks, self.top_k, self.mode, self.order = num_blocks, top_k, mode, order
        fixed = fixed_blocks(mode, num_blocks, index_base)
        if fixed is not None and len(fixed) != top_k:
            raise ValueError(f"WeightedBlockFusion: mode {mode!r} selects {len(fixed)} blocks, but top_k is {top_k}")
        self._fixed = None if fixed is None else tuple(fixed)  # known without the buffer: on meta, or while exporting
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
        """`selected` as a tensor, int64 of shape (k,), which a GPU need not be waited for."""
        if self.logits is None:
            return self.frozen_selection
        heaviest = torch.argsort(self.logits.detach(), descending=True, stable=True)[: self.top_k]
        if self.order == "depth":
            heaviest = heaviest.sort(descending=True).values
        return torch.where(self.frozen_selection >= 0, self.frozen_selection, heaviest)

    def freeze_selection(self) -> None:
        """Keep the present selection from now on, whatever the logits become; saved with the weights."""
        self.frozen_selection.copy_(torch.tensor(self.selected))

    def forward(self, features: Sequence[Tensor] | Tensor) -> Tensor:
        """Fuse N maps of shape (B, M, D), a list or stacked, into one of shape (B, M, D)."""
        return weighted_block_fusion(features, self._learned_logits())

    def stream(
        self,
        maps: Iterable[tuple[int, Tensor]],
        keep: Collection[int],
        weight: Tensor | None,
        recompute: Callable[[], Iterable[tuple[int, Tensor]]] | None = None,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Fuse maps as they are produced, and keep only a few of them.

        Gives what ``linear(self(all_maps), weight)`` gives, and the same gradients of the logits and of the weight.
        Where the logits need a gradient, each map's projection stays in memory instead of the map, unless ``recompute``
        can bring the maps back.

        Args:
            maps: (block index, map (B, M, D)), frozen; each map is let go before the next one is asked for.
            keep: the blocks whose maps are wanted afterwards.
            weight: (r, D), of the linear layer without bias that consumes the fused map; None fuses nothing.
            recompute: produces the same maps again, in backward: nothing is kept for the logits' gradient then.

        Returns:
            The kept maps by block index, and the projected fused map (B, M, r), None without a weight.
        """
        if weight is None:
            return {index: tokens for index, tokens in maps if index in keep}, None
        logits = self._learned_logits()
        kept: dict[int, Tensor] = {}
        block_weights = self.weights.detach()
        fused: Tensor | None = None
        projections: list[Tensor] = []
        count = 0
        needs_gradient = torch.is_grad_enabled() and logits.requires_grad
        with torch.no_grad():
            for index, tokens in maps:
                if fused is None:
                    dtype = tokens.dtype
                    fused = torch.zeros_like(tokens, dtype=torch.promote_types(dtype, torch.float32))
                fused.addcmul_(tokens, block_weights[index])
                if needs_gradient and recompute is None:
                    projected = _project(tokens, weight)
                    projections.append(projected.to(min(projected.dtype, dtype, key=lambda narrow: narrow.itemsize)))
                if index in keep:
                    kept[index] = tokens
                del tokens  # or it would stay in memory while the next one is made
                count += 1
        if fused is None or count != self.num_blocks:
            raise ShapeError(f"WeightedBlockFusion: expected the maps of all {self.num_blocks} blocks, got {count}")
        fused = fused.to(dtype)
        if needs_gradient:
            return kept, _FuseThenProject.apply(logits, weight, fused, recompute, *projections)
        return kept, _project(fused, weight)

    def _learned_logits(self) -> Tensor:
        if self.logits is None:
            raise TrifuseError(f"WeightedBlockFusion: mode {self.mode!r} has no weights to fuse with; use 'learned'")
        return self.logits

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, top_k={self.top_k}, mode={self.mode!r}, order={self.order!r}"


class SelectedMaps:
    """The maps of the selected blocks, gathered while the blocks' maps pass by.

    They are the maps themselves where the selection can be looked at. On a GPU, which would have to be waited for, and
    where operations are recorded, they are copies: each map is written to the place of its block in the selection, or
    to a place beside them, so that the same launches serve every selection.

    Args:
        fusion: selects.

    Attributes:
        known: the selected blocks; None where they cannot be looked at.
        indices: the same as a tensor of shape (k,).
    """

    def __init__(self, fusion: WeightedBlockFusion) -> None:
        self.indices = fusion.selection
        fixed = fusion.logits is None
        self.known = fusion.selected if fixed or values_at_hand((self.indices,)) else None
        self._kept: dict[int, Tensor] = {}
        self._copies: Tensor | None = None
        if self.known is None:
            places = self.indices.new_full((fusion.num_blocks,), fusion.top_k)
            order = torch.arange(fusion.top_k, device=places.device)
            self._places = places.scatter(0, self.indices, order)

    def passing(self, maps: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Yield (block index, map (B, M, D)) as they come, and keep what is selected."""
        for index, tokens in maps:
            if self.known is None:
                self._copy(index, tokens)
            elif index in self.known:
                self._kept[index] = tokens
            yield index, tokens
            del tokens  # or it would stay in memory while the next one is made

    def gathered(self) -> list[Tensor]:
        """Return the selected maps, in the order of the selection, once all maps have passed."""
        if self.known is not None:
            return [self._kept[index] for index in self.known]
        assert self._copies is not None
        return list(self._copies[:-1].unbind())

    def _copy(self, index: int, tokens: Tensor) -> None:
        if self._copies is None:
            self._copies = tokens.new_empty(len(self.indices) + 1, *tokens.shape)
        self._copies.index_copy_(0, self._places[index : index + 1], tokens.detach()[None])


class _FuseThenProject(torch.autograd.Function):
    """Project a fused map, ``y = f W^T`` with ``f = sum_i w_i F_i``, ``w = softmax(logits)``, the maps F_i being gone.

    With g the gradient of y, that of f is ``g W``. Its product with a map is the product of g with the map's
    projection, ``<g W, F_i> = <g, F_i W^T> = <g, P_i>``, so the projections are all that backward needs:

        d logits_i = w_i (s_i - sum_j w_j s_j),  s_i = <g, P_i>
        d W        = g^T f

    Where ``recompute`` brings the maps back there are no projections, and s_i is ``<g W, F_i>`` itself.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, weight: Tensor, fused: Tensor, recompute, *projections: Tensor) -> Tensor:
        ctx.save_for_backward(logits, weight, fused, *projections)
        ctx.recompute, ctx.autocast = recompute, _autocast_state(fused.device.type)
        return _project(fused, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight, fused, *projections = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        if ctx.recompute is None:
            products = _products(grad.to(dtype), projections)
        else:
            fused_grad = grad.to(dtype) @ weight.to(dtype)
            with nullcontext() if ctx.autocast is None else torch.autocast(grad.device.type, **ctx.autocast):
                products = _products(fused_grad, (tokens for _, tokens in ctx.recompute()))
        w = torch.softmax(logits.to(dtype), dim=0)
        logits_grad = (w * (products - w.dot(products))).to(logits.dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad.flatten(0, 1).T @ fused.flatten(0, 1).to(grad.dtype)).to(weight.dtype)
        return logits_grad, weight_grad, None, None, *(None for _ in projections)


def _products(grad: Tensor, maps: Iterable[Tensor]) -> Tensor:
    """The inner product of a gradient with each map: shape (N,)."""
    flat = grad.reshape(-1)
    return torch.stack([torch.dot(flat, tokens.reshape(-1).to(grad.dtype)) for tokens in maps])


def _autocast_state(device_type: str) -> dict[str, Any] | None:
    """What autocast does on a device; None where there is none, as where only shapes are worked out."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return {"enabled": torch.is_autocast_enabled(device_type), "dtype": torch.get_autocast_dtype(device_type)}


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer to tokens (B, M, D) of any type, in the type of its weight (or of autocast)."""
    return F.linear(tokens.to(weight.dtype), weight)


def fixed_blocks(mode: str, num_blocks: int, index_base: int = 0) -> list[int] | None:
    """Return the 0-based blocks that a mode of `WeightedBlockFusion` names, None where they are learned."""
    if index_base not in (0, 1):
        raise ValueError(f"index_base must be 0 or 1, got {index_base}")
    if mode == "learned":
        return None
    if mode == "last4":
        blocks = [num_blocks - 1 - i for i in range(4)]
    elif _FIXED.fullmatch(mode):
        blocks = [int(index) - index_base for index in re.findall(r"\d+", mode)]
    else:
        raise ValueError(f"unknown mode {mode!r}; use 'learned', 'last4' or a list such as 'fixed:[7,5,3,1]'")
    missing = [index for index in blocks if not 0 <= index < num_blocks]
    if missing:
        raise ValueError(f"mode {mode!r} asks for blocks {missing} (0-based), but there are only 0 to {num_blocks - 1}")
    return blocks
