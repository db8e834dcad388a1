"""Three groups for three parts, in every setting; one backward pass, then the backbone clipped, then all step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trifuse.architectures.taff_unet import EcgAutoencoderConfig, TaffUNet, taff_unet
from trifuse.architectures.taff_unet.optimisation import PartsRecipe, taff_param_groups
from trifuse.architectures.taff_unet.variants import SETTINGS
from trifuse.architectures.training.loop import fit
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.scar_losses import ScarLoss

RECIPE = Recipe(
    epochs=4,
    batch_size=2,
    lr=1e-2,
    weight_decay=3e-5,
    optimizer="sgd",
    momentum=0.99,
    schedule="poly",
    grad_clip=12.0,
    warmup_epochs=1,
    device="cpu",
)


def small(setting: str = "full", *, dropout: float = 0.2, **options: Any) -> TaffUNet:
    ecg = EcgAutoencoderConfig(time_steps=64, z_dim=8, base_dim=2, downsample=2, dropout=dropout)
    return taff_unet(setting, num_classes=2, image_size=16, base_dim=4, fusion_stage=1, ecg=ecg, **options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_groups_are_disjoint_and_complete(setting):
    model = small(setting)
    groups = make_groups(model, RECIPE, taff_param_groups)
    assert [group.name for group in groups] == ["backbone", "ecg", "fusion"][: 3 if "ecg" in SETTINGS[setting] else 1]
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(set(names)) == len(names)
    for group in groups:
        parts = {"backbone": {"encoder", "decoder"}}.get(group.name, {group.name})
        assert {name.partition(".")[0] for name in group.parameters} == parts


def test_each_group_learns_as_specified():
    backbone, ecg, fusion = make_groups(small(), RECIPE, taff_param_groups)
    assert isinstance(backbone.optimizer, torch.optim.SGD)
    sgd = backbone.optimizer.defaults
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.99, True, 3e-5)
    for group, decay in ((ecg, 5e-5), (fusion, 1e-4)):
        assert isinstance(group.optimizer, torch.optim.AdamW)
        assert group.optimizer.defaults["weight_decay"] == decay
    assert [group.grad_clip for group in (backbone, ecg, fusion)] == [12.0, None, None]
    rates = [[g.set_learning_rate(RECIPE, step, 10) for g in (backbone, ecg, fusion)] for step in (0, 9, 25, 39)]
    assert [rate[0] for rate in rates] == pytest.approx([1e-2 * (1 - e / 4) ** 0.9 for e in (0, 0, 2, 3)])
    assert [rate[2] / rate[0] for rate in rates] == pytest.approx([0.1] * 4)
    assert [rate[1] for rate in rates] == pytest.approx([1e-5, 1e-4, 5e-5, 1e-4 * 0.00273905], rel=1e-4)


def test_the_rates_are_options():
    parts = PartsRecipe(ecg_lr=1.0, ecg_weight_decay=2.0, fusion_lr=3.0, fusion_weight_decay=4.0)
    model = small()
    groups = make_groups(model, RECIPE, taff_param_groups(model, parts))
    assert [group.lr for group in groups] == [1e-2, 1.0, 3.0]
    assert [group.optimizer.defaults["weight_decay"] for group in groups] == [3e-5, 2.0, 4.0]
    for changes, message in (({"ecg_lr": 0.0}, "ecg_lr must be positive"), ({"fusion_weight_decay": -1.0}, "negative")):
        with pytest.raises(ValueError, match=message):
            PartsRecipe(**changes)


def test_frozen_parts_have_no_group():
    model = small()
    model.ecg.requires_grad_(False)
    model.encoder.requires_grad_(False)
    groups = make_groups(model, RECIPE, taff_param_groups)
    assert [group.name for group in groups] == ["backbone", "fusion"]
    assert all(not name.startswith("encoder.") for name in groups[0].parameters)


class Slices:
    """Slices of two cases, one of which has no ECG."""

    def __init__(self, has_ecg: tuple[bool, ...] = (True, False)) -> None:
        self._has = has_ecg

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(key[2])
        case = key[2] % 2
        ecg = torch.randn(12, 64, generator=torch.Generator().manual_seed(case))
        return {
            "image": torch.randn(1, 16, 16, generator=generator),
            "target": torch.randint(0, 2, (16, 16), generator=generator),
            "prior": torch.zeros(17, 16, 16),
            "ecg": ecg if self._has[case] else torch.full_like(ecg, torch.nan),
            "interval": torch.tensor(3.0),
            "has_ecg": torch.tensor(self._has[case]),
        }


def train(out: Path, model: TaffUNet, has_ecg: tuple[bool, ...] = (True, False), **changes: Any) -> None:
    def forward(model, batch):
        return model.run(*(batch[name] for name in ("image", "prior", "ecg", "interval", "has_ecg")))

    recipe = Recipe(**{**vars(RECIPE), "epochs": 2, "best_epoch_smoothing": 0.9, **changes})
    options = {"forward": forward, "param_groups": taff_param_groups, "run_config": {}}
    fit(model, Slices(has_ecg), recipe, out, loss=ScarLoss(), validate=lambda model: {"dice": 0.5}, **options)


def test_one_step_of_the_loop_is_three_optimisers_after_one_backward_pass(tmp_path):
    """Written out by hand: one loss, the backbone's gradient alone clipped, then SGD and twice AdamW."""
    model, expected = (small(dropout=0.0) for _ in range(2))
    train(tmp_path, model, (True, True), batch_size=4, epochs=1, grad_clip=0.05, warmup_epochs=0)
    batch = [Slices((True, True))[42, 0, index] for index in range(4)]
    stacked = {name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}
    inputs = [stacked[name] for name in ("image", "prior", "ecg", "interval", "has_ecg")]
    backbone = [*expected.encoder.parameters(), *expected.decoder.parameters()]
    optimizers = [
        torch.optim.SGD(backbone, 1e-2, 0.99, weight_decay=3e-5, nesterov=True),
        torch.optim.AdamW(expected.ecg.parameters(), 1e-4, weight_decay=5e-5),
        torch.optim.AdamW(expected.fusion.parameters(), 1e-3, weight_decay=1e-4),
    ]
    ScarLoss()(expected.run(*inputs), stacked, None).backward()
    assert torch.nn.utils.clip_grad_norm_(backbone, 0.05) > 0.05
    for optimizer in optimizers:
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=2e-3, atol=3e-5, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_without_any_ecg_leaves_the_ecg_s_weights_alone(tmp_path, precision):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path, model, (False, False), precision=precision)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name.startswith("ecg."))
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_three_seeds_of_training_reproduce(tmp_path):
    for seed in range(3):
        models = [small(init_seed=seed), small(init_seed=seed)]
        for number, model in enumerate(models):
            train(tmp_path / f"{seed}_{number}", model, seed=seed, epochs=1)
        first, second = (model.state_dict() for model in models)
        assert all(torch.equal(first[name], second[name]) for name in first)
