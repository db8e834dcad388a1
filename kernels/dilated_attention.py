"""Sliding-window dilated attention: each pixel attends to the k x k pixels around it, r pixels apart.

    s[t] = scale <q[y, x], key[t]>      t: the k * k taps, row by row; key[t] = k[y + dy r, x + dx r]
    p = softmax(s)
    out[y, x] = sum_t p[t] value[t]

Heads are dealt to the dilations in order: with G dilations, heads 0 .. num_heads / G - 1 use the first one, and so on.

Source: Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, Eqs. 2-5; the border rule
``shift`` is that of Hassani and Shi, Dilated Neighborhood Attention Transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _library
from .errors import ShapeError

OP = "dilated_attention"
WEIGHTS_OP = "dilated_attention_weights"
BORDERS = ("zero", "mask", "shift")


# ------------------------------------------------------------------------------------------------- the definition


def dilated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    kernel_size: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
    scale: float | None = None,
    border: str = "zero",
) -> Tensor:
    """Define `dilated_attention`: gather all keys and values of every window, and attend to them."""
    weights = _reference_weights(q, k, num_heads, kernel_size, dilations, scale, border)
    values = _windows(v.to(weights.dtype), num_heads, kernel_size, dilations, border)
    return (weights[..., None] * values).sum(dim=-2).flatten(-2).to(q.dtype)


def dilated_attention_weights_reference(
    q: Tensor,
    k: Tensor,
    *,
    num_heads: int,
    kernel_size: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
    scale: float | None = None,
    border: str = "zero",
) -> Tensor:
    """Define `dilated_attention_weights`."""
    weights = _reference_weights(q, k, num_heads, kernel_size, dilations, scale, border)
    return weights.permute(0, 3, 1, 2, 4).to(q.dtype)


def _reference_weights(q, k, num_heads, kernel_size, dilations, scale, border) -> Tensor:
    """Return the softmax over the taps, (B, H, W, heads, taps), in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).unflatten(-1, (num_heads, -1))
    keys = _windows(k.to(wide), num_heads, kernel_size, dilations, border)
    logits = (queries[..., None, :] * keys).sum(dim=-1) * _scale(q, num_heads, scale)
    if border == "mask":
        ones = torch.ones_like(k[..., :1]).expand(*k.shape[:-1], num_heads)
        inside = _windows(ones, num_heads, kernel_size, dilations, border)[..., 0] > 0
        logits = logits.masked_fill(~inside, -torch.inf)
    return logits.softmax(dim=-1)


