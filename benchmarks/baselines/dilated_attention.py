"""What dilated attention is compared with: the published form, forms without windows, and two public peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


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
    """Attend with PyTorch's FlexAttention, masked to the windows, and then diluted by the taps outside of the image.

    All dilations go in one call, whose mask asks the head for its dilation; masks are made once for each size.
    """
    b, h, w, c = q.shape
    of_heads = tuple(r for r in dilations for _ in range(num_heads // len(dilations)))
    mask, outside = _windows(h, w, of_heads, q.device)
    tokens = [x.reshape(b, h * w, num_heads, -1).transpose(1, 2) for x in (q, k, v)]
    attended, logarithms = compiled_flex_attention(*tokens, block_mask=mask, return_aux=AuxRequest(lse=True))
    return diluted(attended, logarithms.lse, outside).transpose(1, 2).reshape(b, h, w, c)


def diluted(attended: Tensor, lse: Tensor, outside: Tensor) -> Tensor:
    """Return attention in which the taps outside of the image took part, from attention to those inside alone.

    With n taps outside, each a zero logit with a zero value, it is the attention times sigmoid(lse - log n), lse being
    the logarithm of the sum of the exponentials of the taps inside.

    Args:
        attended: attention to the taps inside, (B, heads, tokens, d).
        lse: its logarithms, (B, heads, tokens).
        outside: n for each head and token, (heads, tokens).
    """
    return attended * torch.sigmoid(lse - outside.log())[..., None].to(attended.dtype)


@cache
def _windows(h: int, w: int, of_heads: tuple[int, ...], device: torch.device) -> tuple[BlockMask, Tensor]:
    dilations = torch.tensor(of_heads, device=device)

    def near(b, head, query, key):
        r = dilations[head]
        dy, dx = (query // w - key // w).abs(), (query % w - key % w).abs()
        return ((dy == 0) | (dy == r)) & ((dx == 0) | (dx == r))

    mask = create_block_mask(near, None, len(of_heads), h * w, h * w, device=device)
    return mask, torch.stack([taps_outside(h, w, r, device) for r in of_heads])


def taps_outside(h: int, w: int, dilation: int, device: torch.device) -> Tensor:
    """Return for each pixel how many of its nine taps are outside of the image, (h * w,)."""
    reach = F.pad(torch.ones(1, 1, h, w, device=device), (dilation,) * 4)
    return 9 - F.conv2d(reach, torch.ones(1, 1, 3, 3, device=device), dilation=dilation).flatten()


def unfold_weights(
    q: Tensor, k: Tensor, *, num_heads: int, dilations: Sequence[int] = (1, 2, 3), kernel_size: int = 3
) -> Tensor:
    """Return the published form's attention map, (B, heads, H, W, taps)."""
    b, h, w, c = q.shape
    groups, d = len(dilations), c // num_heads
    results = []
    parts = zip(*(x.permute(0, 3, 1, 2).chunk(groups, dim=1) for x in (q, k)), dilations, strict=True)
    for queries, keys, dilation in parts:
        windows = F.unfold(keys, kernel_size, dilation, dilation * (kernel_size - 1) // 2)
        windows = windows.reshape(b, num_heads // groups, d, kernel_size**2, h * w)
        logits = (queries.reshape(b, num_heads // groups, d, 1, h * w) * windows).sum(2) * d**-0.5
        results.append(logits.softmax(dim=2).transpose(2, 3).reshape(b, num_heads // groups, h, w, -1))
    return torch.cat(results, dim=1)


def _natten_obstacle() -> str:
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    return "" if torch.cuda.is_available() else "natten's kernels need a GPU"


compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
NATTEN_MISSING = _natten_obstacle()
FLEX_MISSING = "" if torch.cuda.is_available() else "FlexAttention gives neither logarithms nor gradients on a CPU"
