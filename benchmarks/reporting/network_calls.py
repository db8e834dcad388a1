"""The operators' calls in a step of each network, and of two operators alone, traced without values.

A trace holds shapes, strides, types, and how often a call is made.

Weights, images and maps are in bfloat16, as matrix products and convolutions have them under autocast; the loss is the
network's own. Maps lie as they do on a GPU, where a convolution keeps the layout of its input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.fias import Fias, FiasConfig
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.taff_unet import TaffUNet, TaffUNetConfig
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.kernels import mutation_loss, upsample_argmax
from trifuse.kernels.torch_internals import TorchDispatchMode, flash_attention

from .issue_goals import COARSE_MAPS, FULL_MAPS

DTYPE = torch.bfloat16
OURS = "trifuse::"
ALLOCATION = re.compile(r"aten::(?:new_)?empty")


@dataclass(frozen=True)
class Dense:
    """A tensor without values: its shape, strides and type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Dense:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def zeros(self) -> Tensor:
        """Return such a tensor, of zeros."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Args:
        operator: its name, that of the registered function.
        arguments: its arguments, with a `Dense` for each tensor, as nested tuples.
        results: what it returns, likewise.
    """

    operator: str
    arguments: tuple[Any, ...]
    results: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: each is read or written at least once."""
        return sum(dense.nbytes for dense in dense_in((self.arguments, self.results)))


def dense_in(value: Any) -> Iterator[Dense]:
    """Yield all tensors in nested tuples."""
    if isinstance(value, tuple):
        for part in value:
            yield from dense_in(part)
    elif isinstance(value, Dense):
        yield value


class Recorder(TorchDispatchMode):
    """Count our operators' calls inside the block, and the bytes that all operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        name = function._schema.name
        results = _laid_out_as_on_a_gpu(name, arguments, function(*arguments, **(options or {})))
        call = Call(name.removeprefix(OURS), _frozen(arguments), _frozen(results))
        if name.startswith(OURS):
            self.calls[call] += 1
        if not function.is_view and not ALLOCATION.match(name):
            self.nbytes[name] += call.nbytes
        return results


def _laid_out_as_on_a_gpu(name: str, arguments: Sequence[Any], results: Any) -> Any:
    """Return a convolution's maps in the layout of its input: on the meta device PyTorch makes them contiguous."""
    if name == "aten::convolution" and is_channels_last(arguments[0]):
        return results.contiguous(memory_format=torch.channels_last)
    if name == "aten::convolution_backward" and is_channels_last(arguments[1]) and results[0] is not None:
        return results[0].contiguous(memory_format=torch.channels_last), *results[1:]
    return results


def _attention_as_on_a_gpu(
    q: Tensor, k: Tensor, v: Tensor, bias: None, dropout_p: float, *, scale: float | None
) -> Tensor:
    """Attend in one operation, which writes no weights: on the meta device PyTorch chooses the one that does."""
    return flash_attention(q, k, v, dropout_p, scale=scale)[0]


def is_channels_last(x: Tensor | Dense) -> bool:
    """Tell whether a tensor is maps (B, C, H, W) whose channels lie side by side, and whose columns do not."""
    stride = x.stride if isinstance(x, Dense) else x.stride()
    return len(stride) == 4 and stride[1] == 1 and stride[3] != 1


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return Dense.of(value) if isinstance(value, Tensor) else value


def _target(batch: int, side: int) -> Tensor:
    return torch.empty(batch, side, side, dtype=torch.int64)


def _fias() -> Fias:
    return Fias(FiasConfig(num_classes=9)).to(DTYPE)


def _fias_step(network: Fias, batch: int) -> None:
    mutation_loss(network(torch.empty(batch, 1, 256, 256, dtype=DTYPE)), _target(batch, 256)).backward()


def _fias_inference(network: Fias, batch: int) -> None:
    with torch.inference_mode():
        upsample_argmax(network.eval().head_maps(torch.empty(batch, 1, 256, 256, dtype=DTYPE)), (256, 256))


def _taff_unet() -> TaffUNet:
    return _cast_all_but(TaffUNet(TaffUNetConfig()), "ecg")


def _taff_unet_step(network: TaffUNet, batch: int) -> None:
    image, prior = (torch.empty(batch, channels, 256, 256, dtype=DTYPE) for channels in (1, 17))
    output = network(image, prior, torch.empty(batch, 12, network.config.ecg.time_steps), torch.empty(batch))
    SegmentationLoss()(output, {"target": _target(batch, 256)}, None).backward()


def _plain_unet() -> PlainUNet:
    return PlainUNet(PlainUNetConfig(1, 4, 256, 32)).to(DTYPE)


def _plain_unet_step(network: PlainUNet, batch: int) -> None:
    output = network(torch.empty(batch, 1, 256, 256, dtype=DTYPE))
    SegmentationLoss()(output, {"target": _target(batch, 256)}, None).backward()


def _dino_unet(variant: str) -> DinoUNet:
    return _cast_all_but(DinoUNet(DinoUNetConfig(variant=variant, encoder_dtype="bfloat16")), "encoder")


def _dino_unet_step(network: DinoUNet, batch: int) -> None:
    output = network(torch.empty(batch, 3, 448, 448, dtype=DTYPE))
    SegmentationLoss()(output, {"target": _target(batch, 448)}, None).backward()


def _cast_all_but(network: Any, kept: str) -> Any:
    for name, child in network.named_children():
        if name != kept:
            child.to(DTYPE)
    return network


def _full_map_loss(_: None, batch: int) -> None:
    maps = [torch.empty(batch, 9, 224, 224, dtype=DTYPE, requires_grad=True) for _ in range(3)]
    mutation_loss(maps, _target(batch, 224)).backward()


def _coarse_map_classes(_: None, batch: int) -> None:
    upsample_argmax([torch.empty(batch, 9, side, side, dtype=DTYPE) for side in (14, 28, 56)], (224, 224))


@dataclass(frozen=True)
class Step:
    """A step to trace.

    Args:
        make: makes the network, if there is one; what that does is not traced.
        run: makes a step of the network, with so many samples.
        batch: how many there are in the report.
    """

    make: Callable[[], Any]
    run: Callable[[Any, int], None]
    batch: int = 32


STEPS = {
    "FIAS": Step(_fias, _fias_step),
    "FIAS, inference": Step(_fias, _fias_inference),
    "TAFF-UNet": Step(_taff_unet, _taff_unet_step),
    "plain U-Net": Step(_plain_unet, _plain_unet_step),
    "DINO-UNet base": Step(partial(_dino_unet, "base"), _dino_unet_step),
    "DINO-UNet giant": Step(partial(_dino_unet, "giant"), _dino_unet_step),
    FULL_MAPS: Step(lambda: None, _full_map_loss, batch=24),
    COARSE_MAPS: Step(lambda: None, _coarse_map_classes, batch=24),
}


def trace(name: str, batch: int | None = None) -> Recorder:
    """Trace one step on images of its paper's size, with as many samples as in the report unless told otherwise.

    Needs no memory for maps or weights.
    """
    step = STEPS[name]
    attention = patch.object(F, "scaled_dot_product_attention", _attention_as_on_a_gpu)
    with torch.device("meta"), attention:
        network = step.make()
        with Recorder() as recorder:
            step.run(network, step.batch if batch is None else batch)
    return recorder