def _windows(x: Tensor, num_heads: int, kernel_size: int, dilations: Sequence[int], border: str) -> Tensor:
    """Gather the windows of a map (B, H, W, C) into (B, H, W, heads, taps, d); taps outside the image are zero."""
    groups = []
    for part, dilation in zip(x.chunk(len(dilations), dim=-1), dilations, strict=True):
        rows, row_inside = _positions(x.shape[1], kernel_size, dilation, border, x.device)
        columns, column_inside = _positions(x.shape[2], kernel_size, dilation, border, x.device)
        window = part[:, rows][:, :, :, columns]  # (B, H, k, W, k, channels of the group)
        inside = row_inside[:, :, None, None] & column_inside
        window = torch.where(inside[..., None], window, 0.0).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        groups.append(window.unflatten(-1, (num_heads // len(dilations), -1)).transpose(3, 4))
    return torch.cat(groups, dim=3)


def _positions(
    length: int, kernel_size: int, dilation: int, border: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return where the taps of each position of one axis lie, (length, k), and which of them are in the image.

    With the border rule ``shift`` the positions that a dilation can reach from one another form a line of their own;
    the window slides along it as far as is needed to stay inside.
    """
    here = torch.arange(length, device=device)[:, None]
    tap = torch.arange(kernel_size, device=device)
    if border == "shift":
        line, place = here % dilation, here // dilation
        line_length = (length - line + dilation - 1) // dilation
        start = torch.minimum((place - kernel_size // 2).clamp(min=0), line_length - kernel_size)
        positions = line + (start + tap) * dilation
    else:
        positions = here + (tap - kernel_size // 2) * dilation
    inside = (positions >= 0) & (positions < length)
    return positions.clamp(0, max(length - 1, 0)), inside


def _scale(q: Tensor, num_heads: int, scale: float | None) -> float:
    return max(q.shape[-1] // num_heads, 1) ** -0.5 if scale is None else scale


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _taps(x: Tensor, kernel_size: int, dilation: int, border: str) -> list[Tensor]:
    """Return the map (B, H, W, ...) as each tap sees it, row by row; zeros outside of the image."""
    height, width = x.shape[1:3]
    if border == "shift":
        rows, _ = _positions(height, kernel_size, dilation, border, x.device)
        columns, _ = _positions(width, kernel_size, dilation, border, x.device)
        return [
            x.index_select(1, rows[:, i]).index_select(2, columns[:, j])
            for i in range(kernel_size)
            for j in range(kernel_size)
        ]
    reach = kernel_size // 2 * dilation
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (reach,) * 4)
    steps = range(0, 2 * reach + 1, dilation)
    return [padded[:, i : i + height, j : j + width] for i in steps for j in steps]


def _composed_weights(q: Tensor, k: Tensor, kernel_size: int, dilation: int, scale: float, border: str) -> Tensor:
    """Return the weights of one dilation's heads, (B, H, W, heads, taps), from queries and keys (B, H, W, heads, d)."""
    logits = torch.stack([(q * tap).sum(dim=-1) for tap in _taps(k, kernel_size, dilation, border)], dim=-1) * scale
    if border == "mask":
        inside = _taps(torch.ones_like(k[:, :, :, :1, 0]), kernel_size, dilation, border)
        logits = torch.where(torch.stack(inside, dim=-1) > 0, logits, -torch.inf)
    return logits.softmax(dim=-1)


def _composed(q, k, v, num_heads, kernel_size, dilations, scale, border) -> Tensor:
    """Attend with differentiable operations alone: the form that compilers and functional transforms see through."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = []
    parts = zip(*(_heads(x.to(wide), num_heads, len(dilations)) for x in (q, k, v)), dilations, strict=True)
    for queries, keys, values, dilation in parts:
        weights = _composed_weights(queries, keys, kernel_size, dilation, scale, border)
        taps = _taps(values, kernel_size, dilation, border)
        groups.append(sum(weights[..., t, None] * tap for t, tap in enumerate(taps)).flatten(-2))
    return torch.cat(groups, dim=-1).to(q.dtype)


def _heads(x: Tensor, num_heads: int, groups: int) -> tuple[Tensor, ...]:
    """Cut a map (B, H, W, C) into its dilation groups (B, H, W, heads of the group, d)."""
    return x.unflatten(-1, (num_heads, -1)).chunk(groups, dim=3)


# ---------------------------------------------------------------------------------------------- the public face


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    kernel_size: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
    scale: float | None = None,
    border: str = "zero",
) -> Tensor:
    """Attend from every pixel to the k x k pixels around it, spaced by its head's dilation."""
    dilations = _checked(OP, {"q": q, "k": k, "v": v}, num_heads, kernel_size, dilations, border)
    backend = _library.choose_backend(OP, q)
    if backend == "reference":
        return dilated_attention_reference(
            q, k, v, num_heads=num_heads, kernel_size=kernel_size, dilations=dilations, scale=scale, border=border
        )
    return _composed(q, k, v, num_heads, kernel_size, dilations, _scale(q, num_heads, scale), border)


def dilated_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    num_heads: int,
    kernel_size: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
    scale: float | None = None,
    border: str = "zero",
) -> Tensor:
    """Return the attention map of `dilated_attention`: how much each pixel looks at each tap of its window."""
    dilations = _checked(WEIGHTS_OP, {"q": q, "k": k}, num_heads, kernel_size, dilations, border)
    if _library.choose_backend(WEIGHTS_OP, q) == "reference":
        return dilated_attention_weights_reference(
            q, k, num_heads=num_heads, kernel_size=kernel_size, dilations=dilations, scale=scale, border=border
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = zip(*(_heads(x.to(wide), num_heads, len(dilations)) for x in (q, k)), dilations, strict=True)
    scale = _scale(q, num_heads, scale)
    groups = [_composed_weights(queries, keys, kernel_size, r, scale, border) for queries, keys, r in parts]
    return torch.cat(groups, dim=3).permute(0, 3, 1, 2, 4).to(q.dtype)


def _checked(
    op: str, maps: dict[str, Tensor], num_heads: int, kernel_size: int, dilations: Sequence[int], border: str
) -> tuple[int, ...]:
    """Return the dilations as a tuple, or raise what is wrong with the arguments."""
    for name, tensor in maps.items():
        _library.check_dtype(op, name, tensor)
    _library.check_same_device(op, maps)
    if len({tensor.dtype for tensor in maps.values()}) > 1:
        types = ", ".join(f"{name} is {tensor.dtype}" for name, tensor in maps.items())
        raise TypeError(f"{op}: expected one type for all maps, got {types}; convert them with .to(...)")
    q = maps["q"]
    if q.dim() != 4:
        raise ShapeError(
            f"{op}: expected q of shape (B, H, W, C), got {tuple(q.shape)}; "
            "bring a channels-first map to this layout with x.permute(0, 2, 3, 1)"
        )
    for name, tensor in maps.items():
        if tensor.shape != q.shape:
            raise ShapeError(
                f"{op}: expected {name} of the shape of q, {tuple(q.shape)}, got {tuple(tensor.shape)}; "
                "queries, keys and values come from one map"
            )
    dilations = tuple(dilations)
    check_windows(op, q.shape[-1], num_heads, kernel_size, dilations, border)
    if border == "shift":
        for axis, length in (("height", q.shape[1]), ("width", q.shape[2])):
            if 0 < length < kernel_size * max(dilations):
                raise ShapeError(
                    f"{op}: {axis} {length} is too small for border 'shift': expected at least kernel_size "
                    f"{kernel_size} x dilation {max(dilations)} = {kernel_size * max(dilations)}, so that every window "
                    "fits inside; use border='zero' or 'mask', or a larger map"
                )
    return dilations


def check_windows(
    op: str, channels: int, num_heads: int, kernel_size: int, dilations: Sequence[int], border: str = "zero"
) -> None:
    """Refuse heads, dilations, windows and borders that do not fit each other, in the name of ``op``."""
    if border not in BORDERS:
        raise ValueError(f"{op}: expected border to be one of {', '.join(map(repr, BORDERS))}, got {border!r}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ShapeError(
            f"{op}: expected an odd kernel_size of at least 1, got {kernel_size}; use {max(1, kernel_size + 1)}"
        )
    if not dilations or min(dilations) < 1:
        raise ShapeError(f"{op}: expected dilations of at least 1 and at least one of them, got {tuple(dilations)}")
    if num_heads < 1 or num_heads % len(dilations):
        raise ShapeError(
            f"{op}: num_heads {num_heads} is not divisible by the {len(dilations)} dilations {tuple(dilations)}; "
            "every dilation needs the same number of heads"
        )
    if channels % num_heads:
        raise ShapeError(
            f"{op}: {channels} channels are not divisible by num_heads {num_heads}; "
            "every head needs the same number of channels"
        )
