"""What people do to the convolutions, linear layers and norms of a network that is there already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._pytree import tree_map_only

from trifuse.blocks.ecg_attention import GroupedLayerNorm, GroupedLinear

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GroupedLinear)
LAYERS += (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, GroupedLayerNorm)


class Adapter(nn.Module):
    """Stands in a layer's place, calls it, and adds a term that learns; of the layer it shows nothing."""

    def __init__(self, layer: nn.Module, size: float = 0.5) -> None:
        super().__init__()
        self.base_layer, self.size = layer, _learned(layer, size)

    def forward(self, *given: Tensor) -> Tensor:
        return with_term(self.base_layer(*given), self.size)


class ShownAdapter(Adapter):
    """The same, with the layer's weight and bias to be read, as peft's adapters have them."""

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)


class Rounded(nn.Module):
    """Stands in a layer's place as a dynamic quantisation does: no parameters, and a weight that is a method."""

    def __init__(self, layer: nn.Module, steps: float = 4.0) -> None:
        super().__init__()
        self.steps, self._layer = steps, [layer]

    def weight(self) -> Tensor:
        return self._layer[0].weight

    def forward(self, *given: Tensor) -> Tensor:
        return (self._layer[0](*given) * self.steps).round() / self.steps


def _learned(layer: nn.Module, size: float) -> nn.Parameter:
    weight = next(layer.parameters())
    return nn.Parameter(weight.new_tensor(size), requires_grad=weight.requires_grad)


def with_term(result: Tensor, size: Tensor) -> Tensor:
    """Add what no normalisation, softmax or later zero takes away: it differs between all elements of a result."""
    places = torch.arange(result.numel(), dtype=result.dtype, device=result.device)
    return result + size * (places.view_as(result) + result).cos()


def _replaced(kind: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, str], nn.Module]:
    def change(parent: nn.Module, name: str) -> nn.Module:
        layer = kind(getattr(parent, name))
        setattr(parent, name, layer)
        return layer

    return change


def _adapted(kind: type[Adapter]) -> Callable[[nn.Module, str], nn.Parameter]:
    return lambda parent, name: _replaced(kind)(parent, name).size


def _hooked(parent: nn.Module, name: str) -> nn.Parameter:
    layer = getattr(parent, name)
    layer.hooked = _learned(layer, 0.5)
    layer.register_forward_hook(lambda layer, given, result: with_term(result, layer.hooked))
    return layer.hooked


def _hooked_before(parent: nn.Module, name: str) -> nn.Parameter:
    layer = getattr(parent, name)
    layer.hooked = _learned(layer, 0.5)
    layer.register_forward_pre_hook(lambda layer, given: (with_term(given[0], layer.hooked), *given[1:]))
    return layer.hooked


def _overridden(parent: nn.Module, name: str) -> nn.Parameter:
    layer = getattr(parent, name)
    layer.added, written = _learned(layer, 0.5), layer.forward
    layer.forward = lambda *given: with_term(written(*given), layer.added)
    return layer.added


def _normed_by_a_hook(parent: nn.Module, name: str) -> nn.Parameter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(getattr(parent, name)).weight_v


def _normed(parent: nn.Module, name: str) -> nn.Parameter:
    return parametrizations.weight_norm(getattr(parent, name)).parametrizations.weight.original1


def _pruned(parent: nn.Module, name: str) -> nn.Parameter:
    return prune.l1_unstructured(getattr(parent, name), "weight", 0.5).weight_orig


CHANGES: dict[str, Callable[[nn.Module, str], nn.Parameter]] = {
    "adapter": _adapted(Adapter),
    "adapter that shows the weight": _adapted(ShownAdapter),
    "forward hook": _hooked,
    "forward pre-hook": _hooked_before,
    "forward of its own": _overridden,
    "weight norm by a hook": _normed_by_a_hook,
    "weight norm by a parametrization": _normed,
    "pruning": _pruned,
}
"""Each changes the layer of that name of a module, and returns a parameter by which what is added acts."""

SILENT = tuple(name for name in CHANGES if name.startswith("weight norm"))
"""The changes that leave a result as it was at first."""

rounded = _replaced(Rounded)


def quantised(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers, those of PyTorch's own class, are quantised dynamically, in 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, UserWarning))
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of every module of a model that is there to be called, and the module."""
    for path, part in list(model.named_modules())[1:]:
        if not isinstance(part, nn.ModuleList):
            yield path, part


@contextmanager
def hooked_with_a_term(part: nn.Module, size: float = 0.5) -> Iterator[None]:
    """Add a term, by a hook, to every tensor that calls of a module return inside the block."""
    term = torch.tensor(size, dtype=torch.float64)
    handle = part.register_forward_hook(
        lambda part, given, result: tree_map_only(Tensor, lambda x: with_term(x, term.to(x)), result)
    )
    try:
        yield
    finally:
        handle.remove()


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the path of every convolution, linear layer and norm with weights, its parent module, and its name."""
    for path, module in list(model.named_modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LAYERS) and layer.weight is not None:
                yield f"{path}.{name}".lstrip("."), module, name
