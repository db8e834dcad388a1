"""What a window of dilated attention is: its arguments, where its taps lie, and a plain form to attend with.

The plain form consists of differentiable operations alone, without a loop over data. A compiler fuses it into a few
passes over the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.choices import check_choice
from trifuse.kernels.cpu.dilated_attention import Windows
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.scalars import check_listed, check_number, check_whole

BORDERS = ("zero", "mask", "shift")


def check_arguments(
    op: str,
    maps: dict[str, Tensor],
    num_heads: int,
    kernel_size: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
    scale: float | None = None,
    border: str = "zero",
    *,
    packed: int = 1,
) -> Windows:
    """Return the windows, or raise what is wrong with them or with the maps; each holds ``packed`` in equal parts."""
    for name, tensor in maps.items():
        library.check_dtype(op, name, tensor)
    library.check_same_device(op, maps)
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
    channels = q.shape[-1] // packed
    check_windows(op, channels, num_heads, kernel_size, dilations, border)
    dilations = tuple(dilations)
    if border == "shift":
        _check_room(op, q.shape[1:3], kernel_size, max(dilations))
    if scale is None:
        scale = max(channels // num_heads, 1) ** -0.5
    check_number(f"{op}: scale", scale)
    return Windows(num_heads, kernel_size, dilations, scale, border)


def check_windows(
    op: str, channels: int, num_heads: int, kernel_size: int, dilations: Sequence[int], border: str = "zero"
) -> None:
    """Refuse heads, dilations, windows and borders that do not fit each other, in the name of ``op``."""
    check_choice(f"{op}: border", border, BORDERS)
    check_listed(f"{op}: dilations", dilations)
    check_whole(f"{op}: num_heads, kernel_size and dilations", (num_heads, kernel_size, *dilations))
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


def _check_room(op: str, size: Sequence[int], kernel_size: int, dilation: int) -> None:
    """Refuse maps in which a window cannot slide until it fits."""
    for axis, length in zip(("height", "width"), size, strict=True):
        if length < kernel_size * dilation:
            raise ShapeError(
                f"{op}: {axis} {length} is too small for border 'shift': expected at least kernel_size {kernel_size} x "
                f"dilation {dilation} = {kernel_size * dilation}, so that a window fits; use border='zero' or 'mask'"
            )


def positions(length: int, kernel_size: int, dilation: int, border: str, device: torch.device) -> tuple[Tensor, Tensor]:
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


def attend(maps: Sequence[Tensor], windows: Windows) -> Tensor:
    """Attend with differentiable operations alone: the form that compilers and functional transforms see through."""
    groups = []
    for queries, keys, values, dilation in groups_of_heads(maps, windows):
        weights = tap_weights(queries, keys, dilation, windows)
        seen = taps(values, dilation, windows)
        attended = weights[0] * seen[0]
        for weight, value in zip(weights[1:], seen[1:], strict=True):
            attended = attended + weight * value
        groups.append(attended.flatten(-2))
    return torch.cat(groups, dim=-1).to(maps[0].dtype)


def tap_weights(queries: Tensor, keys: Tensor, dilation: int, windows: Windows) -> list[Tensor]:
    """Return the weight of each tap, (B, H, W, heads, 1). Never stacked, a compiler keeps them in registers."""
    logits = [(queries * key).sum(-1, keepdim=True) * windows.scale for key in taps(keys, dilation, windows)]
    if windows.border == "mask":
        inside = taps(keys.new_ones((*keys.shape[:3], 1, 1)), dilation, windows)
        logits = [torch.where(real > 0, s, -torch.inf) for s, real in zip(logits, inside, strict=True)]
    largest = logits[0].detach()
    for s in logits[1:]:
        largest = torch.maximum(largest, s.detach())
    exponentials = [torch.exp(s - largest) for s in logits]
    total = exponentials[0]
    for exponential in exponentials[1:]:
        total = total + exponential
    return [exponential / total for exponential in exponentials]


def taps(x: Tensor, dilation: int, windows: Windows) -> list[Tensor]:
    """Return a map (B, H, W, heads, d) as each tap sees it, row by row; zeros outside of the image."""
    height, width = x.shape[1:3]
    size = windows.kernel_size
    if windows.border == "shift":
        rows, columns = (positions(n, size, dilation, "shift", x.device)[0].unbind(1) for n in (height, width))
        return [
            part.index_select(2, column) for row in rows for part in (x.index_select(1, row),) for column in columns
        ]
    reach = size // 2 * dilation
    padded = F.pad(x, (0, 0, 0, 0, reach, reach, reach, reach))
    steps = [dilation * i for i in range(size)]
    return [padded[:, i : i + height, j : j + width] for i in steps for j in steps]


def groups_of_heads(maps: Sequence[Tensor], windows: Windows) -> list[tuple[Any, ...]]:
    """Cut maps (B, H, W, C) into (B, H, W, heads, d) for each dilation, which comes last; float32 or wider."""
    wide = torch.promote_types(maps[0].dtype, torch.float32)
    parts = [x.to(wide).unflatten(-1, (windows.num_heads, -1)).chunk(len(windows.dilations), dim=3) for x in maps]
    return list(zip(*parts, windows.dilations, strict=True))
