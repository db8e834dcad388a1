"""Segment FiLM gate: the temporal FiLM gate, with an ECG whose map follows the segments of the heart's wall.

    ecg   = shared + segment_scores[segments] * direction       (B, C, H, W), the score of label 0 being 0
    mixed = features * w_mri + ecg * w_ecg
    out   = features + mixed * (1 + scale) + shift

The ECG's map is of rank one beyond its constant part: one score per segment, along one direction of the channels. The
whole is an affine map per sample and channel, and one number t per position, so the ECG's map is never made:

    out = a * features + b + d * t,   t = segment_scores[segments]
    a   = 1 + w_mri (1 + scale),   b = w_ecg shared (1 + scale) + shift,   d = w_ecg direction (1 + scale)

    d out / d features:  a * grad
    d out / d a:         sum_{h, w} grad * features
    d out / d b:         sum_{h, w} grad
    d out / d d:         sum_{h, w} grad * t
    d out / d score s:   sum_{h, w where segments = s} sum_c grad * d

and the gradients of shared, direction, weights, scale and shift follow from those of a, b and d on (B, C) numbers.

Segments are hard labels, at the map's size: one byte per position, where a mask per segment would be 17. Who has soft
masks chooses for every position the segment that covers most of it, or 0 where none covers as much as what is outside.

Source: temporal-aware feature fusion of TAFF-UNet, with the projection of the ECG per segment of the atlas (AHA-17).

What fusing saves: step by step, forward moves some sixteen maps, and backward more than twenty. Here forward reads one
map and its labels and writes one; backward reads the gradient and the map and writes the map's gradient, in one pass.
No map is saved but the one that came in, and that only where another gradient than its own is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.kernels import library
from trifuse.kernels.cpu.channel_affine import channel_affine, channel_affine_gradients
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import DataError
from trifuse.kernels.torch_internals import below_autograd

from ._map_shape import check_map

OP = "segment_film_gate"
MOST_SEGMENTS = 255  # that labels of a byte name, beside 0
# Of fewer, in float32 or wider, the maps that autograd makes stay in a cache, and its gradients take fewer steps.
FEWEST_ELEMENTS = 1 << 18


def segment_film_gate_reference(
    features: Tensor,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Define `segment_film_gate`: make the ECG's map from the labels, mix, modulate, and add the result to the map."""
    compute_dtype = torch.promote_types(features.dtype, torch.float32)
    given = (features, shared, segment_scores, direction, weights, scale, shift)
    f, p, scores, v, w, gamma, beta = (value.to(compute_dtype) for value in given)
    score_of_label = F.pad(scores, (1, MOST_SEGMENTS - scores.shape[1]))  # 0 outside the wall
    samples = torch.arange(len(f), device=f.device)[:, None, None]
    score = score_of_label[samples, segments.long()]
    ecg = p[:, :, None, None] + score[:, None] * v[:, None, None]
    mixed = f * w[:, 0, None, None, None] + ecg * w[:, 1, None, None, None]
    return (f + mixed * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]).to(features.dtype)


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _coefficients(
    shared: Tensor, direction: Tensor, weights: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b and d of the affine map, (B, C) each, in the type that sums are made in."""
    shared, direction, weights, scale, shift = (value.to(dtype) for value in (shared, direction, weights, scale, shift))
    modulation = 1 + scale
    of_ecg = weights[:, 1:] * modulation
    return 1 + weights[:, :1] * modulation, of_ecg * shared + shift, of_ecg * direction


def _scores_by_comparison(segments: Tensor, scores: Tensor) -> Tensor:
    """Return t, (B, H, W), without a look-up, whose gradient several threads would scatter, in no fixed order."""
    labels = torch.arange(1, scores.shape[1] + 1, device=segments.device)
    at_label = segments[:, None] == labels[:, None, None]
    return torch.where(at_label, scores[:, :, None, None], 0.0).sum(1)


def _affine(features: Tensor, a: Tensor, b: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Apply the map with differentiable operations alone, which compilers and transforms see through."""
    a, b, d = (value[:, :, None, None] for value in (a, b, d))
    return (features.to(a.dtype) * a + (b + d * t[:, None])).to(features.dtype)


_PIECES, _SHORT_ROW = 16, 64


class _SegmentAffine(Function):
    """The CPU path: the affine map as the temporal gate has it, and a product of matrices, D t, added in place.

    The gradients of d and t are products of matrices as well. No wider copy of any map is saved.
    """

    @staticmethod
    def forward(ctx: ForwardContext, features: Tensor, a: Tensor, b: Tensor, d: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(a, d, t, *((features,) if a.requires_grad else ()))
        wide = channel_affine(features.to(a.dtype), a, b)
        return wide.addcmul_(d[:, :, None, None], t[:, None]).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, d, t, *saved = ctx.saved_tensors
        features = saved[0] if saved else grad  # any map of this shape, where the gradient of a is not asked for
        *needed, needs_d, needs_t = ctx.needs_input_grad
        grads = channel_affine_gradients(grad, features, a, needed)
        rows = grad.flatten(2).to(a.dtype) if needs_d or needs_t else grad
        with torch.autocast("cpu", enabled=False):  # which would multiply matrices in bfloat16
            of_d = _sums_of_products(rows, t.flatten(1)) if needs_d else None
            of_t = torch.bmm(d[:, None], rows).view(t.shape) if needs_t else None
        return *grads, of_d, of_t


def _sums_of_products(rows: Tensor, t: Tensor) -> Tensor:
    """Return the sums over positions of rows (B, C, N) times t (B, N), (B, C).

    Some processors' products of matrices add up a row from end to end: shorter pieces of it round off less.
    """
    length = max(_SHORT_ROW, -(-t.shape[1] // _PIECES))
    pieces = zip(rows.split(length, 2), t.split(length, 1), strict=True)
    return torch.stack([torch.bmm(row, each[:, :, None])[:, :, 0] for row, each in pieces]).sum(0)


def _scores_by_lookup(segments: Tensor, scores: Tensor) -> Tensor:
    """Return t, (B, H, W); a label above the number of scores counts as 0."""
    score_of_label = F.pad(scores, (1, MOST_SEGMENTS - scores.shape[1]))
    return score_of_label.gather(1, segments.flatten(1).long()).view(segments.shape)


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(features: Tensor, segments: Tensor, *small: Tensor) -> Tensor:
    from trifuse.kernels.gpu import segment_film_gate as gpu

    return gpu.forward(features, segments, *small)


def _launch_backward(
    grad: Tensor,
    features: Tensor | None,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    from trifuse.kernels.gpu import segment_film_gate_backward as gpu

    small = (shared, segment_scores, direction, weights, scale, shift)
    return gpu.backward(grad, features, segments, *small, needs_features)


def _shape_backward(
    grad: Tensor,
    features: Tensor | None,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs_features: bool,
) -> list[Tensor]:
    given = (shared, segment_scores, direction, weights, scale, shift)
    small = [] if features is None else [value.new_empty(value.shape) for value in given]
    return [*small, *([torch.empty_like(grad if features is None else features)] if needs_features else [])]


class _TritonGate(Function):
    """The gradient of the registered operator: the map is saved where a gradient other than its own is asked for."""

    @staticmethod
    def forward(ctx: ForwardContext, features: Tensor, segments: Tensor, *small: Tensor) -> Tensor:
        ctx.save_for_backward(segments, *small, *((features,) if any(ctx.needs_input_grad[2:]) else ()))
        with below_autograd():
            gated: Tensor = torch.ops.trifuse.segment_film_gate(features, segments, *small)
            return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_features, _, *needs_small = ctx.needs_input_grad
        *others, features = ctx.saved_tensors if any(needs_small) else (*ctx.saved_tensors, None)
        grads = torch.ops.trifuse.segment_film_gate_backward(grad, features, *others, needs_features)
        asked = (value if need else None for value, need in zip(grads, needs_small, strict=False))
        return grads[-1] if needs_features else None, None, *(asked if any(needs_small) else (None,) * 6)


_OTHERS = (
    "Tensor segments, Tensor shared, Tensor segment_scores, Tensor direction, Tensor weights, Tensor scale, "
    "Tensor shift"
)
_operator = library.register(
    f"{OP}(Tensor features, {_OTHERS}) -> Tensor",
    _launch_forward,
    lambda features, *others: torch.empty_like(features),
    lambda *arguments: _TritonGate.apply(*arguments),
)
library.register(
    f"{OP}_backward(Tensor grad, Tensor? features, {_OTHERS}, bool needs_features) -> Tensor[]",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@library.falls_back
def segment_film_gate(
    features: Tensor,
    segments: Tensor,
    shared: Tensor,
    segment_scores: Tensor,
    direction: Tensor,
    weights: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Mix a map with an ECG seen segment by segment, modulate, and add to the map.

    The result is ``features + (features * w_mri + ecg * w_ecg) * (1 + scale) + shift``, where the ecg at a position of
    segment s is ``shared + segment_scores[s] * direction``, and ``shared`` alone at a position of none. Where a
    sample's weights, scale and shift are 0 and its ECG is finite, its result equals its features. The result and all
    gradients are deterministic on every backend. The Triton path can be differentiated once, and so can maps on a CPU
    that are large, or of less than float32; a second differentiation raises.

    Args:
        features: maps of shape (B, C, H, W), strided as they may be; float32, bfloat16, float16 or float64.
        segments: label of every position, uint8 of shape (B, H, W), strided as they may be: 0 for none, s for segment
            s, from 1 to S. Tensors on a GPU, and those of a graph that is being compiled, are not looked at: there a
            larger label counts as 0.
        shared: the ECG at every position, one value per sample and channel, (B, C), any floating type.
        segment_scores: one number per sample and segment, (B, S), any floating type; S is 17 for the AHA's segments,
            and at most 255.
        direction: how a score changes the channels, (C,), any floating type.
        weights: (B, 2), any floating type: w_mri and w_ecg of each sample.
        scale: FiLM's gamma, (B, C), any floating type.
        shift: FiLM's beta, (B, C), any floating type.

    Returns:
        Tensor of shape (B, C, H, W) in the type and, where features is dense, the memory layout of features, computed
        in float32 (float64 for float64 features).

    Raises:
        ShapeError: an argument has another shape, or lies on another device.
        TypeError: segments is not uint8, or another argument is not floating point.
        DataError: a label is above S; on a CPU only.

    Examples:
        >>> weights = torch.softmax(logits, dim=1)
        >>> fused = segment_film_gate(features, segments, shared, segment_scores, direction, weights, scale, shift)

    Source: temporal-aware feature fusion of TAFF-UNet, the ECG projected per segment of the atlas; FiLM is Perez et
    al., 2018.
    """
    arguments = (features, segments, shared, segment_scores, direction, weights, scale, shift)
    _check(*arguments)
    transformed = library.under_functional_transform(arguments)
    if not transformed and library.values_at_hand(arguments):
        _check_labels(segments, segment_scores.shape[1])
    backend = library.choose_backend(OP, features)
    if backend == "reference":
        return segment_film_gate_reference(*arguments)
    if backend == "triton" and not transformed:
        return _operator(*arguments)
    dtype = torch.promote_types(features.dtype, torch.float32)
    a, b, d = _coefficients(shared, direction, weights, scale, shift, dtype)
    if transformed or features.device.type != "cpu" or library.without_values(arguments):
        return _affine(features, a, b, d, _scores_by_comparison(segments, segment_scores.to(dtype)))
    t = _scores_by_lookup(segments, segment_scores.to(dtype))
    few = features.dtype == dtype and features.numel() < FEWEST_ELEMENTS
    return _affine(features, a, b, d, t) if few else _SegmentAffine.apply(features, a, b, d, t)


def _check(features: Tensor, segments: Tensor, *small: Tensor) -> None:
    names = ("shared", "segment_scores", "direction", "weights", "scale", "shift")
    given = {"features": features, **dict(zip(names, small, strict=True))}
    for name, value in given.items():
        library.check_dtype(OP, name, value)
    library.check_tensor(OP, "segments", segments)
    if segments.dtype != torch.uint8:
        raise TypeError(
            f"{OP}: segments is {segments.dtype}; expected uint8, a label for every position; convert labels with "
            ".to(torch.uint8), and masks with their argmax"
        )
    check_map(OP, "features", features)
    given["segments"] = segments
    batch, channels, height, width = features.shape
    scores = given["segment_scores"]
    count = scores.shape[1] if scores.ndim == 2 else 17
    per_channel = ("(B, C)", (batch, channels))
    expected = {
        "segments": ("(B, H, W)", (batch, height, width)),
        "shared": per_channel,
        "segment_scores": ("(B, S)", (batch, min(count, MOST_SEGMENTS))),
        "direction": ("(C,)", (channels,)),
        "weights": ("(B, 2)", (batch, 2)),
        "scale": per_channel,
        "shift": per_channel,
    }
    library.check_shapes(OP, given, expected, features)
    library.check_same_device(OP, given)


def _check_labels(segments: Tensor, count: int) -> None:
    if segments.numel() and (largest := int(segments.max())) > count:
        raise DataError(
            f"{OP}: segments",
            got=f"label {largest}",
            want=f"0 for no segment, or 1 to {count}, one for each score",
            hint="give segment_scores as many columns as there are segments, or set other labels to 0",
        )
