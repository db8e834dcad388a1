"""What a network costs: parameters and floating-point operations, for the whole and for each of its parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trifuse.architectures.runs.registry import experiment
from trifuse.kernels import backend

_GIGA = 1e9


@dataclass(frozen=True)
class Cost:
    """What a network, or one part of it, costs for one image.

    Args:
        part: its name in the network.
        parameters: numbers that it learns or was given.
        gflops: 1e9 floating-point operations of convolutions and matrix products, two for each multiply-add.
        attention_gflops: those of them that multiply queries with keys, and weights with values.
    """

    part: str
    parameters: int
    gflops: float
    attention_gflops: float


def network_costs(model: nn.Module, image_shape: tuple[int, int, int, int], **side_inputs: Tensor) -> list[Cost]:
    """Count one evaluation of images of that shape by ``model``, on the meta device like ``side_inputs``.

    Counted is the reference form of every operator, whose work no fused kernel hides.

    Returns:
        The costs of each direct part, and, last, of the whole.
    """
    counter = FlopCounterMode(display=False)
    with backend("reference"), torch.no_grad(), counter:
        model.eval()(torch.empty(image_shape, device="meta"), **side_inputs)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    costs = [_cost(part, module, _counted(counts, f"{root}.{part}", module)) for part, module in model.named_children()]
    return [*costs, _cost("all", model, counts["Global"])]


def _counted(counts: dict[str, dict[Any, int]], path: str, module: nn.Module) -> dict[Any, int]:
    """Operations by kind of a module, or of the children of one that is only a list of them."""
    if path in counts or not isinstance(module, nn.ModuleList):
        return counts.get(path, {})
    found: Counter[Any] = Counter()
    for name, child in module.named_children():
        found.update(_counted(counts, f"{path}.{name}", child))
    return found


def _cost(part: str, module: nn.Module, counts: dict[Any, int]) -> Cost:
    attention = counts.get(torch.ops.aten.bmm, 0)
    return Cost(
        part,
        sum(parameter.numel() for parameter in module.parameters()),
        sum(counts.values()) / _GIGA,
        attention / _GIGA,
    )


def count_costs(name: str) -> dict[str, Any]:
    """Return, as JSON values, what the network of that name costs, all options and the image size as by default."""
    known = experiment(name)
    network = known.load(known.network)
    with torch.device("meta"):
        model = network(network.config_type())
    preprocessing = known.load(known.recipe)().data.preprocessing
    side = preprocessing.image_size
    shape = (1, preprocessing.channels, side, side)
    shapes = known.load(known.input_shapes, lambda config, side: {})(model.config, side)
    side_inputs = {name: torch.empty(1, *size, device="meta") for name, size in shapes.items()}
    return {
        "network": name,
        "image": " with ".join([f"{shape[1]} x {side} x {side}", *side_inputs]),
        "costs": [asdict(cost) for cost in network_costs(model, shape, **side_inputs)],
    }


def format_costs(found: dict[str, Any]) -> str:
    """Return what `count_costs` found as a table to read."""
    lines = [
        f"{found['network']}, one image of {found['image']}, reference form, 2 operations per multiply-add",
        f"  {'part':<16} {'parameters':>14} {'GFLOPs':>10} {'of these attention':>20}",
    ]
    for cost in found["costs"]:
        lines.append(
            f"  {cost['part']:<16} {cost['parameters']:>14,} {cost['gflops']:>10.2f} {cost['attention_gflops']:>20.2f}"
        )
    return "\n".join(lines)
