"""What dilated attention is compared with: the published form, forms without windows, and two public peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def unfold_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, dilations: Sequence[int] = (1, 2, 3), kernel_size: int = 3
) -> Tensor:
    """Attend as DilateFormer publishes it: every window written out by unfold, channels first, then two products."""
    groups = len(dilations)
    parts = zip(*(x.permute(0, 3, 1, 2).chunk(groups, dim=1) for x in (q, k, v)), dilations, strict=True)
    results = []
    for queries, keys, values, dilation in parts:
        b, c, h, w = queries.shape
        heads, taps = num_heads // groups, kernel_size**2
        padding = dilation * (kernel_size - 1) // 2
        keys, values = (F.unfold(x, kernel_size, dilation, padding) for x in (keys, values))
        queries = queries.reshape(b, heads, c // heads, 1, h * w).permute(0, 1, 4, 3, 2)
        keys = keys.reshape(b, heads, c // heads, taps, h * w).permute(0, 1, 4, 2, 3)
        values = values.reshape(b, heads, c // heads, taps, h * w).permute(0, 1, 4, 3, 2)
        weights = (queries @ keys * (c // heads) ** -0.5).softmax(dim=-1)
        results.append((weights @ values).transpose(1, 2).reshape(b, h, w, c))
    return torch.cat(results, dim=-1)


def shift_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, dilations: Sequence[int] = (1, 2, 3)) -> Tensor:
    """Attend with slices of padded maps, one for each tap of a window of 3 x 3: the careful way by hand."""
    h, w = q.shape[1:3]
    parts = (x.unflatten(-1, (num_heads, -1)).chunk(len(dilations), dim=3) for x in (q, k, v))
    results = []
    for queries, keys, values, r in zip(*parts, dilations, strict=True):
        keys, values = (F.pad(x, (0, 0, 0, 0, r, r, r, r)) for x in (keys, values))
        taps = [(slice(y, y + h), slice(x, x + w)) for y in (0, r, 2 * r) for x in (0, r, 2 * r)]
        logits = torch.stack([(queries * keys[:, rows, columns]).sum(-1) for rows, columns in taps], dim=-1)
        weights = (logits * queries.shape[-1] ** -0.5).softmax(dim=-1)
        attended = sum(weights[..., t, None] * values[:, rows, columns] for t, (rows, columns) in enumerate(taps))
        results.append(attended.flatten(-2))
    return torch.cat(results, dim=-1)


def natten_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, dilations: Sequence[int] = (1, 2, 3)
) -> Tensor:
    """Attend with NATTEN, which knows no zeros outside: the maps are padded, and the border of the result cut off."""
    from natten.functional import na2d

    parts = (x.unflatten(-1, (num_heads, -1)).chunk(len(dilations), dim=3) for x in (q, k, v))
    results = []
    for queries, keys, values, r in zip(*parts, dilations, strict=True):
        padded = [F.pad(x, (0, 0, 0, 0, r, r, r, r)) for x in (queries, keys, values)]
        results.append(na2d(*padded, kernel_size=3, dilation=r)[:, r:-r, r:-r].flatten(-2))
    return torch.cat(results, dim=-1)


def flex_attention_by_windows(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, dilations: Sequence[int] = (1, 2, 3)
) -> Tensor:
    """Attend with PyTorch's FlexAttention, masked to the window, and then diluted by the taps outside of the image.

    With n such taps, each a zero logit with a zero value, the result is that of the taps inside times
    sigmoid(lse - log n), lse being the logarithm of the sum of their exponentials.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    h, w = q.shape[1:3]
    parts = (x.unflatten(-1, (num_heads, -1)).chunk(len(dilations), dim=3) for x in (q, k, v))
    results = []
    for queries, keys, values, r in zip(*parts, dilations, strict=True):

        def near(b, head, query, key, r=r):
            dy, dx = query // w - key // w, query % w - key % w
            return ((dy == 0) | (dy == r) | (dy == -r)) & ((dx == 0) | (dx == r) | (dx == -r))

        mask = create_block_mask(near, None, None, h * w, h * w, device=q.device)
        tokens = [x.flatten(1, 2).transpose(1, 2) for x in (queries, keys, values)]
        attended, lse = _flex_attention()(*tokens, block_mask=mask, return_lse=True)
        ones = F.pad(torch.ones(1, 1, h, w, device=q.device), (r, r, r, r))
        outside = 9 - F.conv2d(ones, torch.ones(1, 1, 3, 3, device=q.device), dilation=r).flatten()
        diluted = attended * torch.sigmoid(lse - outside.log())[..., None].to(attended.dtype)
        results.append(diluted.transpose(1, 2).reshape(*q.shape[:3], -1))
    return torch.cat(results, dim=-1)


def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


NATTEN_MISSING = "" if importlib.util.find_spec("natten") else "natten is not installed"
FLEX_MISSING = "" if torch.cuda.is_available() else "FlexAttention has no backward pass on a CPU"
