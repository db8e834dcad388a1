"""Softmax attention that never writes the score matrix: PyTorch's fused kernels, or xformers' where PyTorch has none.

    out[b, i, a] = sum_j p[b, a, i, j] v[b, j, a]
    p[b, a, i, :] = softmax_j(scale <q[b, i, a], k[b, j, a]> + bias[b, a, i, j])

The score matrix of one 448 x 448 image in a ViT-g is 24 x 1025 x 1025 numbers, 16 times the queries themselves; a fused
kernel keeps tiles of it in registers and recomputes them in the backward pass. Vendors have written such kernels better
than we could, so this operator only chooses: `torch.nn.functional.scaled_dot_product_attention` (SDPA) wherever it has
a fused kernel, else xformers if a call on the spot shows that it works, else SDPA's unfused form.

Source: Vaswani et al., Attention Is All You Need, Eq. 1; Rabe and Staats, Self-attention Does Not Need O(n^2) Memory;
Dao et al., FlashAttention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trifuse.kernels import library
from trifuse.kernels.errors import BackendError, ShapeError
from trifuse.kernels.scalars import check_number

OP = "memory_efficient_attention"
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_PROBE_SHAPE = (1, 16, 2, 64)


def memory_efficient_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention as it is defined, with the whole score matrix in memory.

    See `memory_efficient_attention` for the arguments. float32, bfloat16 and float16 are computed in float32, float64
    in float64.
    """
    kept = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(kept), k.to(kept)) * _scale(q, scale)
    if attn_bias is not None:
        scores = scores + attn_bias.to(kept)
    hidden = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(hidden, 0.0), dim=-1).masked_fill(hidden, 0.0)
    weights = F.dropout(weights, dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v.to(kept)).to(q.dtype)


def memory_efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend from every query to every key with memory linear in the number of tokens.

    Under autocast it runs in autocast's type, as PyTorch's attention does. It can be differentiated once; a second
    differentiation raises wherever the implementation chosen has none. NaN spreads as far as the mathematics takes
    it, but PyTorch's CPU kernel may return zeros for a query of NaN with fewer keys than fit a vector register.

    Args:
        q: queries of shape (B, M_q, h, d), contiguous or not, e.g. a slice of one packed projection.
        k: keys of shape (B, M_k, h, d).
        v: values of shape (B, M_k, h, d).
        scale: factor on the scores; None means d ** -0.5.
        attn_bias: added to the scaled scores, of the queries' type, broadcastable to (B, h, M_q, M_k). A query whose
            keys are all hidden by -inf attends to nothing: its result is zeros.
        dropout_p: probability with which an attention weight is dropped, in [0, 1). The draw is PyTorch's own.

    Returns:
        Attended values of shape (B, M_q, h, d), of the queries' type.

    Raises:
        ShapeError: the shapes do not fit each other, or the tensors lie on different devices.
        TypeError: a type that attention is not computed in, or several types at once.
        BackendError: the Triton backend was forced; this operator has none.
    """
    _check(q, k, v, attn_bias, dropout_p)
    if scale is not None:
        check_number(f"{OP}: scale", scale)
    if attn_bias is not None:
        attn_bias = attn_bias[(None,) * (4 - attn_bias.dim())]
    forced = library.forced_backend(OP)
    if forced == "triton":
        raise BackendError(f"{OP}: no Triton kernel, for {library.WITHOUT_KERNELS[OP]}; use backend('torch')")
    if forced == "reference":
        return memory_efficient_attention_reference(q, k, v, scale=scale, attn_bias=attn_bias, dropout_p=dropout_p)
    if not (q.numel() and k.numel()):
        return _attend_to_nothing(q, k, v, attn_bias)
    if library.under_functional_transform((q, k, v)):
        with sdpa_kernel(SDPBackend.MATH):
            return _sdpa(q, k, v, scale, attn_bias, dropout_p)
    if _use_xformers(q):
        return _xformers(q, k, v, scale, attn_bias, dropout_p)
    return _sdpa(q, k, v, scale, attn_bias, dropout_p)


def _use_xformers(q: Tensor) -> bool:
    if torch.compiler.is_compiling() or library.forced_backend(OP) is not None:
        return False
    chosen, reason = attention_backend(q.device, q.dtype)
    library.say_chosen(OP, chosen, reason)
    return chosen == "xformers"


@cache
def attention_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return which implementation serves such tensors, ``"sdpa"`` or ``"xformers"``, and why.

    The answer comes from calling both on tiny tensors, once per device and type: an installed xformers may hold no
    kernel for this GPU or this version of PyTorch. Under `torch.compile` SDPA always serves, for the compiler knows it.
    """
    if device.type != "cuda":
        return "sdpa", f"xformers has no kernels for {device.type} tensors"
    sdpa = _obstacle(_sdpa_fused, device, dtype)
    if not sdpa:
        return "sdpa", f"PyTorch has a fused kernel for {dtype} on this GPU"
    xformers = _obstacle(_xformers, device, dtype)
    if not xformers:
        return "xformers", f"PyTorch has no fused kernel for {dtype} on this GPU ({sdpa})"
    return "sdpa", f"unfused, as neither PyTorch ({sdpa}) nor xformers ({xformers}) has a fused kernel for {dtype}"


def _obstacle(attend: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> str:
    """Call one implementation on tiny tensors, backward too; return nothing, or the first line of why not."""
    try:
        with torch.enable_grad():
            q, k, v = torch.zeros(3, *_PROBE_SHAPE, device=device, dtype=dtype, requires_grad=True).unbind(0)
            attend(q, k, v).sum().backward()
    except Exception as error:  # whatever a foreign extension raises is an answer
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def _attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return zeros, or nothing: where queries, keys or channels are missing, SDPA of torch 2.10 ends the process."""
    out = memory_efficient_attention_reference(q, k, v, attn_bias=bias)
    kind = q.device.type
    if q.dtype != torch.float64 and library.autocast_available(kind) and torch.is_autocast_enabled(kind):
        return out.to(torch.get_autocast_dtype(kind))
    return out


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale).transpose(1, 2)


def _sdpa_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(_FUSED):
        return _sdpa(q, k, v)


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    from xformers.ops import memory_efficient_attention as attend

    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    attended: Tensor = attend(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)
    return attended


def _scale(q: Tensor, scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    tensors = {"q": q, "k": k, "v": v} | ({} if bias is None else {"attn_bias": bias})
    for name, tensor in tensors.items():
        library.check_dtype(OP, name, tensor)
    library.check_same_device(OP, tensors)
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        types = ", ".join(f"{name} is {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"{OP}: expected one type for all arguments, got {types}; convert them with .to(...)")
    for name in "qkv":
        if tensors[name].dim() != 4:
            raise ShapeError(f"{OP}: expected {name} of shape (B, M, h, d), got {tuple(tensors[name].shape)}")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ShapeError(
            f"{OP}: expected q (B, M_q, h, d) and k, v (B, M_k, h, d) with the same B, h and d, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and not _broadcasts(bias.shape, scores):
        raise ShapeError(
            f"{OP}: expected attn_bias broadcastable to (B, h, M_q, M_k) = {scores}, got {tuple(bias.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: expected dropout_p in [0, 1), got {dropout_p}")


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
