"""Every block under a compiler: one graph for every batch size, forward and backward, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
from compiling import assert_compiles
from tiny_blocks import BLOCKS, in_float64
from torch import nn

from trifuse import blocks
from trifuse.kernels import backend

FUSED = [name for name, block in BLOCKS.items() if block.fused]


def call(block: nn.Module, given: tuple[Any, ...]) -> Any:
    return block(*given)


def test_every_block_is_compiled():
    modules = {name for name in blocks.__all__ if isinstance(getattr(blocks, name), type)}
    assert modules <= {name.split()[0] for name in BLOCKS}


@pytest.mark.parametrize(  # of those with kernels, make test compiles evaluation, and the Triton path of training
    "name", [pytest.param(name, marks=pytest.mark.slow if name in FUSED else ()) for name in BLOCKS]
)
def test_training_is_one_graph_for_every_batch_size(name):
    """Values, every gradient, running statistics; the draws that a seed makes are those that it makes eagerly."""
    made = BLOCKS[name].make().double()
    inputs = [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 5)]
    compiler = "aot_eager" if BLOCKS[name].fused else "eager"  # the operators bring gradients of their own to trace
    assert_compiles(made, call, inputs, graphs=1, backend=compiler, dynamic_batch=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_evaluation_is_one_graph_for_every_batch_size(name):
    made = BLOCKS[name].make().double().eval()
    inputs = [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 5)]
    assert_compiles(made, call, inputs, graphs=1, backend="eager", dynamic_batch=True)


ATTENDING = ("TransformerBlock",)  # by PyTorch's kernel, which is refused where Triton's alone may run


@pytest.mark.parametrize("name", [name for name in FUSED if name not in ATTENDING])
def test_the_triton_path_is_one_graph_for_every_batch_size(name):
    pytest.importorskip("triton", reason="the path is Triton's")
    inputs = [BLOCKS[name].inputs(samples) for samples in (2, 3)]
    with backend("triton"):
        assert_compiles(BLOCKS[name].make(), call, inputs, graphs=1, dynamic_batch=True)


@pytest.mark.parametrize("name", ["MonteCarloAttention by sample", "TemporalAwareFusion"])
def test_nobody_needs_to_say_that_the_batch_is_dynamic(name):
    """The second size compiles for all sizes; a third would compile again if anything held on to a number."""
    made, inputs = BLOCKS[name].make().double(), [in_float64(BLOCKS[name].inputs(samples)) for samples in (2, 3, 5, 7)]
    assert_compiles(made, call, inputs, graphs=2, backend="eager")
