"""A run that takes a second: what the training tests train, in their own process or in one that they kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.pretrained import Pretrained
from trifuse.architectures.training.batches import keyed_seed
from trifuse.architectures.training.loop import FitResult, fit
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.recipe import Recipe

SIZE = 8
EVERYTHING = {
    "norm": "batch",
    "dropout": 0.2,
    "ema_decay": 0.9,
    "accumulate": 2,
    "grad_clip": 0.3,
    "warmup_epochs": 0.5,
}
"""Options of `run` that use all that has a state."""


@dataclass(frozen=True)
class TinyConfig:
    width: int = 4
    norm: str = "group"
    dropout: float = 0.0


class TinyNet(Pretrained, nn.Module):
    """A frozen convolution, one that learns, and everything that has a state."""

    architecture = "tiny"
    config_type = TinyConfig

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyConfig()
        self.encoder = nn.Conv2d(3, config.width, 3, padding=1).requires_grad_(False)
        self.body = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.norm = nn.BatchNorm2d(config.width) if config.norm == "batch" else nn.GroupNorm(2, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(config.width, 2, 1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.body(self.encoder(image).relu())).relu()))


class Squares:
    """Noisy images of a bright square, augmented by a flip that depends on the key."""

    def __init__(self, length: int, poison: int | None = None) -> None:
        self._length, self._poison = length, poison

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        index = key[2]
        generator = torch.Generator().manual_seed(keyed_seed("square", index))
        row, column = torch.randint(0, SIZE - 3, (2,), generator=generator).tolist()
        target = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        target[row : row + 3, column : column + 3] = 1
        image = 0.3 * torch.randn(3, SIZE, SIZE, generator=generator) + target
        if keyed_seed(*key) % 2:
            image, target = image.flip(-1), target.flip(-1)
        if index == self._poison:
            image[0, 0, 0] = torch.nan
        return {"image": image, "target": target, "case_id": f"case_{index}"}


class StopAt:
    """A forward pass that sends this process a signal when it comes to a certain call."""

    def __init__(self, call: int, number: int = signal.SIGTERM, times: int = 1) -> None:
        self._left, self._number, self._times = call, number, times

    def __call__(self, model, batch):
        self._left -= 1
        if self._left == 0:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)
        return model(batch["image"])


def validate(model: nn.Module) -> dict[str, float]:
    """Dice on four squares that training does not see."""
    samples = [Squares(104)[0, 0, index] for index in range(100, 104)]
    device = next(model.parameters()).device
    predicted = model(torch.stack([s["image"] for s in samples]).to(device)).argmax(1).cpu()
    truth = torch.stack([s["target"] for s in samples])
    return {"dice": float(2 * (predicted * truth).sum() / (predicted + truth).sum())}


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"epochs": 3, "batch_size": 4, "lr": 1e-2, "weight_decay": 1e-2, "device": "cpu", **changes})


def run(out: Path, *, length: int = 10, model: nn.Module | None = None, **options: Any) -> FitResult:
    """Train the tiny network; options of the recipe, of the network and of `fit` in one bag."""
    names = set(Recipe.__dataclass_fields__)
    settings = {name: options.pop(name) for name in names & set(options)}
    network = {name: options.pop(name) for name in set(TinyConfig.__dataclass_fields__) & set(options)}
    loss = SegmentationLoss(batch_dice=options.pop("batch_dice", True))
    data = Squares(length, options.pop("poison", None))
    model = model or TinyNet(TinyConfig(**network))
    return fit(
        model,
        options.pop("data", data),
        recipe(**settings),
        out,
        **{"loss": loss, "validate": validate, "run_config": {}} | options,
    )


def bits(out: Path) -> dict[str, bytes]:
    """All that a run leaves behind and that must not depend on when it was interrupted."""
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out / "log.csv")]
    best = ("best/model.safetensors", "best/score.json")
    last = ("last/model.safetensors", "last/training_state.safetensors", "last/training_state.json")
    names = ("start.json", *best, *last)
    return {name: (out / name).read_bytes() for name in names} | {"log": repr(log).encode()}


def assert_same_run(one: Path, other: Path, atol: float = 1e-5) -> None:
    """Hold two runs against each other: weights within a distance, and what they logged."""
    for name in ("last/model.safetensors", "best/model.safetensors"):
        for key, tensor in load_file(one / name).items():
            torch.testing.assert_close(load_file(other / name)[key], tensor, rtol=0, atol=atol, msg=f"{name} {key}")
    first, second = read_log(one / "log.csv"), read_log(other / "log.csv")
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for name in ("loss", "gradient_norm", "val_dice"):
        torch.testing.assert_close(*([row[name] for row in rows] for rows in (second, first)), rtol=0, atol=1e-4)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAt(Squares):
    """Squares whose loading kills the process at the n-th sample."""

    def __init__(self, length: int, left: int) -> None:
        super().__init__(length)
        self._left = left

    def __getitem__(self, key):
        self._left -= 1
        if self._left == 0:
            die()
        return super().__getitem__(key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.with_name(f"rank_{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    run(folder, **json.loads(sys.argv[2]))
