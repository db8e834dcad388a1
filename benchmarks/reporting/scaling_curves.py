"""What is timed to see how cost grows: computations at several sizes of one thing, and tiny ones that only run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.kernels import (
    depthwise_multi_kernel,
    dilated_attention,
    memory_efficient_attention,
    mutation_loss,
    temporal_film_gate,
    upsample_argmax,
    weighted_block_fusion,
)
from trifuse.kernels.testing.comparing import FEWEST

Work = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """One computation at several sizes of one thing.

    Args:
        name: the operator or network, and what of it is timed.
        axis: what grows.
        sizes: how large it is; the exponent is over these.
        make: prepares the computation at a size.
        work: the exponent of its arithmetic, None where it lies between two.
        kernels: whether it must launch Triton kernels of ours on a GPU.
        few: options of `measure` with which little is run.
    """

    name: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int, torch.device], Work]
    work: float | None = 1.0
    kernels: bool = True
    few: Mapping[str, int] = field(default_factory=dict)


def normal(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device)


def forward_and_backward(function: Callable[..., Tensor], *arguments: Any, leaves: Sequence[Tensor]) -> Work:
    """Return a call of ``function`` and of its gradients, for an incoming gradient that is already there."""
    for leaf in leaves:
        leaf.requires_grad_(True)
    with torch.no_grad():
        incoming = torch.ones_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), leaves, incoming)


def fusion(maps: int, batch: int, tokens: int, device: torch.device) -> Work:
    features = [normal(batch, tokens, 384, device=device) for _ in range(maps)]
    logits = normal(maps, device=device)
    return forward_and_backward(weighted_block_fusion, features, logits, leaves=[logits])


def dilated(side: int, batch: int, dilations: int, device: torch.device) -> Work:
    q, k, v = (normal(batch, side, side, 24 * dilations, device=device) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(q, k, v, num_heads=dilations, dilations=range(1, dilations + 1))

    return forward_and_backward(attend, q, k, v, leaves=[q, k, v])


def depthwise(side: int, channels: int, device: torch.device) -> Work:
    x = normal(2, channels, side, side, device=device)
    weights = [normal(channels, 1, kernel, kernel, device=device) / kernel for kernel in (5, 7)]
    return forward_and_backward(depthwise_multi_kernel, x, weights, leaves=[x, *weights])


def film(side: int, device: torch.device) -> Work:
    features, ecg, weights, gamma, beta = (
        normal(*shape, device=device) for shape in ((4, 128, side, side), (4, 128), (4, 2), (4, 128), (4, 128))
    )
    tensors = [features, ecg, weights, gamma, beta]
    return forward_and_backward(temporal_film_gate, *tensors, leaves=tensors)


def subsets(side: int, maps: int, classes: int, device: torch.device) -> Work:
    logits = [normal(1, classes, side, side, device=device) for _ in range(maps)]
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(classes, (1, side, side), generator=generator, device=device)
    # all non-empty subsets, 2**maps - 1 of them
    return forward_and_backward(lambda *maps: mutation_loss(list(maps), target), *logits, leaves=logits)


def labels(side: int, classes: int, device: torch.device) -> Work:
    maps = [normal(2, classes, side // step, side // step, device=device) for step in (16, 8, 4)]
    return lambda: upsample_argmax(maps, (side, side))


def attention(tokens: int, device: torch.device) -> Work:
    q, k, v = (normal(1, tokens, 6, 64, device=device) for _ in range(3))
    return lambda: memory_efficient_attention(q, k, v)


def plain_step(side: int, batch: int, device: torch.device) -> Work:
    from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig

    network = PlainUNet(PlainUNetConfig(num_classes=4, image_size=256, base_dim=8, num_stages=4)).to(device).train()
    image = normal(batch, 1, side, side, device=device)
    target = torch.zeros(batch, side, side, dtype=torch.int64, device=device)
    loss, parameters = SegmentationLoss(), list(network.parameters())
    batch_of = {"target": target}
    return lambda: torch.autograd.grad(loss(network(image), batch_of, None), parameters, allow_unused=True)


def fias_step(batch: int, device: torch.device) -> Work:
    from trifuse.architectures.fias import Fias, FiasConfig

    network = Fias(FiasConfig(variant="nano", num_classes=5)).to(device).train()
    image = normal(batch, 1, 64, 64, device=device)
    target = torch.zeros(batch, 64, 64, dtype=torch.int64, device=device)
    parameters = list(network.parameters())

    def step() -> object:
        torch.manual_seed(0)
        return torch.autograd.grad(mutation_loss(network(image), target), parameters, allow_unused=True)

    return step


def dino_labels(side: int, device: torch.device) -> Work:
    from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig

    network = DinoUNet(DinoUNetConfig(variant="tiny", pos_mode="size", stream_fusion=True)).to(device).eval()
    image = normal(1, 3, side, side, device=device)
    return torch.no_grad()(lambda: network(image))


def squares(*sides: int, by: int = 1) -> tuple[int, ...]:
    """Return the numbers of pixels of square images of the sides, divided by ``by``."""
    return tuple((side // by) ** 2 for side in sides)


def of_side(make: Callable[..., Work], *others: int) -> Callable[[int, torch.device], Work]:
    """Return what prepares a computation on a square image of so many pixels, given what does so for its side."""
    return lambda pixels, device: make(isqrt(pixels), *others, device)


def _curves(*, tiny: bool = False) -> tuple[Curve, ...]:
    """Return the curves; tiny ones have two small sizes each."""
    by, halved, quartered, classes = (16, 2, 4, 2) if tiny else (1, 1, 1, 9)
    tokens, side, large, image = 1024 // by, 32 // by, 128 // by, 64 // halved
    of_maps = squares(16, 32, 64, 96, by=by)
    listed = (
        Curve("block fusion", "batch", (1, 2, 4, 8), lambda size, device: fusion(12, size, tokens, device)),
        Curve("block fusion", "maps N", (3, 6, 12, 24), lambda size, device: fusion(size, 1, tokens, device)),
        Curve("dilated attention", "batch", (1, 2, 4, 8), lambda size, device: dilated(side, size, 3, device)),
        Curve("dilated attention", "pixels", of_maps, of_side(dilated, 1, 3)),
        Curve("dilated attention", "dilations", (1, 2, 4, 8), lambda size, device: dilated(side, 1, size, device)),
        Curve("depthwise kernels", "pixels", of_maps, of_side(depthwise, 72 // by)),
        Curve("temporal FiLM gate", "pixels", of_maps, of_side(film)),
        Curve("MUTATION loss", "pixels", squares(48, 96, 160, 256, by=by), of_side(subsets, 3, classes)),
        Curve("MUTATION loss", "classes", (2, 4, 8, 16), lambda size, device: subsets(large, 3, size, device)),
        Curve(
            "MUTATION loss",
            "subsets",
            (1, 3, 7, 15),
            lambda size, device: subsets(large, size.bit_length(), classes, device),
        ),
        Curve("labels", "pixels", squares(64, 128, 256, 384, by=quartered), of_side(labels, classes)),
        Curve("attention", "tokens", (128, 256, 512, 1024, 2048), attention, None, kernels=False),
        Curve("plain U-Net, step", "batch", (1, 2, 4, 8), lambda size, device: plain_step(image, size, device)),
        Curve("plain U-Net, step", "pixels", squares(32, 64, 96, 160, by=halved), of_side(plain_step, 1)),
        Curve("FIAS, step", "batch", (1, 2, 4, 8), fias_step),
        # The blocks are fused while the encoder runs, which no kernel does.
        Curve(
            "DINO U-Net, labels", "pixels", squares(112, 168, 224, 280, by=quartered), of_side(dino_labels), None, False
        ),
    )
    if not tiny:
        return listed
    return tuple(replace(curve, sizes=curve.sizes[:2], few=FEWEST) for curve in listed if curve.make is not fias_step)


CURVES = _curves()
TINY_CURVES = _curves(tiny=True)
"""They show only that everything runs; without FIAS, of which ``bench_fias.py`` has a smaller one."""
