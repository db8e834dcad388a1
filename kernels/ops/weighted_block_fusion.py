"""Weighted block fusion: the softmax-weighted sum of the maps that the blocks of a network produced.

    w = softmax(logits)                      (N,)
    fused[b, m, d] = sum_i w[i] * features[i][b, m, d]

    d fused / d features[i]:  w[i] * grad
    d fused / d logits[i]:    w[i] * (s[i] - sum_j w[j] * s[j]),   s[i] = sum_{b,m,d} grad * features[i]

Source: learnable weighting of the blocks of a frozen ViT (left-atrium segmentation with DINOv2, equations 1 and 2).

What fusing saves: `torch.stack` followed by a contraction moves 3N + 1 maps (read N, write N, read N, write 1). Here
forward reads N maps and writes one; backward reads the N maps and the gradient, and writes the N gradients in the same
pass where the maps are trained. At B=32, M=1025, D=768, N=12 in bfloat16, forward moves 0.65 GB, the stacked form
1.86 GB. Nothing but the arguments is saved for backward. A selection of k maps is written while all are added up, which
makes N + 1 + k. Copying each map to its place in a selection that the host does not know, or to none, makes 3N + 1: 37
instead of 17 for four of 12 maps, 121 instead of 45 for four of 40.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from trifuse.kernels import library
from trifuse.kernels.differentiation import BackwardContext, ForwardContext, Function, once_differentiable
from trifuse.kernels.errors import ShapeError
from trifuse.kernels.torch_internals import below_autograd

OP = "weighted_block_fusion"
# A chunk of the output, or of the incoming gradient, stays in a core's cache while all N maps pass by.
CHUNK_ELEMENTS = 1 << 18
# Where so few numbers are added up, doing so in float64 costs nothing that can be measured.
FEW_ELEMENTS = 1 << 12


@overload
def weighted_block_fusion_reference(features: Sequence[Tensor] | Tensor, logits: Tensor) -> Tensor: ...
@overload
def weighted_block_fusion_reference(
    features: Sequence[Tensor] | Tensor, logits: Tensor, selection: Tensor
) -> tuple[Tensor, ...]: ...
def weighted_block_fusion_reference(
    features: Sequence[Tensor] | Tensor, logits: Tensor, selection: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Define `weighted_block_fusion`: stack the maps, add them up weighted by the softmax of the logits."""
    stacked = torch.stack(tuple(features))
    compute_dtype = torch.promote_types(stacked.dtype, torch.float32)
    weights = torch.softmax(logits.to(compute_dtype), dim=0)
    # A matrix product would do the same, but in bfloat16 under autocast.
    fused = (weights[:, None, None, None] * stacked.to(compute_dtype)).sum(dim=0).to(stacked.dtype)
    return fused if selection is None else (fused, *stacked[selection].unbind())


# ---------------------------------------------------------------------------------------------- plain PyTorch


def _running_sum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse with differentiable operations alone: the form that compilers and functional transforms see through."""
    compute_dtype = torch.promote_types(features[0].dtype, torch.float32)
    weights = torch.softmax(logits.to(compute_dtype), dim=0)
    fused = weights[0] * features[0].to(compute_dtype)
    for i in range(1, len(features)):
        fused = fused + weights[i] * features[i].to(compute_dtype)
    return fused.to(features[0].dtype)


def _selected_by_comparison(features: Sequence[Tensor], selection: Tensor) -> list[Tensor]:
    """Return the selected maps where nobody can read which these are; NaN for an index that no map has."""
    selected = []
    for wanted in selection.unbind():
        found = torch.full_like(features[0], float("nan"))
        for i, feature in enumerate(features):
            found = torch.where(wanted == i, feature, found)
        selected.append(found)
    return selected


def _chunked_sum(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Fuse on a CPU: add all N maps to one chunk of the output before the next chunk is touched."""
    dtype = features[0].dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    weights = torch.softmax(logits.to(compute_dtype), dim=0).tolist()
    fused = torch.empty(features[0].shape, dtype=dtype)
    for chunk, *parts in _chunks([fused, *features]):
        total = chunk if dtype == compute_dtype else torch.empty(chunk.shape, dtype=compute_dtype)
        torch.mul(parts[0].to(compute_dtype), weights[0], out=total)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        if total is not chunk:
            chunk.copy_(total)
    return fused


