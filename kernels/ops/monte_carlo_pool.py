"""Monte Carlo attention's pooling: the mean over one drawn cell of a map.

    pooled[b, c] = mean of x[b, c, p] over the positions p of one cell of a scale x scale adaptive grid

Row i of a grid of k rows covers the image rows from floor(i H / k) to ceil((i + 1) H / k): neighbours overlap where k
does not divide H. With a permutation, position p of the grid stands for position permutation[p] of the map.

    d pooled / d x = grad / (size of the cell) at the chosen positions, zero elsewhere

Source: Monte Carlo attention of SvANet, as FIAS uses it in its decoder (equations 9 and 10).

What fusing saves: only the drawn cell is read, 1 / scale^2 of the map, where adaptive pooling reads all of it, after a
shuffle that copied it. Nothing but the draw is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

POOL = "monte_carlo_pool"
LARGEST_SCALE = 2**15  # cells per side: the kernels number the cells of a grid in 32 bits


def monte_carlo_pool_reference(
    x: Tensor, *, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None = None
) -> Tensor:
    """Define `monte_carlo_pool`: permute every sample's positions, cut its cell out, and average."""
    maps = x.to(torch.promote_types(x.dtype, torch.float32))
    if permutation is not None:
        order = permutation.expand(len(x), -1)[:, None].expand(-1, x.shape[1], -1)
        maps = maps.flatten(2).gather(2, order).view(x.shape)
    scales, cells = (torch.as_tensor(value).expand(len(x)).tolist() for value in (scale, cell))
    pooled = [_cut(sample, *draw).mean((1, 2)) for sample, *draw in zip(maps, scales, cells, strict=True)]
    return (torch.stack(pooled) if pooled else maps.mean((2, 3))).to(x.dtype)


def _edges(length: int, scale: int, index: int) -> tuple[int, int]:
    """Return the first position of one interval of an adaptive grid over ``length`` positions, and the one past it."""
    return index * length // scale, ((index + 1) * length + scale - 1) // scale


