"""The golden data: numbers from published implementations, the rule that fills big networks, and the bounds.

``tests/golden/README.md`` describes the data. Sampled tensors are stored as flat indices, values there, and six numbers
over the whole tensor.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT64_BOUND = 1e-9
FLOAT64_BOUND_STORED_FLOAT32 = 3e-7
# The filled ECG autoencoder amplifies rounding from its lead attention on: 2e-8 there, 1e-8 in the reconstruction, from
# one processor to another, where what comes before agrees to 1e-15.
FLOAT64_BOUND_AMPLIFIED = 1e-7
AMPLIFIED = {"ecg_dual_attention/filled_": {"lead_attention", "attention_pooled", "z", "decoder_linear", "recon"}}
FLOAT32_FACTOR = 10
FLOAT32_FLOOR = 2e-6
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Fixture:
    """One fixture: its facts, and its tensors by name (empty where it has none)."""

    name: str
    facts: dict
    tensors: dict[str, Tensor]

    def expected(self, prefix: str = "") -> list[str]:
        """Names of stored results under ``prefix``; a sampled one is named once, without ``.idx`` and so on."""
        names = {name.removesuffix(".idx").removesuffix(".val").removesuffix(".stats") for name in self.tensors}
        return sorted(name for name in names if name.startswith(prefix))

    def difference(self, name: str, result: Tensor) -> float:
        """Relative L2 difference of a result from the stored one, and for a sampled one from its six numbers, too."""
        if name in self.tensors:
            stored = self.tensors[name]
            assert result.shape == stored.shape, f"{self.name}: {name} is {tuple(result.shape)}, not {stored.shape}"
            return relative_l2(result, stored)
        assert list(result.shape) == self.facts["shapes"][name], f"{self.name}: {name} is {tuple(result.shape)}"
        values = result.detach().double().flatten()
        stored, stats = self.tensors[f"{name}.val"], self.tensors[f"{name}.stats"]
        differences = relative_l2(values[self.tensors[f"{name}.idx"]], stored)
        std, norm, low, high, mean_abs = stats.tolist()[1:]
        ours = torch.stack([values.mean(), values.std(correction=0), values.norm()])
        ours = torch.cat([ours, torch.stack([values.min(), values.max(), values.abs().mean()])])
        root_mean_square, peak = norm / math.sqrt(values.numel()), max(abs(low), abs(high))
        scales = torch.tensor([root_mean_square, std, norm, peak, peak, mean_abs], dtype=torch.float64)
        return max(differences, float(((ours - stats).abs() / scales).max()))

    def bound(self, name: str, dtype: torch.dtype) -> float:
        """Largest difference allowed to a run in ``dtype``; see "How to check against it" in the data's README."""
        if dtype == torch.float64:
            if any(self.name.startswith(start) and name in parts for start, parts in AMPLIFIED.items()):
                return FLOAT64_BOUND_AMPLIFIED
            stored = self.tensors[name if name in self.tensors else f"{name}.val"]
            return FLOAT64_BOUND if stored.dtype == torch.float64 else FLOAT64_BOUND_STORED_FLOAT32
        observed = self.facts["tolerance_f32_vs_f64"]
        case, _, rest = name.partition(".")  # a fixture of several cases keeps one table for each
        found = observed.get(name) or observed.get(case, {}).get(rest) or {"rel_l2": 0.0}
        return max(FLOAT32_FACTOR * found["rel_l2"], FLOAT32_FLOOR)


def load_fixture(name: str) -> Fixture:
    """Load ``<group>/<name>``."""
    path = GOLDEN / f"{name}.safetensors"
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return Fixture(name, facts, load_file(path) if path.exists() else {})


def fixture_names(group: str) -> list[str]:
    """Names of all fixtures of a group."""
    return sorted(f"{group}/{path.stem}" for path in (GOLDEN / group).glob("*.json"))


def relative_l2(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, in float64; infinite for a result that is not finite."""
    result, expected = result.detach().double(), expected.double()
    difference = (result - expected).norm() / expected.norm()
    return float(difference) if bool(difference.isfinite()) else math.inf


def uniform(key: str | int, start: int, stop: int) -> np.ndarray:
    """The closed-form numbers u in (-1, 1) for flat indices ``start`` to ``stop`` of the tensor named ``key``."""
    c = key if isinstance(key, int) else zlib.crc32(key.encode())
    x = np.arange(start, stop, dtype=np.uint32)
    x *= np.uint32(0x9E3779B1)
    x += np.uint32(c)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return (2.0 * x + 1.0) / 2.0**32 - 1.0


def filled(key: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The tensor that the fill rule gives to the state-dict entry ``key``, in float32."""
    kind = key.rpartition(".")[2]
    scale, offset = 1.0, 0.0
    if kind == "running_mean":
        scale = 0.1
    elif kind == "running_var":
        scale, offset = 0.25, 1.0
    elif len(shape) < 2:
        scale, offset = (0.2, 1.0) if kind in ("weight", "gamma", "lambda1") else (0.1, 0.0)
    elif len(shape) < 4 and shape[0] == 1:
        scale = 0.5
    else:
        scale = math.sqrt(3 / math.prod(shape[1:]))
    return _closed_form(key, shape, scale, offset)


def filled_input(facts: dict) -> Tensor:
    """The input that a fixture was run on, in float32."""
    amplitude = facts["input"]["amplitude"]
    scale = math.sqrt(3) if amplitude == "sqrt(3)" else float(amplitude)
    return _closed_form(facts["input"]["key"], facts["input"]["shape"], scale, 0.0)


@torch.no_grad()
def fill(state: dict[str, Tensor]) -> None:
    """Fill the tensors of a state dict in place by the rule, whatever their type: each is first rounded to float32."""
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            tensor.copy_(filled(key, tensor.shape))


def _closed_form(key: str, shape, scale: float, offset: float) -> Tensor:
    values = np.empty(math.prod(shape), dtype=np.float32)
    for start in range(0, len(values), _CHUNK):
        stop = min(start + _CHUNK, len(values))
        values[start:stop] = scale * uniform(key, start, stop) + offset
    return torch.from_numpy(values).reshape(tuple(shape))