def _logits_gradient(grad: Tensor, features: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Return the gradient of the logits (N,) on a CPU: sums of products by chunk, added up in Python's float64.

    It is a difference of sums that may be far larger, and so shows every rounding. `torch.sum` adds up in a tree, whose
    rounding hardly grows with the chunk; a dot product adds one after the other. Small maps are multiplied in float64.
    """
    compute_dtype = torch.promote_types(grad.dtype, torch.float64 if grad.numel() <= FEW_ELEMENTS else torch.float32)
    sums = [0.0] * len(features)
    for chunk, *parts in _chunks([grad, *features]):
        chunk = chunk.to(compute_dtype)
        products = torch.empty_like(chunk)  # stays in a core's cache, as the chunk does
        for i, part in enumerate(parts):
            sums[i] += torch.mul(chunk, part, out=products).sum().item()
        del products  # or it would stay in memory while the next one is made
    weights = torch.softmax(logits.double(), dim=0)
    totals = torch.tensor(sums, dtype=torch.float64)
    return (weights * (totals - weights.dot(totals))).to(logits.dtype)


def _map_gradients(grad: Tensor, logits: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the weighted gradient for each map that needs one."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    weights = torch.softmax(logits.to(wide.dtype), dim=0)
    return [(weight * wide).to(grad.dtype) if need else None for weight, need in zip(weights, needed, strict=True)]


def _chunks(maps: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut maps of one shape into aligned views of about CHUNK_ELEMENTS, whatever their strides."""
    if all(m.is_contiguous() for m in maps):
        yield from zip(*(m.view(-1).split(CHUNK_ELEMENTS) for m in maps), strict=True)
        return
    tokens = max(1, CHUNK_ELEMENTS // max(1, maps[0].shape[2]))
    for sample in zip(*maps, strict=True):
        yield from zip(*(m.split(tokens) for m in sample), strict=True)


class _ChunkedFusion(Function):
    """The CPU path with its own backward, so that nothing but the arguments is saved."""

    @staticmethod
    def forward(ctx: ForwardContext, logits: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *(features if logits.requires_grad else ()))
        return _chunked_sum(features, logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *features = ctx.saved_tensors
        needs_logits, *needs_features = ctx.needs_input_grad
        logits_grad = _logits_gradient(grad, features, logits) if needs_logits else None
        return logits_grad, *_map_gradients(grad, logits, needs_features)


# --------------------------------------------------------------------------------------- the registered operator


def _launch_forward(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    from trifuse.kernels.gpu import weighted_block_fusion as gpu

    return gpu.forward(features, logits)[0]


def _launch_selecting(features: Sequence[Tensor], logits: Tensor, selection: Tensor) -> list[Tensor]:
    from trifuse.kernels.gpu import weighted_block_fusion as gpu

    return gpu.forward(features, logits, selection)


def _launch_backward(
    grad: Tensor, features: Sequence[Tensor], logits: Tensor, needs_features: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    from trifuse.kernels.gpu import weighted_block_fusion as gpu

    return gpu.backward(grad, features, logits, needs_features)


def _shape_forward(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    return features[0].new_empty(features[0].shape)


def _shape_selecting(features: Sequence[Tensor], logits: Tensor, selection: Tensor) -> list[Tensor]:
    return [_shape_forward(features, logits) for _ in range(1 + len(selection))]


def _shape_backward(
    grad: Tensor, features: Sequence[Tensor], logits: Tensor, needs_features: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    return logits.new_empty(logits.shape), [grad.new_empty(grad.shape) for needed in needs_features if needed]


class _TritonFusion(Function):
    """The gradient of the registered operator: only what is asked for is saved, computed and returned."""

    @staticmethod
    def forward(ctx: ForwardContext, logits: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *(features if logits.requires_grad else ()))
        with below_autograd():
            fused: Tensor = torch.ops.trifuse.weighted_block_fusion(features, logits)
            return fused

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *features = ctx.saved_tensors
        needs_logits, *needs_features = ctx.needs_input_grad
        return tuple(_triton_gradients(grad, features, logits, needs_logits, needs_features))


class _TritonFusionSelecting(Function):
    """The gradient of the operator with a selection; selected maps have none where the maps have none."""

    @staticmethod
    def forward(ctx: ForwardContext, logits: Tensor, selection: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, selection, *(features if logits.requires_grad else ()))
        ctx.set_materialize_grads(False)
        with below_autograd():
            fused, *selected = torch.ops.trifuse.weighted_block_fusion_selecting(features, logits, selection)
        if True not in ctx.needs_input_grad[2:]:
            ctx.mark_non_differentiable(*selected)
        return fused, *selected

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardContext, grad: Tensor | None, *copy_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, selection, *features = ctx.saved_tensors
        needs_logits, _, *needs_features = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * (1 + len(needs_features))
        if grad is not None:
            gradients = _triton_gradients(grad, features, logits, needs_logits, needs_features)
        for wanted, copy_grad in zip(selection.unbind(), copy_grads, strict=True):
            for i, needed in enumerate(needs_features, start=1):
                if needed and copy_grad is not None:
                    own, rest = torch.where(wanted == i - 1, copy_grad, 0), gradients[i]
                    gradients[i] = own if rest is None else rest + own
        return gradients[0], None, *gradients[1:]


def _triton_gradients(
    grad: Tensor, features: Sequence[Tensor], logits: Tensor, needs_logits: bool, needs_features: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradient of the logits and that of each map, None where it is not needed."""
    if not needs_logits:
        return [None, *_map_gradients(grad, logits, needs_features)]
    logits_grad, map_grads = torch.ops.trifuse.weighted_block_fusion_backward(grad, features, logits, needs_features)
    remaining = iter(map_grads)
    return [logits_grad, *(next(remaining) if needed else None for needed in needs_features)]


def _differentiate(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    return _TritonFusion.apply(logits, *features)


def _differentiate_selecting(features: Sequence[Tensor], logits: Tensor, selection: Tensor) -> list[Tensor]:
    return list(_TritonFusionSelecting.apply(logits, selection, *features))


_operator = library.register(
    f"{OP}(Tensor[] features, Tensor logits) -> Tensor", _launch_forward, _shape_forward, _differentiate
)
_selecting_operator = library.register(
    f"{OP}_selecting(Tensor[] features, Tensor logits, Tensor selection) -> Tensor[]",
    _launch_selecting,
    _shape_selecting,
    _differentiate_selecting,
)
library.register(
    f"{OP}_backward(Tensor grad, Tensor[] features, Tensor logits, bool[] needs_features) -> (Tensor, Tensor[])",
    _launch_backward,
    _shape_backward,
)


# ---------------------------------------------------------------------------------------------- the public face


@overload
def weighted_block_fusion(features: Sequence[Tensor] | Tensor, logits: Tensor) -> Tensor: ...
@overload
def weighted_block_fusion(
    features: Sequence[Tensor] | Tensor, logits: Tensor, selection: Tensor
) -> tuple[Tensor, ...]: ...
@library.falls_back
def weighted_block_fusion(
    features: Sequence[Tensor] | Tensor, logits: Tensor, selection: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Fuse N maps into one: the sum of the maps, weighted by the softmax of the logits.

    Maps that need no gradient get none, and then cost nothing but the one pass that the logits' gradient reads. The
    result and all gradients are deterministic on every backend. Infinite or NaN logits give NaN, as `torch.softmax`
    does. The Triton and CPU paths can be differentiated once; a second differentiation raises.

    With a selection, copies of some maps are returned, too. The kernel writes them while it adds all maps up, and finds
    out on the GPU which these are: the host waits for nothing.

    Args:
        features: sequence of N maps of shape (B, M, D), or one stacked tensor of shape (N, B, M, D); strided views are
            taken as they are. float32, bfloat16, float16 or float64, one type for all. The maps are never stacked.
        logits: tensor of shape (N,), any floating type; the weights are its softmax, computed in float32 or wider.
        selection: int64 tensor of shape (k,), on the device of the maps: which of them are wanted, too, from 0 on.

    Returns:
        Tensor of shape (B, M, D), contiguous, in the type of the maps; sums are accumulated in block order in float32
        (float64 for float64 maps). With a selection, a tuple of 1 + k such tensors: the fused map, and the selected
        ones in the order of the selection. An index that no map has gives NaN where it cannot be read, as on a GPU.

    Raises:
        ShapeError: no maps, maps of different shapes or devices, logits not of shape (N,), a selection not of (k,).
        TypeError: maps or logits that are not floating point, maps of different types, a selection that is not int64.
        ValueError: an index that no map has, on a CPU.

    Examples:
        >>> maps = [torch.randn(2, 1024, 768) for _ in range(12)]
        >>> fused = weighted_block_fusion(maps, torch.zeros(12))  # the mean of the maps

    Source: equations 1 and 2 of the weighted-block-fusion paper; see the module's docstring for the gradients.
    """
    features = _checked(features, logits)
    if selection is not None:
        return _fused_and_selected(features, logits, _checked_selection(features, selection))
    backend = library.choose_backend(OP, features[0])
    if backend == "reference":
        return weighted_block_fusion_reference(features, logits)
    if library.under_functional_transform((logits, *features)):
        return _running_sum(features, logits)
    if backend == "triton":
        return _operator(features, logits)
    if features[0].device.type != "cpu" or library.without_values((logits, *features)):
        return _running_sum(features, logits)
    return _ChunkedFusion.apply(logits, *features)


def _fused_and_selected(features: tuple[Tensor, ...], logits: Tensor, selection: Tensor) -> tuple[Tensor, ...]:
    backend = library.choose_backend(OP, features[0])
    if backend == "reference":
        return weighted_block_fusion_reference(features, logits, selection)
    if library.under_functional_transform((logits, selection, *features)):
        return _running_sum(features, logits), *_selected_by_comparison(features, selection)
    if backend == "triton":
        return tuple(_selecting_operator(features, logits, selection))
    fused = weighted_block_fusion(features, logits)
    if not library.values_at_hand((selection,)):
        return fused, *_selected_by_comparison(features, selection)
    return fused, *(features[index].clone(memory_format=torch.contiguous_format) for index in selection.tolist())


def _checked(features: Sequence[Tensor] | Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Return the maps as a tuple, or raise what is wrong with them."""
    if isinstance(features, Tensor) and features.ndim != 4:
        raise ShapeError(
            f"{OP}: features is one tensor of shape {tuple(features.shape)}; expected (N, B, M, D), or a sequence of N "
            "maps of shape (B, M, D)"
        )
    maps = tuple(features)
    if not maps:
        raise ShapeError(f"{OP}: features is empty; expected at least one map of shape (B, M, D)")
    first = maps[0]
    for i, feature in enumerate(maps):
        if not isinstance(feature, Tensor):
            library.check_tensor(OP, f"features[{i}]", feature)
    library.check_dtype(OP, "features[0]", first)
    library.check_dtype(OP, "logits", logits)
    if first.ndim != 3:
        raise ShapeError(
            f"{OP}: features[0] has shape {tuple(first.shape)}; expected (B, M, D); "
            "flatten an image-shaped map with x.flatten(2).transpose(1, 2)"
        )
    shape, dtype, device = first.shape, first.dtype, first.device
    for i, feature in enumerate(maps):
        if feature.shape != shape:
            raise ShapeError(
                f"{OP}: features[{i}] has shape {tuple(feature.shape)}; expected {tuple(first.shape)}, the shape of "
                "features[0]; bring all maps to one grid and width first"
            )
        if feature.dtype != dtype:
            raise TypeError(
                f"{OP}: features[{i}] is {feature.dtype}; expected {first.dtype}, the type of features[0]; "
                "convert with .to(...)"
            )
        if feature.device != device:
            raise ShapeError(
                f"{OP}: features[{i}] is on {feature.device}; expected {first.device}, the device of features[0]; "
                "move it with .to(device)"
            )
    if logits.shape != (len(maps),):
        raise ShapeError(
            f"{OP}: logits has shape {tuple(logits.shape)}; expected ({len(maps)},), one logit for each map"
        )
    library.check_same_device(OP, {"features": first, "logits": logits})
    return maps


def _checked_selection(features: Sequence[Tensor], selection: Tensor) -> Tensor:
    """Return the selection, or raise what is wrong with it."""
    library.check_tensor(OP, "selection", selection)
    if selection.dtype != torch.int64:
        raise TypeError(f"{OP}: selection is {selection.dtype}; expected torch.int64; convert it with .to(...)")
    if selection.ndim != 1:
        raise ShapeError(f"{OP}: selection has shape {tuple(selection.shape)}; expected (k,), the indices of k maps")
    library.check_same_device(OP, {"features": features[0], "selection": selection})
    if library.values_at_hand((selection,)) and not library.under_functional_transform((selection,)):
        missing = [index for index in selection.tolist() if not 0 <= index < len(features)]
        if missing:
            raise ValueError(f"{OP}: selection asks for maps {missing}; expected indices from 0 to {len(features) - 1}")
    return selection
