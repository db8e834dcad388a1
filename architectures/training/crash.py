"""What to know about a step that stopped being finite: which samples, and where in the network it began."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.atomic_files import write_json

from .batches import tensors_in


def first_non_finite(model: nn.Module, batch: Mapping[str, Any], forward: Callable[[], object]) -> str:
    """Say what is the first thing that is not finite when the step is run again.

    Args:
        model: the network that ``forward`` runs.
        batch: its input.
        forward: runs the forward pass exactly as it ran before.
    """
    for name, value in batch.items():
        if not _is_finite(value):
            return f"the input {name!r}"
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the parameter {name!r}"
    modules = dict(model.named_modules())
    # A hook on a layer has a fused block call it, so that it is seen; with no hooks on layers blocks run as they did.
    for watched in (modules, {name: module for name, module in modules.items() if any(module.children())}):
        found = _watch(watched, forward)
        if found:
            return found[0]
    return "the loss or its gradient; every output of the network is finite"


def _watch(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[str]:
    found: list[str] = []
    handles = [module.register_forward_hook(_Watch(name, found)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def write_crash_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write a report to ``crash/`` and return its path; numbers that are not finite become text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{report['step']}_rank_{report['rank']}.json"
    write_json(path, {name: repr(value) if isinstance(value, float) else value for name, value in report.items()})
    return path


class _Watch:
    """A forward hook that notes the modules whose output is not finite, innermost and earliest first."""

    def __init__(self, name: str, found: list[str]) -> None:
        self._name, self._found = name, found

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if not all(map(_is_finite, tensors_in(output))):
            self._found.append(f"the output of module {self._name or '(the network)'!r} ({type(module).__name__})")


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
