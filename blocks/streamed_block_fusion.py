"""Weighted block fusion of maps that are produced one after the other, without keeping all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.library import autocast_available

Receive = Callable[[int, Tensor], None]


class StreamedFusion:
    """Fuses maps as they are produced, projects the fused map, and keeps only a few of the maps.

    Computes ``linear(sum_i softmax(logits)_i F_i, weight)`` and the same gradients of the logits and of the weight as
    if all maps were kept. Where the logits need a gradient, each map's projection stays in memory instead of the map,
    unless ``recompute`` can produce the maps again.

    Args:
        keep: the blocks whose maps are wanted afterwards.
        logits: (N,), a logit for each block.
        weight: (r, D), of the linear layer without bias that consumes the fused map; None fuses nothing.
        recompute: calls its argument with each block index and the same map again, in backward: nothing is kept for
            the logits' gradient then.
    """

    def __init__(
        self,
        keep: Collection[int],
        logits: Tensor | None,
        weight: Tensor | None,
        recompute: Callable[[Receive], None] | None = None,
    ) -> None:
        self._keep, self._logits, self._weight, self._recompute = keep, logits, weight, recompute
        self._kept: dict[int, Tensor] = {}
        self._fused: Tensor | None = None
        self._projections: list[Tensor] = []
        self._count = 0
        self._needs_gradient = logits is not None and torch.is_grad_enabled() and logits.requires_grad
        self._keeps_projections = self._needs_gradient and recompute is None
        if logits is not None:
            with torch.no_grad():
                wide = torch.promote_types(logits.dtype, torch.float32)
                self._block_weights = torch.softmax(logits.to(wide), dim=0)

    def add(self, index: int, tokens: Tensor) -> None:
        """Take the map of one block, (B, M, D) or (B, D, h, w), frozen; it is kept only if its block is to be."""
        with torch.no_grad():  # as a decorator, a compiler would not see through it
            if tokens.ndim == 4:
                tokens = tokens.flatten(2).mT
            if index in self._keep:
                self._kept[index] = tokens
            if self._weight is not None:
                self._accumulate(index, tokens, self._weight)

    def _accumulate(self, index: int, tokens: Tensor, weight: Tensor) -> None:
        if self._fused is None:
            self._dtype = tokens.dtype
            self._fused = torch.zeros_like(tokens, dtype=torch.promote_types(self._dtype, torch.float32))
        self._fused.addcmul_(tokens, self._block_weights[index])
        if self._keeps_projections:
            projected = _project(tokens, weight)
            narrow = min(projected.dtype, self._dtype, key=lambda dtype: dtype.itemsize)
            self._projections.append(projected.to(narrow))
        self._count += 1

    def result(self) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the kept maps (B, M, D) by block index, and the projected fused map (B, M, r), None without a weight.

        Raises:
            ShapeError: not as many maps were added as there are logits.
        """
        if self._weight is None or self._logits is None:
            return self._kept, None
        if self._fused is None or self._count != len(self._logits):
            raise ShapeError(
                f"WeightedBlockFusion: expected the maps of all {len(self._logits)} blocks, got {self._count}"
            )
        fused = self._fused.to(self._dtype)
        if self._needs_gradient:
            projected = _FuseThenProject.apply(self._logits, self._weight, fused, self._recompute, *self._projections)
            return self._kept, projected
        return self._kept, _project(fused, self._weight)


def hand_out(maps: Iterable[tuple[int, Tensor]], receive: Receive) -> None:
    """Call ``receive`` with each block index and map, releasing the map before the next one is asked for."""
    for index, tokens in maps:
        receive(index, tokens)
        del tokens  # or it would stay in memory while the next one is made


def hand_out_anew(produce: Callable[[], Iterable[tuple[int, Tensor]]], receive: Receive) -> None:
    """Call ``receive`` as `hand_out` does, with maps that are produced for it."""
    hand_out(produce(), receive)


class _FuseThenProject(Function):
    """Project a fused map, ``y = f W^T`` with ``f = sum_i w_i F_i``, ``w = softmax(logits)``, the maps F_i being gone.

    With g the gradient of y, that of f is ``g W``. Its product with a map is the product of g with the map's
    projection, ``<g W, F_i> = <g, F_i W^T> = <g, P_i>``, so the projections are all that backward needs:

        d logits_i = w_i (s_i - sum_j w_j s_j),  s_i = <g, P_i>
        d W        = g^T f

    Where ``recompute`` brings the maps back there are no projections, and s_i is ``<g W, F_i>`` itself.
    """

    @staticmethod
    def forward(
        ctx: ForwardContext,
        logits: Tensor,
        weight: Tensor,
        fused: Tensor,
        recompute: Callable[[Receive], None] | None,
        *projections: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits, weight, fused, *projections)
        ctx.recompute, ctx.autocast = recompute, _autocast_state(fused.device.type)
        return _project(fused, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight, fused, *projections = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        if ctx.recompute is None:
            products = _products(grad.to(dtype), projections)
        else:
            fused_grad = grad.to(dtype) @ weight.to(dtype)
            with nullcontext() if ctx.autocast is None else torch.autocast(grad.device.type, **ctx.autocast):
                products = _products_of(fused_grad, ctx.recompute)
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


def _products_of(grad: Tensor, produce: Callable[[Receive], None]) -> Tensor:
    """The same of maps that are produced, one after the other, (B, M, D) or (B, D, h, w)."""
    products: list[Tensor] = []

    def multiply(index: int, tokens: Tensor) -> None:
        tokens = tokens.flatten(2).mT if tokens.ndim == 4 else tokens
        products.append(_products(grad, [tokens])[0])

    produce(multiply)
    return torch.stack(products)


def _autocast_state(device_type: str) -> dict[str, Any] | None:
    """Return the state of autocast for a device; None where there is none, as on the meta device."""
    if not autocast_available(device_type):
        return None
    return {"enabled": torch.is_autocast_enabled(device_type), "dtype": torch.get_autocast_dtype(device_type)}


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer to tokens (B, M, D) of any type, in the type of its weight (or of autocast)."""
    return F.linear(tokens.to(weight.dtype), weight)
