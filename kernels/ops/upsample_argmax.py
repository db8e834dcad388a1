"""Labels from coarse logits: upsample, add up, take the largest class, without the logits at full resolution.

    labels[b, y, x] = argmax_k sum_n U(logits_n)[b, k, y, x]              U: bilinear to the size of the labels

U places pixels by their centres (``align_corners=False``) and does not smooth where it makes a map smaller, as
`torch.nn.functional.interpolate` does by default. Labels are integers: there is no gradient.

Source: inference of networks with deep supervision, FIAS section 3 (the sum of three heads).

What fusing saves: K maps at full resolution for each head, their sum, and int64 indices. For three heads of nine
classes at 16, 32 and 64 squared, one image of 256 squared takes 10 MB of float32 that way; the labels take 64 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.scalars import check_whole

OP = "upsample_argmax"
MOST_CLASSES = 256  # that uint8 can tell apart
# Values of all classes, in a band of rows, that stay in a core's cache until their largest is known.
BAND_ELEMENTS = 1 << 16


def upsample_argmax_reference(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Define `upsample_argmax`: upsample each map, add up, take the first of the largest classes."""
    return _upsampled_sum(logits, size).argmax(dim=1).to(torch.uint8)


def _upsampled_sum(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    kept = torch.promote_types(logits[0].dtype, torch.float32)
    upsampled = [F.interpolate(m.to(kept), size, mode="bilinear", align_corners=False) for m in logits]
    total = upsampled[0]
    for one in upsampled[1:]:
        total = total + one
    return total


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _label_bands(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Label on a CPU, one band of rows after the other: first between the rows, then along them."""
    height, width = size
    labels = torch.empty((logits[0].shape[0], height, width), dtype=torch.uint8)
    kept = torch.promote_types(logits[0].dtype, torch.float32)
    places = [_places(m.shape[2], height, kept) for m in logits]
    rows = max(1, BAND_ELEMENTS // (logits[0].shape[1] * width))
    for sample, labelled in enumerate(labels):
        for start in range(0, height, rows):
            band = slice(start, start + rows)
            parts = [_band(m[sample], *(p[band] for p in place)) for m, place in zip(logits, places, strict=True)]
            # The indices that max finds are those of argmax, which takes many times as long across rows.
            labelled[band] = _widened_sum(parts, width).max(dim=0).indices
    return labels


def _places(coarse: int, fine: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each fine row the coarse rows above and below its centre, and the weight of the lower one."""
    centre = ((torch.arange(fine, dtype=dtype) + 0.5) * (coarse / fine) - 0.5).clamp_min(0)
    above = centre.long().clamp_max(coarse - 1)
    return above, (above + 1).clamp_max(coarse - 1), centre - above


def _band(logits: Tensor, above: Tensor, below: Tensor, weight: Tensor) -> Tensor:
    """Interpolate logits (K, h, w) between rows."""
    weight = weight[:, None]
    upper, lower = (logits.index_select(1, rows).to(weight.dtype) for rows in (above, below))
    return upper.mul_(1 - weight).addcmul_(lower, weight)


def _widened_sum(parts: Sequence[Tensor], width: int) -> Tensor:
    """Interpolate along rows, and add up."""
    total, *others = (F.interpolate(part, width, mode="linear") for part in parts)
    for other in others:
        total += other
    return total


# --------------------------------------------------------------------------------------- the registered operator


def _launch(logits: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    from trifuse.kernels.gpu import upsample_argmax as gpu

    return gpu.forward(logits, size[0], size[1])


def _shape(logits: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    return logits[0].new_empty((logits[0].shape[0], *size), dtype=torch.uint8)


library.register(f"{OP}(Tensor[] logits, SymInt[] size) -> Tensor", _launch, _shape)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def upsample_argmax(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Upsample coarse logits, add them up, and return the class of the largest, without logits at full resolution.

    Of equal classes the first one wins. NaN counts as larger than any number, and the first NaN wins, as in
    `torch.argmax`; look for it in the logits, for a label cannot tell. An infinite logit becomes NaN where its weight
    in the interpolation is zero, so a class of minus infinity wins there: rule a class out by a large negative number.
    All backends interpolate in float32 but in an order of their own: where two classes differ by no more than rounding,
    so may the labels. Nothing is differentiated.

    Args:
        logits: sequence of n maps of shape (B, K, h, w), each of a size of its own, coarser or finer than ``size``;
            float32, bfloat16, float16 or float64, one type for all; strided views are taken as they are. K is at most
            256.
        size: height H and width W of the labels.

    Returns:
        uint8 tensor of shape (B, H, W), contiguous: for each pixel the class with the largest sum of the bilinearly
        interpolated maps (``align_corners=False``), computed in float32 (float64 for float64 maps).

    Raises:
        ShapeError: no maps, maps that are not (B, K, h, w) with one B and K, empty classes or sides, more than 256
            classes, a size that is not two positive numbers, or maps on different devices.
        TypeError: maps that are not floating point, or of different types.

    Examples:
        >>> heads = [torch.randn(2, 9, side, side) for side in (16, 32, 64)]
        >>> labels = upsample_argmax(heads, (256, 256))  # (2, 256, 256)

    Source: the inference of FIAS, section 3.
    """
    maps = _checked(logits, size)
    backend = library.choose_backend(OP, maps[0])
    with torch.no_grad():
        if backend == "reference":
            return upsample_argmax_reference(maps, size)
        if library.under_functional_transform(maps):
            return _upsampled_sum(maps, size).max(dim=1).indices.to(torch.uint8)
        if backend == "triton":
            labels: Tensor = torch.ops.trifuse.upsample_argmax(maps, size)
            return labels
        if maps[0].device.type != "cpu" or library.without_values(maps):
            return _upsampled_sum(maps, size).max(dim=1).indices.to(torch.uint8)
        return _label_bands(maps, size)


def _checked(logits: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the maps as a tuple, or raise what is wrong with the arguments."""
    if isinstance(logits, Tensor):
        raise ShapeError(f"{OP}: logits is one tensor; expected a sequence of maps (B, K, h, w); pass [logits]")
    maps = tuple(logits)
    if not maps:
        raise ShapeError(f"{OP}: logits is empty; expected at least one map of shape (B, K, h, w)")
    for i, m in enumerate(maps):
        library.check_dtype(OP, f"logits[{i}]", m)
        if m.ndim != 4 or m.shape[1] == 0 or m.shape[2] == 0 or m.shape[3] == 0:
            raise ShapeError(
                f"{OP}: logits[{i}] has shape {tuple(m.shape)}; expected (B, K, h, w) with at least one class, row and "
                "column"
            )
        if m.shape[:2] != maps[0].shape[:2]:
            raise ShapeError(
                f"{OP}: logits[{i}] has shape {tuple(m.shape)}; expected the batch and the classes of logits[0], "
                f"({maps[0].shape[0]}, {maps[0].shape[1]}, h, w)"
            )
        if m.dtype != maps[0].dtype:
            raise TypeError(
                f"{OP}: logits[{i}] is {m.dtype}; expected {maps[0].dtype}, the type of logits[0]; use .to(...)"
            )
    if maps[0].shape[1] > MOST_CLASSES:
        raise ShapeError(
            f"{OP}: logits have {maps[0].shape[1]} classes; expected at most {MOST_CLASSES}: labels are uint8"
        )
    library.check_same_device(OP, {"logits": maps})
    sides = (size,) if isinstance(size, int) else tuple(size)
    check_whole(f"{OP}: size", sides)
    if len(sides) != 2 or min(sides) < 1:
        raise ShapeError(f"{OP}: size is {sides}; expected (height, width), both at least 1")
    return maps
