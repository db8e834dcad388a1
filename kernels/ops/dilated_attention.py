"""Sliding-window dilated attention: each pixel attends to the k x k pixels around it, r pixels apart.

    s[t] = scale <q[y, x], key[t]>,  key[t] = k[y + dy r, x + dx r],  t = (dy, dx) row by row
    p = softmax(s)
    out[y, x] = sum_t p[t] value[t]

Heads are dealt to the dilations r in order: the first num_heads / len(dilations) of them have the first dilation.
Gradients, with g that of out[y, x]: each tap gives

    ds[t] = p[t] (<g, value[t]> - sum_u p[u] <g, value[u]>)
    dq[y, x] += scale ds[t] key[t]
    d key[t] += scale ds[t] q[y, x]
    d value[t] += p[t] g

and each pixel gathers dk and dv from the queries that see it, so nothing is added up in an order left to chance.

Source: Jiao et al., DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, Eqs. 2-5. The border rule
``shift`` is that of Hassani and Shi, Dilated Neighborhood Attention Transformer.

What fusing saves: the published form writes every window out (`torch.nn.functional.unfold`), 9 times the keys and 9
times the values, and keeps them for backward. Here windows are read where they lie, all dilations in one launch, and
only the arguments and one number per pixel and head, the logarithm of the softmax's denominator, are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.cpu import dilated_attention as cpu
from trifuse.kernels.cpu.dilated_attention import Windows
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import BackendError
from trifuse.kernels.torch_internals import below_autograd

from . import _dilated_windows
from ._dilated_windows import check_arguments, positions

OP = "dilated_attention"
WEIGHTS_OP = "dilated_attention_weights"
FUSED_KERNEL_SIZE = 3


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
    """Define `dilated_attention`: gather the keys and values of every window, and attend to them."""
    windows = check_arguments(OP, {"q": q, "k": k, "v": v}, num_heads, kernel_size, dilations, scale, border)
    weights = _reference_weights(q, k, windows)
    values, _ = _gathered(v.to(weights.dtype), windows)
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
    windows = check_arguments(WEIGHTS_OP, {"q": q, "k": k}, num_heads, kernel_size, dilations, scale, border)
    return _reference_weights(q, k, windows).permute(0, 3, 1, 2, 4).to(q.dtype)


def _reference_weights(q: Tensor, k: Tensor, windows: Windows) -> Tensor:
    """Return the softmax over the taps, (B, H, W, heads, taps), in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, inside = _gathered(k.to(wide), windows)
    queries = q.to(wide).unflatten(-1, (windows.num_heads, -1))
    logits = (queries[..., None, :] * keys).sum(dim=-1) * windows.scale
    if windows.border == "mask":
        logits = logits.masked_fill(~inside, -torch.inf)
    weights: Tensor = logits.softmax(dim=-1)
    return weights


