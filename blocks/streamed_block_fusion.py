"""Weighted block fusion of maps that are produced one after the other, without keeping all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels.differentiation import once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.library import autocast_available


def fuse_streamed(
    maps: Iterable[tuple[int, Tensor]],
    keep: Collection[int],
    logits: Tensor,
    weight: Tensor,
    recompute: Callable[[], Iterable[tuple[int, Tensor]]] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Fuse maps as they are produced, project the fused map, and keep only a few of the maps.

    Computes ``linear(sum_i softmax(logits)_i F_i, weight)`` and the same gradients of the logits and of the weight as
    if all maps were kept. Where the logits need a gradient, each map's projection stays in memory instead of the map,
    unless ``recompute`` can produce the maps again.

    Args:
        maps: (block index, map (B, M, D)), frozen; each map is released before the next one is asked for.
        keep: the blocks whose maps are wanted afterwards.
        logits: (N,), a logit for each block.
        weight: (r, D), of the linear layer without bias that consumes the fused map.
        recompute: produces the same maps again, in backward: nothing is kept for the logits' gradient then.

    Returns:
        The kept maps by block index, and the projected fused map (B, M, r).

    Raises:
        ShapeError: not as many maps as there are logits.
    """
    kept: dict[int, Tensor] = {}
    fused: Tensor | None = None
    projections: list[Tensor] = []
    count = 0
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad():
        block_weights = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=0)
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
    if fused is None or count != len(logits):
        raise ShapeError(f"WeightedBlockFusion: expected the maps of all {len(logits)} blocks, got {count}")
    fused = fused.to(dtype)
    if needs_gradient:
        return kept, _FuseThenProject.apply(logits, weight, fused, recompute, *projections)
    return kept, _project(fused, weight)


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
    """Return the state of autocast for a device; None where there is none, as on the meta device."""
    if not autocast_available(device_type):
        return None
    return {"enabled": torch.is_autocast_enabled(device_type), "dtype": torch.get_autocast_dtype(device_type)}


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer to tokens (B, M, D) of any type, in the type of its weight (or of autocast)."""
    return F.linear(tokens.to(weight.dtype), weight)
