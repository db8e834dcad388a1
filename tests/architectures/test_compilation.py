"""Whole networks under a compiler: one graph for every batch size, loss included; and exported for any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiling import assert_compiles
from tiny_networks import NETWORKS

from trifuse import architectures

TRAINED = [
    "dino_unet",
    "dino_unet streaming twice",
    "ecg_autoencoder",
    "fias",
    "plain_unet",
    "taff_unet full",
    "taff_unet full, some without an ECG",
]
EVALUATED = [
    "dino_unet",
    "dino_unet streaming skips alone",
    "ecg_autoencoder",
    "fias",
    "plain_unet",
    "taff_unet full, some without an ECG",
]


def slow_but(quick, names):
    """Mark the others: variants of a network that stands here too, and what tests/blocks compiles block by block."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def in_float64(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize("names", [TRAINED, EVALUATED])
def test_every_architecture_is_compiled(names):
    folder = Path(architectures.__file__).parent
    architecture = {path.parent.name for path in folder.glob("*/model.py")}
    assert architecture <= {name.split()[0] for name in names} <= {name.split()[0] for name in NETWORKS}


@pytest.mark.parametrize("name", slow_but({"dino_unet", "plain_unet"}, TRAINED))
def test_a_training_step_is_one_graph_for_every_batch_size(name):
    """Forward, loss and backward, with dropout, drawn cells and statistics of the batch."""
    network = NETWORKS[name]
    batches = [in_float64(network.batch(samples)) for samples in (2, 5)]
    assert_compiles(network.make().double(), network.step, batches, graphs=1, backend="eager", dynamic_batch=True)


@pytest.mark.parametrize("name", slow_but(set(EVALUATED) - {"fias", "dino_unet streaming skips alone"}, EVALUATED))
def test_evaluation_is_exported_for_every_batch_size(name):
    """Code that is made for one size alone is refused by the exporter."""
    network = NETWORKS[name]
    model = network.make().double().eval()
    small, large = (in_float64(network.batch(samples)) for samples in (3, 2))
    inputs = [{k: x for k, x in given.items() if k not in ("target", "usable")} for given in (small, large)]
    any_batch = {key: {0: torch.export.Dim("batch", min=2)} for key in inputs[0]}
    exported = torch.export.export(model, (), inputs[0], dynamic_shapes=any_batch).module()
    for given in inputs:
        torch.testing.assert_close(exported(**given), network.predict(model, given), atol=1e-6, rtol=1e-6)