def _cut(maps: Tensor, scale: int, cell: int) -> Tensor:
    """Cut one cell out of maps (..., H, W), as a view."""
    _check_draw(scale, cell)
    top, bottom = _edges(maps.shape[-2], scale, cell // scale)
    left, right = _edges(maps.shape[-1], scale, cell % scale)
    return maps[..., top:bottom, left:right]


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _pool_drawn(x: Tensor, scale: int, cell: int, permutation: Tensor | None) -> Tensor:
    """Average a cell known in advance over maps (..., H, W) that share a permutation (H * W,)."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if permutation is None or scale == 1:  # all positions have one mean, in whatever order
        return _cut(x, scale, cell).mean((-2, -1), dtype=compute_dtype).to(x.dtype)
    positions = _cut(permutation.view(x.shape[-2:]), scale, cell).flatten()
    if library.under_functional_transform((x, permutation)) or library.without_values((x, permutation)):
        return _gathered_mean(x, positions)
    return _GatheredMean.apply(x, positions)


def _gathered_mean(x: Tensor, positions: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = positions // max(1, x.shape[-1]), positions % max(1, x.shape[-1])
    return x[..., rows, columns].mean(-1, dtype=compute_dtype).to(x.dtype)


class _GatheredMean(Function):
    """The mean over positions that are all different: the gradient is chosen for each, none is added to another."""

    @staticmethod
    def forward(ctx: ForwardContext, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.size = x.shape[-2:]
        return _gathered_mean(x, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        chosen = torch.zeros(ctx.size, dtype=torch.bool, device=grad.device)
        chosen = chosen.flatten().index_fill(0, positions, True).view(ctx.size)
        share = (grad.to(torch.promote_types(grad.dtype, torch.float32)) / len(positions)).to(grad.dtype)
        return torch.where(chosen, share[..., None, None], 0.0), None


def _pool_each(x: Tensor, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None) -> Tensor:
    """Average on a CPU, where a draw may be looked at: all samples at once if they share it, else one by one."""
    scales, cells = torch.broadcast_tensors(torch.as_tensor(scale), torch.as_tensor(cell))
    draws = list(zip(scales.reshape(-1).tolist(), cells.reshape(-1).tolist(), strict=True))
    if len(draws) == 1 and (permutation is None or permutation.ndim == 1):
        return _pool_drawn(x, *draws[0], permutation)
    orders: Sequence[Tensor | None] = (
        [None] * len(x) if permutation is None else permutation.expand(len(x), -1).unbind()
    )
    each = zip(x, draws * len(x) if len(draws) == 1 else draws, orders, strict=True)
    pooled = [_pool_drawn(sample, *draw, order) for sample, draw, order in each]
    return torch.stack(pooled) if pooled else x.mean((2, 3))


def _pool_masked(x: Tensor, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None) -> Tensor:
    """Average without looking at the draw: every position is read, and those outside the cell are left out."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    batch, _, height, width = x.shape
    scale, cell = (_on_device(value, x.device).expand(batch)[:, None] for value in (scale, cell))
    chosen_rows = _inside(height, scale, cell // scale)
    chosen_columns = _inside(width, scale, cell % scale)
    chosen = (chosen_rows[:, :, None] & chosen_columns[:, None, :]).flatten(1)
    if permutation is not None:
        chosen = torch.zeros_like(chosen).scatter(1, permutation.expand(batch, -1), chosen)
    picked = torch.where(chosen.view(batch, 1, height, width), x.to(compute_dtype), 0.0)
    return (picked.sum((2, 3)) / chosen.sum(1)[:, None]).to(x.dtype)


def _on_device(value: int | Tensor, device: torch.device) -> Tensor:
    """A number is filled in where it is needed: copied there, it would make a GPU wait."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)


def _inside(length: int, scale: Tensor, index: Tensor) -> Tensor:
    """Return which of ``length`` positions lie in one interval of each sample's grid: (B, length)."""
    positions = torch.arange(length, device=scale.device)
    first = index * length // scale
    last = ((index + 1) * length + scale - 1) // scale
    return (first <= positions) & (positions < last)


# -------------------------------------------------------------------------------------- the registered operators


def _launch_pool(
    x: Tensor, scale: int, cell: int, scales: Tensor | None, cells: Tensor | None, permutation: Tensor | None
) -> Tensor:
    from trifuse.kernels.gpu import monte_carlo_pool as gpu

    return gpu.pool_forward(x, scale, cell, scales, cells, permutation)


def _shape_pool(
    x: Tensor, scale: int, cell: int, scales: Tensor | None, cells: Tensor | None, permutation: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[:2])


def _launch_pool_backward(
    grad: Tensor,
    size: Sequence[int],
    scale: int,
    cell: int,
    scales: Tensor | None,
    cells: Tensor | None,
    permutation: Tensor | None,
    channels_last: bool,
) -> Tensor:
    from trifuse.kernels.gpu import monte_carlo_pool as gpu

    return gpu.pool_backward(grad, size, scale, cell, scales, cells, permutation, channels_last)


def _shape_pool_backward(
    grad: Tensor,
    size: Sequence[int],
    scale: int,
    cell: int,
    scales: Tensor | None,
    cells: Tensor | None,
    permutation: Tensor | None,
    channels_last: bool,
) -> Tensor:
    return grad.new_empty(size).to(memory_format=_memory_format(channels_last))


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


class _TritonPool(Function):
    """The gradient of the registered operator: nothing but the draw is saved."""

    @staticmethod
    def forward(
        ctx: ForwardContext,
        x: Tensor,
        scale: int,
        cell: int,
        scales: Tensor | None,
        cells: Tensor | None,
        permutation: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(scales, cells, permutation)
        ctx.size, ctx.scale, ctx.cell = x.shape, scale, cell
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        with below_autograd():
            pooled: Tensor = torch.ops.trifuse.monte_carlo_pool(x, scale, cell, scales, cells, permutation)
            return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.trifuse.monte_carlo_pool_backward
        draw = (ctx.scale, ctx.cell, *ctx.saved_tensors)
        return backward(grad, ctx.size, *draw, ctx.channels_last), None, None, None, None, None


_DRAW = "int scale, int cell, Tensor? scales, Tensor? cells, Tensor? permutation"
_operator = library.register(
    f"{POOL}(Tensor x, {_DRAW}) -> Tensor",
    _launch_pool,
    _shape_pool,
    lambda *arguments: _TritonPool.apply(*arguments),
)
library.register(
    f"{POOL}_backward(Tensor grad, SymInt[] size, {_DRAW}, bool channels_last) -> Tensor",
    _launch_pool_backward,
    _shape_pool_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def monte_carlo_pool(
    x: Tensor, *, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None = None
) -> Tensor:
    """Average one cell of a scale x scale adaptive grid over each map: (B, C, H, W) -> (B, C).

    The draw is the caller's. As tensors, scale and cell are read where they lie: nothing waits for a GPU, and a
    recorded graph holds for other draws. With a permutation, the mean is that of the positions that the cell's places
    stand for: the map is never permuted. The result and its gradient are deterministic on every backend. The Triton
    path can be differentiated once; a second differentiation raises.

    Args:
        x: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64. H or W smaller
            than the scale repeats positions in several cells.
        scale: cells per side, from 1 to 32,768: an int, or int64 of shape () or (B,).
        cell: the cell's row times the scale plus its column: an int, or int64 of shape () or (B,).
        permutation: int64 of shape (H * W,), or (B, H * W) for one per sample; every position exactly once, which is
            not checked.

    Returns:
        Tensor of shape (B, C) in the type of x, accumulated in float32 (float64 for float64 maps). A map without
        positions gives NaN, as `torch.mean` does.

    Raises:
        ShapeError: x, scale, cell or the permutation has another shape, or lies on another device.
        TypeError: x is not floating point, or the draw is not of whole numbers.
        ValueError: there is no such cell. On a GPU a cell in a tensor is not looked at, and gives NaN.

    Examples:
        >>> monte_carlo_pool(x, scale=3, cell=4)  # the mean over the middle ninth

    Source: the pooling of SvANet's Monte Carlo attention; the adaptive grid is `torch.nn.AdaptiveAvgPool2d`'s.
    """
    _check_pool(x, scale, cell, permutation)
    backend = library.choose_backend(POOL, x)
    if backend == "reference":
        return monte_carlo_pool_reference(x, scale=scale, cell=cell, permutation=permutation)
    given = [value for value in (x, scale, cell, permutation) if isinstance(value, Tensor)]
    transformed = library.under_functional_transform(given)
    if backend == "triton" and not transformed:
        one_scale, one_cell = (value if isinstance(value, int) else 0 for value in (scale, cell))
        scales, cells = (value if isinstance(value, Tensor) else None for value in (scale, cell))
        return _operator(x, one_scale, one_cell, scales, cells, permutation)
    if isinstance(scale, int) and isinstance(cell, int) and (permutation is None or permutation.ndim == 1):
        return _pool_drawn(x, scale, cell, permutation)
    if x.device.type == "cpu" and not transformed and not library.without_values(given):
        return _pool_each(x, scale, cell, permutation)
    return _pool_masked(x, scale, cell, permutation)


def _check_pool(x: Tensor, scale: int | Tensor, cell: int | Tensor, permutation: Tensor | None) -> None:
    library.check_dtype(POOL, "x", x)
    if x.ndim != 4:
        raise ShapeError(f"{POOL}: x has shape {tuple(x.shape)}; expected (B, C, H, W)")
    batch, positions = x.shape[0], x.shape[2] * x.shape[3]
    shapes = {
        "scale": ((), (batch,)),
        "cell": ((), (batch,)),
        "permutation": ((positions,), (batch, positions)),
    }
    given = {"scale": scale, "cell": cell, "permutation": permutation}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        if name in tensors:
            _check_index(name, tensors[name], shapes[name])
        elif not (isinstance(value, int) if name != "permutation" else value is None) or isinstance(value, bool):
            raise TypeError(f"{POOL}: {name} is a {type(value).__name__}; expected an int64 tensor, or an int or None")
    library.check_same_device(POOL, {"x": x, **tensors})
    if isinstance(scale, int) and isinstance(cell, int):
        _check_draw(scale, cell)


def _check_index(name: str, value: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if value.dtype != torch.int64:
        raise TypeError(f"{POOL}: {name} is {value.dtype}; expected torch.int64; convert it with .long()")
    if tuple(value.shape) not in shapes:
        raise ShapeError(f"{POOL}: {name} has shape {tuple(value.shape)}; expected {shapes[0]} or {shapes[1]}")


def _check_draw(scale: int, cell: int) -> None:
    if not 1 <= scale <= LARGEST_SCALE or not 0 <= cell < scale * scale:
        raise ValueError(
            f"{POOL}: got scale {scale} and cell {cell}; expected a scale of at least 1 and at most {LARGEST_SCALE}, "
            "and a cell from 0 to below scale * scale"
        )
