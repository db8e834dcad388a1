"""Every operator on a real GPU: compiled kernels, not interpreted ones. Skipped where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_networks import NETWORKS

from trifuse import kernels
from trifuse.architectures.training.parameter_groups import make_groups
from trifuse.architectures.training.recipe import Recipe
from trifuse.kernels.testing import assert_op_matches, compare, peak_memory_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_()


def fusion_arguments(dtype):
    """Odd sizes, several tiles, more maps than one launch of the backward kernel takes, a class token left out."""
    yield [normal(2, 17, 40, dtype=dtype, seed=i) for i in range(12)], normal(12)
    yield [normal(3, 257, 384, dtype=dtype, seed=i) for i in range(40)], normal(40)
    yield [normal(2, 101, 64, dtype=dtype, seed=i).detach()[:, 1:].requires_grad_() for i in range(3)], normal(3)
    yield [normal(1, 1, 1, dtype=dtype)], normal(1)


def attention_arguments(dtype):
    for batch, tokens, heads, width in ((2, 197, 3, 64), (1, 5, 1, 24)):
        yield tuple(normal(batch, tokens, heads, width, dtype=dtype, seed=i) for i in range(3))


def dilated_arguments(dtype):
    """The slices of one packed projection at head widths of DilateFormer and others, and each border."""
    for border, (batch, height, width), heads, d in (
        ("zero", (2, 33, 29), 3, 24),
        ("zero", (1, 7, 5), 6, 32),
        ("mask", (2, 8, 8), 3, 72),
        ("shift", (1, 17, 13), 3, 5),
    ):
        packed = normal(batch, height, width, 3 * heads * d, dtype=dtype).detach()
        maps = [part.requires_grad_() for part in packed.chunk(3, dim=-1)]
        yield *maps, {"num_heads": heads, "border": border}


def dilated_weights_arguments(dtype):
    for q, k, _, options in dilated_arguments(dtype):
        yield q, k, options


def depthwise_arguments(dtype):
    """Both memory formats, several tiles, odd sizes, and a map smaller than the kernels."""
    for shape in ((2, 72, 33, 65), (1, 17, 5, 3)):
        weights = [normal(shape[1], 1, k, k, seed=k) for k in (5, 7)]
        for memory_format in (torch.channels_last, torch.contiguous_format):
            x = normal(*shape, dtype=dtype).detach().contiguous(memory_format=memory_format)
            yield x.requires_grad_(), weights


def argmax_arguments(dtype):
    """Few enough pixels that no two classes of drawn logits come as near each other as rounding."""
    for sides, size in (((4, 8, 16), (37, 53)), ((40,), (16, 20))):
        yield [normal(2, 5, side, side, dtype=dtype, seed=side).detach() for side in sides], size


def gate_arguments(per_channel):
    """Odd sizes, more channels and pixels than a tile, channels last, columns of a wider map, sums in parts."""

    def arguments(dtype):
        wide = normal(2, 5, 33, 50, dtype=dtype).detach()[..., 1:42].requires_grad_()
        last = normal(2, 72, 64, 64, dtype=dtype).detach().contiguous(memory_format=torch.channels_last)
        large = normal(1, 3, 200, 200, dtype=dtype)
        for x in (
            wide,
            last.requires_grad_(),
            large,
            normal(2, 70, 4, 4, dtype=dtype),
            normal(1, 1, 1, 1, dtype=dtype),
        ):
            yield x, normal(*(x.shape[:2] if per_channel else (len(x), 1, *x.shape[2:])), seed=1)

    return arguments


def pool_arguments(dtype):
    """A draw in tensors, shared or not, in numbers, permuted or not, on the layouts that the gates take."""
    for x, _ in gate_arguments(True)(dtype):
        order = torch.randperm(x.shape[2] * x.shape[3], device="cuda")
        scale, cell = torch.tensor(2, device="cuda"), torch.tensor([3, 1], device="cuda")[: len(x)]
        yield x, {"scale": scale, "cell": cell, "permutation": order}
        yield x, {"scale": scale, "cell": cell}
        yield x, {"scale": 3, "cell": 5, "permutation": order.expand(len(x), -1)}
        yield x, {"scale": 1, "cell": 0}


def film_arguments(dtype):
    """The maps of the gates; scale and shift as the halves of one output, as a network gives them."""
    for x, ecg in gate_arguments(True)(dtype):
        halves = normal(len(x), 2 * x.shape[1], seed=2).detach().chunk(2, dim=1)
        yield x, ecg, normal(len(x), 2, seed=3), *(half.requires_grad_() for half in halves)


# Each yields the arguments of one call; a dict at the end holds those with a keyword.
def segmentation_maps(dtype, *sizes, classes=9):
    return [normal(2, classes, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def labels(*shape, classes=9):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(0)).to("cuda")


def mutation_arguments(dtype):
    """Full and coarse maps, sizes that do not divide, maps that disagree beyond an exponential, many classes."""
    yield segmentation_maps(dtype, *[(37, 150)] * 3), labels(2, 37, 150)
    yield segmentation_maps(dtype, (8, 8), (16, 16), (32, 32)), labels(2, 128, 128)
    yield segmentation_maps(dtype, (5, 7), (64, 33)), labels(2, 70, 200)
    far = [(150 * m.detach()).requires_grad_() for m in segmentation_maps(dtype, (16, 16), (32, 32))]
    yield far, labels(2, 32, 32)
    yield segmentation_maps(dtype, (24, 24), classes=32), labels(2, 24, 24, classes=32)


def dice_ce_arguments(dtype):
    yield segmentation_maps(dtype, (40, 33))[0], labels(2, 40, 33)
    yield segmentation_maps(dtype, (8, 8), classes=1)[0], labels(2, 20, 20, classes=2)


ARGUMENTS = {
    "dice_ce_loss": dice_ce_arguments,
    "channel_gate": gate_arguments(per_channel=True),
    "depthwise_multi_kernel": depthwise_arguments,
    "dilated_attention": dilated_arguments,
    "dilated_attention_weights": dilated_weights_arguments,
    "memory_efficient_attention": attention_arguments,
    "mutation_loss": mutation_arguments,
    "upsample_argmax": argmax_arguments,
    "monte_carlo_pool": pool_arguments,
    "spatial_gate": gate_arguments(per_channel=False),
    "temporal_film_gate": film_arguments,
    "weighted_block_fusion": fusion_arguments,
}


def without_keywords(arguments):
    return (*arguments[:-1],) if isinstance(arguments[-1], dict) else arguments


def keywords(arguments):
    return arguments[-1] if isinstance(arguments[-1], dict) else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_values_and_every_gradient(name, dtype):
    operator, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    for arguments in ARGUMENTS[name](dtype):
        # A sum over all elements is rounded in another order on a GPU: allow what float32 loses over that many terms.
        leaves = torch.utils._pytree.tree_leaves(arguments)
        elements = max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        atol = 16 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * elements**0.5
        assert_op_matches(operator, reference, *without_keywords(arguments), atol=atol, **keywords(arguments))


def test_fusion_repeats_bit_for_bit():
    def run():
        maps, logits = next(fusion_arguments(torch.bfloat16))
        fused = kernels.weighted_block_fusion(maps, logits)
        return [fused, *torch.autograd.grad(fused.float().square().sum(), [logits, *maps])]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_fusion_needs_one_map_of_extra_memory():
    maps = [normal(4, 1025, 768, seed=i).detach() for i in range(12)]
    logits = torch.zeros(12, device="cuda", requires_grad=True)
    grad = torch.ones_like(maps[0])
    kernels.weighted_block_fusion(maps, logits).backward(grad)
    used = peak_memory_bytes(lambda: kernels.weighted_block_fusion(maps, logits).backward(grad), "cuda")
    assert used <= 1.2 * maps[0].nbytes


def test_k17_offsets_beyond_2_to_the_31():
    """Samples whose distance fits 32 bits, but not three times that distance."""
    free, _ = torch.cuda.mem_get_info()
    stride = 1 << 30
    if free < 8 * stride:
        pytest.skip("needs 8 GiB of free GPU memory")
    storage = torch.zeros(3 * stride + 16, dtype=torch.bfloat16, device="cuda")
    values = storage.as_strided((4, 1, 16), (stride, 16, 1))
    values[3] = 3.0
    fused = kernels.weighted_block_fusion([values, values], torch.zeros(2, device="cuda"))
    assert torch.equal(fused, values)


def test_full_graph_compilation():
    for name in kernels.OPERATORS:
        arguments = next(ARGUMENTS[name](torch.bfloat16))
        operator = getattr(kernels, name)
        compiled = torch.compile(operator, fullgraph=True)
        args, options = without_keywords(arguments), keywords(arguments)
        torch.testing.assert_close(compiled(*args, **options), operator(*args, **options))


def test_compare_holds_forms_against_the_gpu_s_own_ceilings(tmp_path):
    x = normal(1024, 1024, dtype=torch.bfloat16)
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

WARM_UP_STEPS = 3


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
    arguments = next(ARGUMENTS[name](torch.float32))
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]

    def step():
        out = getattr(kernels, name)(*without_keywords(arguments), **keywords(arguments))
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if leaves else ())]

    expected = [result.clone() for result in step()]
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        for result in results:
            result.zero_()
        graph.replay()
        torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recorded_training_step_trains_as_an_eager_one(name):
    """Clipped and updated as `fit` does it; a replay draws anew, and from one seed what an eager step draws from it."""
    network = NETWORKS[name]
    batch = {key: value.to("cuda") for key, value in network.batch(2).items()}
    recipe = Recipe(epochs=1, batch_size=2, lr=1e-3, optimizer="sgd", grad_clip=1.0)

    def stepping(model):
        (group,) = make_groups(model, recipe, None)

        def step():
            group.optimizer.zero_grad(set_to_none=True)
            network.step(model, batch).backward()
            group.clip_gradient()
            group.optimizer.step()

        return step

    eager = network.make().to("cuda").train()
    recorded = copy.deepcopy(eager)
    steps = stepping(eager), stepping(recorded)
    for step in steps:
        warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps[1]()
    for seed in range(2):
        for run in (steps[0], graph.replay):
            torch.cuda.manual_seed(seed)
            run()
    torch.testing.assert_close(recorded.state_dict(), eager.state_dict(), atol=1e-4, rtol=1e-3)
