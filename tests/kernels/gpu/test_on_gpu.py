"""Every operator on a real GPU: compiled kernels, not interpreted ones. Skipped where there is no GPU.

Whatever calls an operator forces its kernels and sees them launched: where they cannot be built, these tests fail.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from forced_kernels import on_kernels, step_on_kernels
from gpu_arguments import DTYPES, assert_call_matches, calls, normal
from tiny_networks import NETWORKS

from trifuse import kernels
from trifuse.architectures.training import recorded_step
from trifuse.architectures.training.batches import MicroBatch
from trifuse.architectures.training.distributed import World
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.step import TrainingStep
from trifuse.kernels.testing import compare, peak_memory_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the stand-in GPU, which takes a small share of it all


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_values_and_every_gradient(name, dtype):
    operator, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    for arguments in calls(name, DEVICE, dtype):
        step_on_kernels(name, arguments)
        with on_kernels(name):
            assert_call_matches(operator, reference, arguments, dtype)


def test_fusion_repeats_bit_for_bit():
    arguments = next(calls("weighted_block_fusion", DEVICE, torch.bfloat16))
    first, second = (step_on_kernels("weighted_block_fusion", arguments) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_fusion_needs_one_map_of_extra_memory():
    size = (2, 65, 256) if INTERPRETED else (4, 1025, 768)
    maps = [normal(DEVICE, *size, seed=i).detach() for i in range(12)]
    logits = torch.zeros(12, device=DEVICE, requires_grad=True)
    grad = torch.ones_like(maps[0])
    with on_kernels("weighted_block_fusion"):
        kernels.weighted_block_fusion(maps, logits).backward(grad)
        used = peak_memory_bytes(lambda: kernels.weighted_block_fusion(maps, logits).backward(grad), DEVICE)
    assert used <= 1.2 * maps[0].nbytes


def test_k17_offsets_beyond_2_to_the_31():
    """Samples whose distance fits 32 bits, but not three times that distance."""
    free, _ = torch.cuda.mem_get_info()
    stride = 1 << 30
    if free < 8 * stride:
        pytest.skip("needs 8 GiB of free GPU memory")
    storage = torch.zeros(3 * stride + 16, dtype=torch.bfloat16, device=DEVICE)
    values = storage.as_strided((4, 1, 16), (stride, 16, 1))
    values[3] = 3.0
    with on_kernels("weighted_block_fusion"):
        fused = kernels.weighted_block_fusion([values, values], torch.zeros(2, device=DEVICE))
    assert torch.equal(fused, values)


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_full_graph_compilation(name):
    arguments = next(calls(name, DEVICE, torch.bfloat16))
    compiled = torch.compile(getattr(kernels, name), fullgraph=True)
    torch.testing.assert_close(step_on_kernels(name, arguments, compiled), step_on_kernels(name, arguments))


def test_compare_holds_forms_against_the_gpu_s_own_ceilings(tmp_path):
    x = normal(DEVICE, 1024, 1024, dtype=torch.bfloat16)
    forms = {"eager": lambda x: x.exp() * 2, "other": lambda x: 2 * x.exp()}
    comparison = compare("scaled exp", forms, x, least_bytes=2 * x.nbytes, flops=2 * x.numel(), seconds=0.05)
    stamp = comparison.record()["stamp"]
    assert stamp["driver"]
    assert stamp["bfloat16_gflop_per_s"] > stamp["float32_gflop_per_s"] > 0
    assert len(comparison.rows) == 4
    assert all(0 < row["of_ceiling"] < 1.5 for row in comparison.rows if row["pass"] == "forward")
    assert all(row["saved_mib"] == 2 for row in comparison.rows if row["pass"] == "forward + backward")
    assert comparison.write(tmp_path).name == "scaled_exp.cuda.json"


# ------------------------------------------------------------------------------------------------- recorded graphs

WARM_UP_STEPS = 1 if INTERPRETED else 3


def warmed_up(step):
    """Run a step on a side stream, as PyTorch asks before it is recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            torch.cuda.manual_seed(0)
            step()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_a_recorded_operator_gives_what_it_gives_eagerly(name):
    arguments = next(calls(name, DEVICE, torch.float32))
    expected = [result.clone() for result in step_on_kernels(name, arguments)]
    warmed_up(lambda: step_on_kernels(name, arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step_on_kernels(name, arguments)
    for _ in range(2):
        for result in results:
            result.zero_()
        graph.replay()
        torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recorded_training_step_trains_as_an_eager_one(name, tmp_path, monkeypatch):
    """As `fit` takes both: a replay draws from a seed what an eager step draws from it."""
    monkeypatch.setattr(recorded_step, "EAGER_STEPS", WARM_UP_STEPS)
    network, said = NETWORKS[name], []
    batch = {key: value.to(DEVICE) for key, value in network.batch(2).items()}
    recipe = Recipe(epochs=1, batch_size=2, lr=1e-3, optimizer="sgd", grad_clip=1.0, precision="fp32")
    model = network.make().to(DEVICE).train()
    world = World(0, 1, next(model.parameters()).device)

    def trained(kind):
        """Return the network after some steps, each with a seed of its own."""
        twin = copy.deepcopy(model)
        groups = make_groups(twin, recipe, None)
        options = {"steps_per_epoch": 10, "crash_folder": tmp_path, "say": said.append}
        step = kind(twin, network.forward, network.loss, groups, None, recipe, world, **options)
        with on_kernels(name, expected=network.kernels):
            for number in range(WARM_UP_STEPS + (1 if INTERPRETED else 2)):
                step([(MicroBatch((), True, 1.0), batch)], number)
        return twin

    eager, recorded = (trained(kind) for kind in (TrainingStep, recorded_step.RecordedStep))
    assert said == ["steps are recorded as CUDA graphs"]
    torch.testing.assert_close(recorded.state_dict(), eager.state_dict(), atol=1e-4, rtol=1e-3)
