"""No option of a recipe is without effect: each of a network's changes what is built or computed, each of the training
what a run leaves behind; of the others, and where an effect is another one, a test that sets the option is named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from tiny_networks import NETWORKS, TinyNetwork
from tiny_run import bits, run
from torch.utils._pytree import tree_leaves

from trifuse.architectures.dino_unet.variants import EncoderShape
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.architectures.runs.decisions import field_names
from trifuse.architectures.runs.registry import experiments
from trifuse.architectures.training.recipe import Recipe
from trifuse.kernels.choices import choices_of

FOR_ALL = ("test_decisions.py", "test_recipes.py", "test_options_have_effects.py")  # these take any field there is
ROOT = Path(__file__).parents[3]
TINY = {name: NETWORKS[name] for name in ("dino_unet", "fias", "plain_unet", "taff_unet full", "ecg_autoencoder")}

# Other values of fields, where any will not do.
VALUES: dict[str, dict[str, Any]] = {
    "dino_unet": {"variant": EncoderShape(16, 4, 2, native_grid=4), "blocks": (1, 0)},
    "fias": {
        "variant": DilateFormerShape(6, (1, 1, 2, 1), (3, 3, 3, 3)),
        "decoder_heads": (1, 2, 2, 2),
        "scale_probs": (0.2, 0.3, 0.5),
        "spatial_kernel": 5,
    },
    "plain_unet": {"max_dim": 4},
    "taff_unet full": {
        "setting": "baseline",
        "max_dim": 4,
        "fusion_stage": 0,
        "ecg": NETWORKS["ecg_autoencoder"].make().config,
    },
}
# What has to be set beside a field before it has an effect.
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "dino_unet": {"index_base": {"blocks": (2, 1)}},
    "ecg_autoencoder": {"pooled_dim": {"final_linear": True}},
    "taff_unet full": {
        "skip": {"fusion_stage": 0},
        "grid_side": {"projection": "grid"},
        "grid_follows_image": {"projection": "grid"},
    },
}
# Fields that change neither weights nor results, or files alone: where their effect is tested.
ELSEWHERE: dict[str, dict[str, str]] = {
    "dino_unet": {
        "encoder_checkpoint": "tests/architectures/dino_unet/test_model.py",
        "backbone": "tests/architectures/dino_unet/test_backbone_encoder.py",  # another encoder altogether
        "top_k": "tests/architectures/dino_unet/test_sizes.py",  # goes with the number of stages
        "freeze_selection_epoch": "tests/architectures/dino_unet/test_model.py",
        "conv_then_resize": "tests/architectures/dino_unet/test_decoder.py",  # both orders give the same
        "final_resize": "tests/architectures/dino_unet/test_decoder.py",  # likewise
        "stream_fusion": "tests/architectures/dino_unet/test_streaming.py",  # saves memory
        "stream_gradient": "tests/architectures/dino_unet/test_streaming.py",
    },
    "fias": {"encoder_checkpoint": "tests/architectures/fias/test_convert.py"},
    "taff_unet full": {
        "detach_z": "tests/architectures/taff_unet/test_model.py",  # changes gradients
        "ecg_checkpoint": "tests/architectures/taff_unet/test_model.py",
    },
    "training": {
        "tf32": "tests/architectures/training/test_precision.py",
        "compile": "tests/architectures/training/test_compiled_forward.py",  # rounds otherwise
        "cuda_graph": "tests/rehearsal/rehearse_recorded_steps.py",
        "init": "tests/architectures/cli/test_train.py",
        "reset_head": "tests/architectures/cli/test_train.py",
        "workers": "tests/architectures/training/test_loop.py",  # changes nothing that is left behind
        "device": "tests/architectures/training/test_loop.py",
        "checkpoint_every_steps": "tests/architectures/training/test_kill.py",
        "best_epoch_by": "tests/architectures/training/test_best_epoch.py",
        "best_epoch_smoothing": "tests/architectures/training/test_smoothed_score.py",
    },
}


def others(config: Any, name: str) -> list[Any]:
    """Values that a field does not have."""
    now, hint = getattr(config, name), get_type_hints(type(config))[name]
    if (choices := choices_of(hint)) is not None:
        return [choice for choice in choices if choice != now]
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, tuple):
        return [tuple(one + 2 for one in now), now[:-1]]
    return [now + 1, now * 2, now / 2] if now is not None else [2]


def words_of(network: TinyNetwork, config: Any) -> Iterator[str]:
    """What is built; then what it computes from maps that fit and from some that do not, its weights all moved."""
    torch.manual_seed(0)
    model = type(network.make())(config)
    yield "\n".join(
        [repr(model), *(f"{name} {value.double().sum():.9g}" for name, value in model.state_dict().items())]
    )
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    fitting = network.batch(3)
    odd = {name: value[..., :-3, :-3] if value.ndim > 3 else value for name, value in fitting.items()}
    for training, batch in ((True, fitting), (False, fitting), (False, odd)):
        model.train(training)
        try:
            outputs = (network.forward if training else network.predict)(model, dict(batch))
        except (ValueError, RuntimeError) as error:  # what it does not take is told, too
            yield str(error)
        else:
            leaves = tree_leaves([*vars(outputs).values()] if is_dataclass(outputs) else outputs)
            tensors = [leaf.detach().double() for leaf in leaves if isinstance(leaf, torch.Tensor)]
            yield "\n".join(f"{tuple(tensor.shape)} {tensor.square().sum():.6g}" for tensor in tensors)


def configurations(name: str, field: str) -> Iterator[tuple[Any, Any]]:
    """A configuration and the same with another value of a field, for each value that the others allow."""
    config = replace(TINY[name].make().config, **BESIDE.get(name, {}).get(field, {}))
    given = VALUES.get(name, {})
    for value in [given[field]] if field in given else others(config, field):
        try:
            yield config, replace(config, **{field: value})
        except (ValueError, TypeError):  # it does not go with the other fields
            continue


OPTIONS = [
    (name, field.name)
    for name, network in TINY.items()
    for field in fields(network.make().config)
    if field.name not in ELSEWHERE.get(name, {})
]


@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_each_option_of_a_network_changes_what_is_built_or_computed(name, field):
    for config, other in configurations(name, field):
        before, after = words_of(TINY[name], config), words_of(TINY[name], other)
        if any(one != another for one, another in zip(before, after, strict=True)):
            return
    pytest.fail(f"{field} of {name}: nothing changes with it")


TRAINING = {
    "epochs": {"epochs": 3},
    "batch_size": {"batch_size": 5},
    "lr": {"lr": 2e-2},
    "weight_decay": {"weight_decay": 0.1},
    "optimizer": {"optimizer": "adam"},
    "betas": {"betas": (0.8, 0.99)},
    "momentum": {"momentum": 0.5},
    "schedule": {"schedule": "constant"},
    "warmup_epochs": {"warmup_epochs": 1},
    "min_lr": {"min_lr": 5e-3},
    "precision": {"precision": "bf16"},
    "accumulate": {"accumulate": 2},
    "ema_decay": {"ema_decay": 0.5},
    "grad_clip": {"grad_clip": 1e-3},
    "seed": {"seed": 43},
}


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """What runs leave behind, by their options."""
    known = {}

    def left(**options):
        if (key := repr(options)) not in known:
            out = tmp_path_factory.mktemp("run")
            run(out, epochs=options.pop("epochs", 2), norm="batch", **options)
            known[key] = bits(out)
        return known[key]

    return left


@pytest.mark.parametrize("field", TRAINING)
def test_each_option_of_the_training_changes_what_a_run_leaves_behind(field, left_behind):
    beside = {"optimizer": "sgd"} if field == "momentum" else {}
    before, after = left_behind(**beside), left_behind(**beside, **TRAINING[field])
    assert (
        before["best/model.safetensors" if field == "ema_decay" else "last/model.safetensors"]
        != (after["best/model.safetensors" if field == "ema_decay" else "last/model.safetensors"])
    )


def test_no_option_of_the_training_is_left_out():
    assert {field.name for field in fields(Recipe)} == {*TRAINING, *ELSEWHERE["training"]}


@pytest.mark.parametrize(
    ("field", "file"), [pair for table in ELSEWHERE.values() for pair in table.items()], ids=lambda value: str(value)
)
def test_what_is_tested_elsewhere_is_set_there(field, file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert any(isinstance(name, str) and field in name.replace("-", "_") for name in names)


@pytest.mark.parametrize("known", experiments(), ids=lambda known: known.name)
def test_every_other_option_is_set_by_a_test(known):
    """Of the data, the loss and what is special to a network."""
    given = re.compile(r"(\w+)=(?!=)|[\"'](\w+)[\"']:|--([\w-]+)")
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path.name not in FOR_ALL]
    names = {name.replace("-", "_") for text in texts for found in given.findall(text) for name in found}
    fields = [name for name in field_names(known.load(known.recipe)) if not name.startswith(("network.", "training."))]
    assert [name for name in fields if name.rpartition(".")[2] not in names] == []
