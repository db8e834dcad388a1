"""Dilated attention on a CPU: every map as flat planes, in which a tap is one step along memory.

A plane of a head's channel is written row after row, with as many zeros between two rows as a window reaches, and zeros
before the first and after the last. What a tap sees of all pixels is then the same plane, read from another start: long
runs of neighbouring numbers, at full speed, and zeros wherever a window looks out of the image, without a test or a
copy. The zeros between the rows cost a share of reach / width. As many samples as stay in the cache are worked off at a
time, one dilation's heads together, and backward recomputes the weights from the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # of one map: the dozen maps that a chunk needs stay in a core's cache


class Windows(NamedTuple):
    """What each pixel looks at, as every backend takes it once the arguments are checked."""

    num_heads: int
    kernel_size: int
    dilations: tuple[int, ...]
    scale: float
    border: str


@dataclass(frozen=True)
class PlanarWindows:
    """The windows of one dilation in maps of one size, and where flat planes hold what they see."""

    height: int
    width: int
    kernel_size: int
    dilation: int

    @property
    def reach(self) -> int:
        """How far a window looks, and how many zeros lie between two rows."""
        return self.kernel_size // 2 * self.dilation

    @property
    def pitch(self) -> int:
        """From one row to the next."""
        return self.width + self.reach

    @property
    def image(self) -> slice[int, int, int | None]:
        """Where the image lies in a plane, the zeros between its rows included."""
        start = self.reach * (self.pitch + 1)
        return slice(start, start + self.height * self.pitch)

    @property
    def plane_elements(self) -> int:
        return self.image.start + self.image.stop

    @property
    def taps(self) -> list[slice[int, int, int | None]]:
        """What each tap sees of a plane, row by row. Read backwards: by which query each tap is seen."""
        steps = [self.dilation * i for i in range(self.kernel_size)]
        starts = [row * self.pitch + column for row in steps for column in steps]
        return [slice(start, start + self.height * self.pitch) for start in starts]

    def channels_of_taps(self, planes: Tensor) -> tuple[Tensor, ...]:
        """View planes (n, d, elements), channel by channel, as all taps see them: (n, k, k, elements of the image)."""
        n, d, elements = planes.shape
        shape = (n, self.kernel_size, self.kernel_size, d, self.height * self.pitch)
        strides = (d * elements, self.dilation * self.pitch, self.dilation, elements, 1)
        return planes.as_strided(shape, strides).unbind(3)

    def rows(self, image: Tensor) -> Tensor:
        """View the image's part of planes (..., elements) as (..., H, pitch)."""
        rows: Tensor = image.unflatten(-1, (self.height, self.pitch))
        return rows

    def flatten(self, x: Tensor) -> Tensor:
        """Write a map (n, H, W, heads, d) into planes (n * heads, d, elements), in float32 or wider."""
        n, _, _, heads, d = x.shape
        planes = torch.zeros(n, heads, d, self.plane_elements, dtype=torch.promote_types(x.dtype, torch.float32))
        self.rows(planes[..., self.image])[..., : self.width].copy_(x.permute(0, 3, 4, 1, 2))
        return planes.flatten(0, 1)

    def unflatten(self, image: Tensor, out: Tensor) -> None:
        """Write the image's part of planes, (n * heads, d, elements), into a map (n, H, W, heads, d)."""
        planes = self.rows(image.unflatten(0, (-1, out.shape[3])))[..., : self.width]
        out.copy_(planes.permute(0, 3, 4, 1, 2))

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """Return -inf for each tap that looks out of the image, 0 for the others: (taps, elements of the image)."""
        ones = self.flatten(torch.ones(1, self.height, self.width, 1, 1, dtype=dtype))[0, 0]
        inside = torch.stack([ones[tap] for tap in self.taps])
        inside[:, ones[self.image] == 0] = 1  # between the rows there is nothing that attends, and nothing to hide
        return torch.zeros_like(inside).masked_fill_(inside == 0, -torch.inf)


