"""Rename the tensors of a published state dict by patterns, and join those that are one tensor here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trifuse.kernels import CheckpointError

Rule = tuple[str, str, tuple[int, int]]
"""A published name as a pattern, ours, and which part of ours it is: (index, number of parts)."""


@dataclass(frozen=True)
class Renamed:
    """What became of the tensors of a state dict.

    Attributes:
        parts: the parts of each of our tensors, by index.
        counts: how many parts each of them has.
        mapped: published name -> our name.
        ignored: names that the network has no use for.
        unexpected: names that follow no known pattern.
    """

    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def joined(self, source: str) -> dict[str, Tensor]:
        """Return our tensors, but for those of which a part is missing.

        Raises:
            CheckpointError: the parts of a tensor do not join.
        """
        return {
            ours: _joined(parts, ours, source) for ours, parts in self.parts.items() if len(parts) == self.counts[ours]
        }


def rename(
    tensors: Mapping[str, Tensor], source: str, rules: Sequence[Rule], *, wrappers: str, without_use: str
) -> Renamed:
    """Sort tensors by the rules, the first that fits.

    Args:
        tensors: a published state dict.
        source: where it came from, for messages.
        rules: of the names that are known.
        wrappers: pattern of what may stand before each name.
        without_use: pattern of names to leave out.

    Raises:
        CheckpointError: two tensors are the same part of one of ours, or one is not of a floating-point type.
    """
    found = Renamed()
    for name, tensor in tensors.items():
        rule = _our_name(name, rules, wrappers)
        if rule is None:
            (found.ignored if re.fullmatch(f"{wrappers}(?:{without_use})", name) else found.unexpected).append(name)
            continue
        ours, part, count = rule
        if part in found.parts.setdefault(ours, {}) or found.counts.setdefault(ours, count) != count:
            raise CheckpointError(f"{source}: {name!r} gives {ours!r} a second time; it mixes layouts or encoders")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: expected {name!r} of a floating-point type, got {tensor.dtype}")
        found.parts[ours][part] = tensor
        found.mapped[name] = ours
    return found


def _our_name(name: str, rules: Sequence[Rule], wrappers: str) -> tuple[str, int, int] | None:
    for pattern, ours, (part, count) in rules:
        match = re.fullmatch(f"{wrappers}(?:{pattern})", name)
        if match:
            return match.expand(ours), part, count
    return None


def _joined(parts: dict[int, Tensor], ours: str, source: str) -> Tensor:
    shapes = {tuple(part.shape) for part in parts.values()}
    if len(parts) > 1 and (len(shapes) > 1 or () in shapes):
        raise CheckpointError(f"{source}: the parts of {ours!r} do not join: their shapes are {sorted(shapes)}")
    return torch.cat([parts[index] for index in sorted(parts)]) if len(parts) > 1 else parts[0]
