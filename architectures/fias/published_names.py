"""The names that DilateFormer weights are published under, wrapped or not; the encoder uses the same ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trifuse.architectures.storage.pretrained import read_description
from trifuse.architectures.storage.published_weights import WRAPPER, ConversionReport, compare, read_tensors
from trifuse.kernels.errors import CheckpointError

from .variants import VARIANTS

ARCHITECTURE = "dilateformer"

_WRAPPERS = f"(?:{WRAPPER})*"
_NAMES = r"(?:patch_embed|stages|norm)\..+"
_HEADS = r"head\..+"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class DilateFormerConfig:
    """The network that converted weights belong to: the argument of `DilateFormer`.

    Args:
        variant: a name from `VARIANTS`.
    """

    variant: str

    def __str__(self) -> str:
        return f"DilateFormer({self.variant!r})"


def describe_encoder(folder: Path) -> dict[str, Any]:
    """Return the fields of a network's configuration that a folder of converted weights decides."""
    described: dict[str, Any] = read_description(folder, ARCHITECTURE)["config"]
    return described


ExpectedWeights = Callable[[DilateFormerConfig], Mapping[str, Tensor]]


def read_renamed(path: Path, expected: ExpectedWeights) -> tuple[dict[str, Tensor], ConversionReport]:
    """Read a converted folder or a published file, and rename its tensors; see `renamed`."""
    return renamed(read_tensors(path, ARCHITECTURE), str(path), expected)


def renamed(
    tensors: Mapping[str, Tensor], source: str, expected: ExpectedWeights
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Remove wrappers and classifier from the names of a state dict, and check that it is that of one DilateFormer.

    Args:
        tensors: a state dict of the published network.
        source: where it came from, for the report.
        expected: returns the names and shapes of the weights of a DilateFormer, e.g. on the meta device.

    Raises:
        CheckpointError: the tensors are not exactly those of one DilateFormer, its classifier aside.
    """
    mapped: dict[str, str] = {}
    ignored: list[str] = []
    unexpected: list[str] = []
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = re.sub(f"^{_WRAPPERS}", "", name)
        if not re.fullmatch(_NAMES, ours):
            (ignored if re.fullmatch(_HEADS, ours) else unexpected).append(name)
            continue
        if ours in state:
            raise CheckpointError(f"{source}: {name!r} gives {ours!r} a second time; it mixes two networks")
        if not tensor.is_floating_point() and not ours.endswith(_COUNTER):
            raise CheckpointError(f"{source}: expected {name!r} of a floating-point type, got {tensor.dtype}")
        state[ours] = tensor
        mapped[name] = ours
    config = _detect(state, source)
    wanted = expected(config)
    strangers = [name for name, ours in mapped.items() if ours not in wanted]
    return compare(source, config, state, wanted, mapped=mapped, ignored=ignored, unexpected=[*unexpected, *strangers])


def _detect(state: Mapping[str, Tensor], source: str) -> DilateFormerConfig:
    """Infer the DilateFormer from names and shapes."""
    embedding = state.get("patch_embed.proj.9.weight")
    found = [re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name) for name in state]
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    if embedding is None or embedding.dim() != 4 or not blocks:
        raise CheckpointError(
            f"{source}: expected the weights of a DilateFormer, found no overlapping patch embedding with stages of "
            "blocks in it"
        )
    depths = tuple(sum(stage == index for stage, _ in blocks) for index in range(4))
    for variant, shape in VARIANTS.items():
        if (embedding.shape[0], depths) == (shape.embed_dim, shape.depths):
            return DilateFormerConfig(variant)
    raise CheckpointError(
        f"{source}: {embedding.shape[0]} channels and blocks {depths} are none of the variants {', '.join(VARIANTS)}"
    )