def _gathered(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Gather a map (B, H, W, C) into (B, H, W, heads, taps, d), zeros outside, and tell which taps are in the image."""
    _, height, width, _ = x.shape
    heads, size = windows.num_heads // len(windows.dilations), windows.kernel_size
    gathered, inside = [], []
    for part, dilation in zip(x.chunk(len(windows.dilations), dim=-1), windows.dilations, strict=True):
        rows, real_rows = positions(height, size, dilation, windows.border, x.device)
        columns, real_columns = positions(width, size, dilation, windows.border, x.device)
        taps = part[:, rows][:, :, :, columns].transpose(2, 3)  # (B, H, W, k, k, channels)
        real = (real_rows[:, None, :, None] & real_columns[:, None]).flatten(-2)  # (H, W, taps)
        taps = torch.where(real[..., None], taps.flatten(3, 4), 0.0)
        gathered.append(taps.unflatten(-1, (heads, -1)).transpose(3, 4))
        inside.append(real[:, :, None].expand(-1, -1, heads, -1))
    return torch.cat(gathered, dim=3), torch.cat(inside, dim=2)


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _split(maps: Sequence[Any]) -> Sequence[Any]:
    """Return queries, keys and values, which come one by one or packed in one map (B, H, W, 3 C)."""
    return maps[0].chunk(3, dim=-1) if len(maps) == 1 else maps


class _PlanarAttention(Function):
    """The CPU path with its own backward, so that nothing but the arguments is saved."""

    @staticmethod
    def forward(ctx: ForwardContext, windows: Windows, *maps: Tensor) -> Tensor:
        ctx.windows = windows
        ctx.save_for_backward(*maps)
        return cpu.forward(_split(maps), windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, windows = ctx.saved_tensors, ctx.windows
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in maps]
        cpu.backward(grad, _split(maps), _split(grads), windows)
        return None, *(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad[1:], strict=True))


# --------------------------------------------------------------------------------------- the registered operator

_ARGUMENTS = "int num_heads, int[] dilations, float scale, str border"


def _launch_forward(
    maps: Sequence[Tensor], num_heads: int, dilations: Sequence[int], scale: float, border: str
) -> tuple[Tensor, Tensor]:
    from trifuse.kernels.gpu import dilated_attention as gpu

    return gpu.forward(_split(maps), num_heads, dilations, scale, border)


def _launch_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    normaliser: Tensor,
    num_heads: int,
    dilations: Sequence[int],
    scale: float,
    border: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    from trifuse.kernels.gpu import dilated_attention as gpu

    pairs = zip(maps, needed, strict=True)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None for x, need in pairs]
    gpu.backward(grad, _split(maps), normaliser, _split(grads), num_heads, dilations, scale, border)
    return [x for x in grads if x is not None]


def _shape_forward(
    maps: Sequence[Tensor], num_heads: int, dilations: Sequence[int], scale: float, border: str
) -> tuple[Tensor, Tensor]:
    *shape, channels = maps[0].shape
    normaliser = maps[0].new_empty((shape[0], num_heads, *shape[1:]), dtype=torch.float32)
    return maps[0].new_empty((*shape, channels // 3 if len(maps) == 1 else channels)), normaliser


def _shape_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    normaliser: Tensor,
    num_heads: int,
    dilations: Sequence[int],
    scale: float,
    border: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(maps, needed, strict=True) if need]


class _TritonAttention(Function):
    """The gradient of the registered operator: the arguments and the softmax's denominators are saved."""

    @staticmethod
    def forward(
        ctx: ForwardContext, num_heads: int, dilations: Sequence[int], scale: float, border: str, *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, normaliser = torch.ops.trifuse.dilated_attention(maps, num_heads, dilations, scale, border)
        ctx.options = (num_heads, dilations, scale, border)
        ctx.save_for_backward(normaliser, *maps)
        ctx.mark_non_differentiable(normaliser)
        ctx.set_materialize_grads(False)  # or zeros would be made for the normaliser
        return out, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        normaliser, *maps = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        backward = torch.ops.trifuse.dilated_attention_backward
        remaining = iter(backward(grad, maps, normaliser, *ctx.options, needed))
        return None, None, None, None, *(next(remaining) if need else None for need in needed)


def _differentiate(
    maps: Sequence[Tensor], num_heads: int, dilations: Sequence[int], scale: float, border: str
) -> tuple[Tensor, Tensor]:
    return _TritonAttention.apply(num_heads, dilations, scale, border, *maps)


_operator = library.register(
    f"{OP}(Tensor[] maps, {_ARGUMENTS}) -> (Tensor, Tensor)", _launch_forward, _shape_forward, _differentiate
)
library.register(
    f"{OP}_backward(Tensor grad, Tensor[] maps, Tensor normaliser, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


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
    """Attend from every pixel to the k x k pixels around it, as far apart as its head's dilation says.

    The result and all gradients are deterministic on every backend. The Triton kernels serve windows of 3 x 3; other
    sizes run in plain PyTorch on every device. The Triton and CPU paths can be differentiated once, a second
    differentiation raises; border ``shift`` on a CPU, and whatever runs in plain PyTorch elsewhere, is differentiated
    by autograd, which keeps the windows.

    Args:
        q: queries of shape (B, H, W, C), in any memory layout, such as a slice of one packed projection; it is not
            copied. Channels are ordered (dilation, head, channel of the head). float32, bfloat16, float16 or float64.
        k: keys of shape (B, H, W, C) and the type of q.
        v: values of shape (B, H, W, C) and the type of q.
        num_heads: number of heads, a multiple of the number of dilations; C must be a multiple of it.
        kernel_size: side k of the window, odd.
        dilations: distance in pixels between neighbours in a window, for each group of heads.
        scale: factor on the logits; None means (C / num_heads) ** -0.5.
        border: what a window that reaches out of the image sees there. ``"zero"`` (DilateFormer): zero keys and zero
            values, which take part in the softmax with logit 0 and so dilute the weights. ``"mask"``: nothing; the
            softmax is over the taps inside. ``"shift"`` (NATTEN): the window slides inside by multiples of its
            dilation until it fits; height and width must be at least kernel_size times the largest dilation.

    Returns:
        Tensor of shape (B, H, W, C), contiguous, in the type of q; logits, softmax and sums in float32 (float64 for
        float64).

    Raises:
        ShapeError: channels, heads, dilations, window or maps do not fit each other, or lie on different devices.
        TypeError: maps that are not floating point, or of different types.
        ValueError: an unknown border.
        BackendError: the Triton backend was forced and cannot run, such as for a window other than 3 x 3.

    Examples:
        >>> q, k, v = torch.randn(2, 64, 64, 3 * 72).chunk(3, dim=-1)
        >>> out = dilated_attention(q, k, v, num_heads=3)  # one head for each of the dilations 1, 2 and 3

    Source: DilateFormer, Eqs. 2-5; see the module's docstring for the gradients.
    """
    windows = check_arguments(OP, {"q": q, "k": k, "v": v}, num_heads, kernel_size, dilations, scale, border)
    return _attend((q, k, v), windows)


def packed_dilated_attention(qkv: Tensor, **windows: Any) -> Tensor:
    """Do what `dilated_attention` does with the three thirds of a map (B, H, W, 3 C), and return one packed gradient.

    Autograd would put the gradients of three slices together by another pass over all of them.
    """
    if type(qkv) is Tensor and qkv.ndim == 4 and qkv.shape[-1] % 3 == 0:  # equal thirds differ in nothing
        return _attend((qkv,), check_arguments(OP, {"q": qkv}, **windows, packed=3))
    return _attend((qkv,), check_arguments(OP, dict(zip("qkv", qkv.chunk(3, dim=-1), strict=False)), **windows))


@library.falls_back
def _attend(maps: tuple[Tensor, ...], windows: Windows) -> Tensor:
    backend = library.choose_backend(OP, maps[0])
    if backend == "reference":
        return dilated_attention_reference(*_split(maps), **windows._asdict())
    if windows.kernel_size != FUSED_KERNEL_SIZE and backend == "triton":
        if library.forced_backend() == "triton":
            raise BackendError(
                f"{OP}: the Triton backend was forced, but its kernels serve kernel_size {FUSED_KERNEL_SIZE} only, "
                f"got {windows.kernel_size}; use backend('torch')"
            )
        backend = "torch"
    if library.under_functional_transform(maps):
        return _dilated_windows.attend(_split(maps), windows)
    if backend == "triton":
        options = (windows.num_heads, windows.dilations, windows.scale, windows.border)
        return _operator(maps, *options)[0]
    if maps[0].device.type != "cpu" or windows.border == "shift" or library.without_values(maps):
        return _dilated_windows.attend(_split(maps), windows)
    return _PlanarAttention.apply(windows, *maps)


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
    """Return the attention map of `dilated_attention`: how much each pixel looks at each tap of its window.

    `dilated_attention` never writes it; it is recomputed here, to be looked at, in differentiable plain PyTorch.

    Args:
        q: queries of shape (B, H, W, C); see `dilated_attention` for all arguments.
        k: keys of shape (B, H, W, C).
        num_heads: number of heads.
        kernel_size: side k of the window, odd.
        dilations: distance in pixels between neighbours in a window, for each group of heads.
        scale: factor on the logits; None means (C / num_heads) ** -0.5.
        border: ``"zero"``, ``"mask"`` or ``"shift"``.

    Returns:
        Weights of shape (B, num_heads, H, W, kernel_size ** 2) in the type of q, taps row by row, adding up to 1. With
        border ``"zero"`` the taps outside of the image have their share, with ``"mask"`` theirs is 0.

    Raises:
        ShapeError, TypeError, ValueError: as `dilated_attention`.
        BackendError: the Triton backend was forced; the map has no kernel of its own.
    """
    windows = check_arguments(WEIGHTS_OP, {"q": q, "k": k}, num_heads, kernel_size, dilations, scale, border)
    forced = library.forced_backend(WEIGHTS_OP)
    if forced == "reference":
        return dilated_attention_weights_reference(q, k, **windows._asdict())
    reason = library.WITHOUT_KERNELS[WEIGHTS_OP]
    if forced == "triton":
        raise BackendError(f"{WEIGHTS_OP}: no Triton kernel, for {reason}; use backend('torch')")
    if forced is None:
        library.say_chosen(WEIGHTS_OP, "torch", reason)
    groups = [
        torch.cat(_dilated_windows.tap_weights(queries, keys, dilation, windows), dim=-1)
        for queries, keys, dilation in _dilated_windows.groups_of_heads((q, k), windows)
    ]
    return torch.cat(groups, dim=3).permute(0, 3, 1, 2, 4).to(q.dtype)