def forward(maps: Sequence[Tensor], windows: Windows) -> Tensor:
    """Attend with the maps q, k and v, (B, H, W, C)."""
    out = torch.empty(maps[0].shape, dtype=maps[0].dtype)
    for planar, (*parts, result) in _chunks([*maps, out], windows):
        queries, keys, values = (planar.flatten(x) for x in parts)
        weights = _weights(queries, keys, planar, windows)
        attended = torch.zeros(*queries.shape[:2], weights.shape[-1], dtype=queries.dtype)
        for weight, tap in zip(weights.unbind(1), planar.taps, strict=True):
            attended.addcmul_(weight[:, None], values[..., tap])
        planar.unflatten(attended, result)
    return out


def backward(grad: Tensor, maps: Sequence[Tensor], grads: Sequence[Tensor], windows: Windows) -> None:
    """Write the gradients of the maps q, k and v into ``grads``, of their shape."""
    for planar, parts in _chunks([grad, *maps, *grads], windows):
        planes = [planar.flatten(x) for x in parts[:4]]
        for image, result in zip(_gradients(planes, planar, windows), parts[4:], strict=True):
            planar.unflatten(image, result)


def _gradients(planes: Sequence[Tensor], planar: PlanarWindows, windows: Windows) -> Tensor:
    """Return the gradients of queries, keys and values, (3, n, d, elements of the image), from flat planes."""
    grad, queries, keys, values = planes
    weights = _weights(queries, keys, planar, windows)
    weight_grads = _products(grad, values, planar, 1.0)
    logit_grads = (weight_grads - (weights * weight_grads).sum(dim=1, keepdim=True)).mul_(weights).mul_(windows.scale)
    weights, logit_grads = _in_planes(weights, planar), _in_planes(logit_grads, planar)
    result = torch.zeros(3, *queries.shape[:2], planar.height * planar.pitch, dtype=queries.dtype)
    query_grad, key_grad, value_grad = result
    for t, (tap, seen_by) in enumerate(zip(planar.taps, reversed(planar.taps), strict=True)):
        query_grad.addcmul_(logit_grads[:, t, None, planar.image], keys[..., tap])
        key_grad.addcmul_(logit_grads[:, t, None, seen_by], queries[..., seen_by])
        value_grad.addcmul_(weights[:, t, None, seen_by], grad[..., seen_by])
    return result


def _weights(queries: Tensor, keys: Tensor, planar: PlanarWindows, windows: Windows) -> Tensor:
    """Return the softmax over the taps, (n, taps, elements of the image)."""
    logits = _products(queries, keys, planar, windows.scale)
    return torch.softmax(logits + planar.hidden(logits.dtype) if windows.border == "mask" else logits, dim=1)


def _products(here: Tensor, there: Tensor, planar: PlanarWindows, factor: float) -> Tensor:
    """Return the inner product of each pixel of one map with each of its taps in another, (n, taps, elements)."""
    k = planar.kernel_size
    result = torch.zeros(len(here), k, k, planar.height * planar.pitch, dtype=here.dtype)
    channels = here[..., planar.image].unsqueeze(1).unsqueeze(1).unbind(3)
    for channel, taps in zip(channels, planar.channels_of_taps(there), strict=True):
        result.addcmul_(channel, taps, value=factor)
    return result.flatten(1, 2)


def _in_planes(image: Tensor, planar: PlanarWindows) -> Tensor:
    """Copy the image's part of planes into planes with zeros around it and between its rows."""
    planes = image.new_zeros(*image.shape[:-1], planar.plane_elements)
    planar.rows(planes[..., planar.image])[..., : planar.width] = planar.rows(image)[..., : planar.width]
    return planes


def _chunks(maps: Sequence[Tensor], windows: Windows) -> Iterator[tuple[PlanarWindows, tuple[Tensor, ...]]]:
    """Cut maps (B, H, W, C) into views (n, H, W, heads of one dilation, d) of about CHUNK_ELEMENTS."""
    height, width = maps[0].shape[1:3]
    groups = [x.unflatten(-1, (windows.num_heads, -1)).chunk(len(windows.dilations), dim=3) for x in maps]
    for dilation, *group in zip(windows.dilations, *groups, strict=True):
        planar = PlanarWindows(height, width, windows.kernel_size, dilation)
        samples = max(1, CHUNK_ELEMENTS // max(1, group[0][:1].numel()))
        for parts in zip(*(x.split(samples) for x in group), strict=True):
            yield planar, parts
