"""The parameter groups of TAFF-UNet: each of its three parts has an optimiser's settings of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .model import TaffUNet


@dataclass(frozen=True)
class PartsRecipe:
    """How the parts beside the backbone learn; the backbone itself does as the run's recipe says.

    Attributes:
        ecg_lr: highest learning rate of the ECG's encoder and decoder.
        ecg_weight_decay: of them, decoupled.
        fusion_lr: highest learning rate of projection, gate and FiLM.
        fusion_weight_decay: of them, decoupled.

    Raises:
        ValueError: a learning rate that is not positive, or a negative weight decay.
    """

    ecg_lr: float = 1e-4
    ecg_weight_decay: float = 5e-5
    fusion_lr: float = 1e-3
    fusion_weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("ecg_lr", "fusion_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("ecg_weight_decay", "fusion_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def taff_param_groups(model: TaffUNet, recipe: PartsRecipe | None = None) -> list[dict[str, Any]]:
    """Return the parameter groups of a network for `fit`, as far as its setting has them.

    ``"backbone"``, encoder and decoder, follows the run's recipe. ``"ecg"``, the autoencoder, is trained by AdamW with
    warm-up and cosine; ``"fusion"`` by AdamW, its learning rate moving as the backbone's does. The gradient of the
    backbone alone is clipped.

    Args:
        model: what is frozen in it belongs to no group, and a part that is frozen as a whole makes none.
        recipe: None takes the defaults.
    """
    recipe = PartsRecipe() if recipe is None else recipe
    adamw = {"optimizer": "adamw", "grad_clip": None}
    groups: list[dict[str, Any]] = [
        {"name": "backbone", "params": _learning(model.encoder, model.decoder)},
        {"name": "ecg", "params": _learning(model.ecg), "lr": recipe.ecg_lr, "schedule": "warmup_cosine"}
        | {"weight_decay": recipe.ecg_weight_decay, **adamw},
        {"name": "fusion", "params": _learning(model.fusion), "lr": recipe.fusion_lr}
        | {"weight_decay": recipe.fusion_weight_decay, **adamw},
    ]
    return [group for group in groups if group["params"]]


def _learning(*parts: nn.Module | None) -> list[nn.Parameter]:
    return [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
