"""Calls that every operator must get right as compiled: on a GPU, and as compiled for one.

Each function takes a device and a type, and yields the arguments of one call after the other; a dict at the end holds
those with a keyword.
"""

from __future__ import annotations

import os

import torch

from trifuse.kernels.testing import assert_op_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Draw a leaf that requires a gradient, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def fusion_arguments(device, dtype):
    """Odd sizes, several tiles, more maps than one launch of the backward kernel takes, a class token left out.

    And selections: of frozen and of trained maps, of one map twice.
    """
    yield [normal(device, 2, 17, 40, dtype=dtype, seed=i) for i in range(12)], normal(device, 12)
    yield [normal(device, 3, 257, 384, dtype=dtype, seed=i) for i in range(40)], normal(device, 40)
    yield (
        [normal(device, 2, 101, 64, dtype=dtype, seed=i).detach()[:, 1:].requires_grad_() for i in range(3)],
        normal(device, 3),
    )
    yield [normal(device, 1, 1, 1, dtype=dtype)], normal(device, 1)
    frozen = [normal(device, 2, 101, 64, dtype=dtype, seed=i).detach()[:, 1:] for i in range(12)]
    yield frozen, normal(device, 12), torch.tensor([11, 3, 9, 0], device=device)
    trained = [normal(device, 2, 17, 40, dtype=dtype, seed=i) for i in range(3)]
    yield trained, normal(device, 3), torch.tensor([2, 0, 2], device=device)


def attention_arguments(device, dtype):
    for batch, tokens, heads, width in ((2, 197, 3, 64), (1, 5, 1, 24)):
        yield tuple(normal(device, batch, tokens, heads, width, dtype=dtype, seed=i) for i in range(3))


def dilated_arguments(device, dtype):
    """The slices of one packed projection at head widths of DilateFormer and others, and each border."""
    for border, (batch, height, width), heads, d in (
        ("zero", (2, 33, 29), 3, 24),
        ("zero", (1, 7, 5), 6, 32),
        ("mask", (2, 8, 8), 3, 72),
        ("shift", (1, 17, 13), 3, 5),
    ):
        packed = normal(device, batch, height, width, 3 * heads * d, dtype=dtype).detach()
        maps = [part.requires_grad_() for part in packed.chunk(3, dim=-1)]
        yield *maps, {"num_heads": heads, "border": border}


def dilated_weights_arguments(device, dtype):
    for q, k, _, options in dilated_arguments(device, dtype):
        yield q, k, options


def depthwise_arguments(device, dtype):
    """Strips that fill the width and that do not, rows in parts, a map smaller than the kernels, wide kernels."""
    for shape, sides, memory_format in (
        ((2, 72, 9, 18), (5, 7), torch.channels_last),
        ((1, 17, 5, 3), (5, 7), torch.contiguous_format),
        ((1, 8, 32, 8), (5, 7), torch.channels_last),
        ((1, 8, 32, 8), (5, 7), torch.contiguous_format),
        ((1, 3, 11, 6), (3, 9), torch.channels_last),
    ):
        x = normal(device, *shape, dtype=dtype).detach().contiguous(memory_format=memory_format)
        yield x.requires_grad_(), [normal(device, shape[1], 1, k, k, seed=k) for k in sides]


def argmax_arguments(device, dtype):
    """Few enough pixels that no two classes of drawn logits come as near each other as rounding."""
    for sides, size, classes in (((4, 8, 16), (37, 53), 5), ((40,), (16, 20), 5), ((3, 5), (18, 9), 17)):
        yield [normal(device, 2, classes, side, side, dtype=dtype, seed=side).detach() for side in sides], size


def gate_arguments(per_channel):
    """Odd sizes, more channels and pixels than a tile, channels last, columns of a wider map, sums in parts."""

    def arguments(device, dtype):
        wide = normal(device, 2, 5, 33, 50, dtype=dtype).detach()[..., 1:42].requires_grad_()
        last = normal(device, 2, 72, 64, 64, dtype=dtype).detach().contiguous(memory_format=torch.channels_last)
        large = normal(device, 1, 3, 200, 200, dtype=dtype)
        for x in (
            wide,
            last.requires_grad_(),
            large,
            normal(device, 2, 70, 4, 4, dtype=dtype),
            normal(device, 1, 1, 1, 1, dtype=dtype),
        ):
            yield x, normal(device, *(x.shape[:2] if per_channel else (len(x), 1, *x.shape[2:])), seed=1)

    return arguments


def norm_arguments(device, dtype):
    """The maps of the gates, but for a single position; a plane of many tiles, also in parts, in both layouts."""
    for x, weight in gate_arguments(True)(device, dtype):
        if x.shape[2] * x.shape[3] > 1:
            yield x, weight.detach()[0].requires_grad_(), normal(device, x.shape[1], seed=2)
    last = normal(device, 1, 72, 34, 34, dtype=dtype).detach().contiguous(memory_format=torch.channels_last)
    yield last.requires_grad_(), normal(device, 72, dtype=dtype, seed=3), {"negative_slope": 0.2, "eps": 1e-3}


def tokens_arguments(device, dtype):
    """Widths of the networks and others, a class token left out, factors, terms of two types, nothing added."""

    def factors(width, samples):
        kept = normal(device, samples, seed=6).detach()
        return {"layer_scale": normal(device, width, seed=5), "sample_scale": kept}

    for samples, tokens, width in ((2, 130, 72), (1, 33, 768), (3, 5, 1536), (2, 3, 7), (1, 1, 1)):
        x, branch = (normal(device, samples, tokens + 1, width, dtype=dtype, seed=i).detach()[:, 1:] for i in (0, 1))
        affine = [normal(device, width, seed=i) for i in (2, 3)]
        yield x.requires_grad_(), branch.requires_grad_(), *affine, factors(width, samples)
        yield x, branch, *affine
    x, branch = normal(device, 2, 9, 24), normal(device, 2, 9, 24, dtype=dtype, seed=1)
    yield x, branch, normal(device, 24, seed=2), None, {"layer_scale": normal(device, 24, dtype=dtype, seed=5)}
    yield normal(device, 2, 300, 144, dtype=dtype), None, *(normal(device, 144, dtype=dtype, seed=i) for i in (2, 3))


def batch_norm_arguments(device, dtype):
    """The maps of instance norm, both activations, statistics of the batch and running ones; small maps and others."""
    for number, (x, weight, *others) in enumerate(norm_arguments(device, dtype)):
        activation, bias = ("relu", "gelu")[number % 2], None if isinstance(others[0], dict) else others[0]
        yield x, None, None, weight, bias, {"activation": activation}
        mean, variance = normal(device, x.shape[1], seed=4).detach() / 8, 1 + weight.detach().float().square()
        yield x, mean, variance, weight, bias, {"activation": activation, "eps": 1e-3}


def pool_arguments(device, dtype):
    """A draw in tensors, shared or not, in numbers, permuted or not, on the layouts that the gates take."""
    for x, _ in gate_arguments(True)(device, dtype):
        order = torch.randperm(x.shape[2] * x.shape[3], device=device)
        scale, cell = torch.tensor(2, device=device), torch.tensor([3, 1], device=device)[: len(x)]
        yield x, {"scale": scale, "cell": cell, "permutation": order}
        yield x, {"scale": scale, "cell": cell}
        yield x, {"scale": 3, "cell": 5, "permutation": order.expand(len(x), -1)}
        yield x, {"scale": 1, "cell": 0}


def film_arguments(device, dtype):
    """The maps of the gates; scale and shift as the halves of one output, as a network gives them."""
    for x, ecg in gate_arguments(True)(device, dtype):
        halves = normal(device, len(x), 2 * x.shape[1], seed=2).detach().chunk(2, dim=1)
        yield x, ecg, normal(device, len(x), 2, seed=3), *(half.requires_grad_() for half in halves)


def segment_film_arguments(device, dtype):
    """The maps of the temporal gate, 17 segments; and labels of a wider map, scores that lie apart, three segments."""
    for number, (x, shared, weights, scale, shift) in enumerate(film_arguments(device, dtype)):
        count = 3 if number == 0 else 17
        generator = torch.Generator().manual_seed(4)
        segments = torch.randint(0, count + 1, (len(x), *x.shape[2:]), generator=generator, dtype=torch.uint8)
        scores = normal(device, len(x), count, seed=5)
        if number == 0:
            segments = torch.cat([segments, segments], dim=2)[:, :, 1 : x.shape[3] + 1]
            scores = scores.detach().t().contiguous().t().requires_grad_()
        yield x, segments.to(device), shared, scores, normal(device, x.shape[1], seed=6), weights, scale, shift


def segmentation_maps(device, dtype, *sizes, classes=9):
    return [normal(device, 2, classes, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def labels(device, *shape, classes=9):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(0)).to(device)


def mutation_arguments(device, dtype):
    """Full and coarse maps, sizes that do not divide, maps that disagree beyond an exponential, many classes."""
    yield segmentation_maps(device, dtype, *[(37, 150)] * 3), labels(device, 2, 37, 150)
    yield segmentation_maps(device, dtype, (8, 8), (16, 16), (32, 32)), labels(device, 2, 128, 128)
    yield segmentation_maps(device, dtype, (5, 7), (64, 33)), labels(device, 2, 70, 200)
    far = [(150 * m.detach()).requires_grad_() for m in segmentation_maps(device, dtype, (16, 16), (32, 32))]
    yield far, labels(device, 2, 32, 32)
    yield segmentation_maps(device, dtype, (24, 24), classes=32), labels(device, 2, 24, 24, classes=32)


def dice_ce_arguments(device, dtype):
    yield segmentation_maps(device, dtype, (40, 33))[0], labels(device, 2, 40, 33)
    yield segmentation_maps(device, dtype, (8, 8), classes=1)[0], labels(device, 2, 20, 20, classes=2)


ARGUMENTS = {
    "batch_norm_activation": batch_norm_arguments,
    "dice_ce_loss": dice_ce_arguments,
    "channel_gate": gate_arguments(per_channel=True),
    "depthwise_multi_kernel": depthwise_arguments,
    "dilated_attention": dilated_arguments,
    "dilated_attention_weights": dilated_weights_arguments,
    "memory_efficient_attention": attention_arguments,
    "instance_norm_leaky_relu": norm_arguments,
    "mutation_loss": mutation_arguments,
    "residual_layer_norm": tokens_arguments,
    "upsample_argmax": argmax_arguments,
    "monte_carlo_pool": pool_arguments,
    "segment_film_gate": segment_film_arguments,
    "spatial_gate": gate_arguments(per_channel=False),
    "temporal_film_gate": film_arguments,
    "weighted_block_fusion": fusion_arguments,
}


SMALL = 1 << 13  # elements of the largest tensor


def small_attention(device, dtype):
    for border, side in (("zero", 3), ("mask", 3), ("shift", 9)):
        maps = [normal(device, 1, side, side, 9, dtype=dtype, seed=i) for i in range(3)]
        yield *maps, {"num_heads": 3, "border": border}


def small_attention_weights(device, dtype):
    for q, k, _, options in small_attention(device, dtype):
        yield q, k, options


def small_convolutions(device, dtype):
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = normal(device, 2, 3, 5, 4, dtype=dtype).detach().contiguous(memory_format=memory_format)
        yield x.requires_grad_(), [normal(device, 3, 1, k, k, seed=k) for k in (3, 5)]


def small_maps(device, dtype):
    yield [m.detach() for m in segmentation_maps(device, dtype, (2, 3), (4, 5), classes=3)], (5, 6)


def small_mutation(device, dtype):
    yield segmentation_maps(device, dtype, (2, 3), (4, 5), classes=2), labels(device, 2, 4, 5, classes=2)


def small_dice_ce(device, dtype):
    yield segmentation_maps(device, dtype, (2, 3), classes=1)[0], labels(device, 2, 4, 5, classes=2)


# Of operators whose kernels loop over taps, heads or subsets, which an interpreter feels whatever the size.
SMALL_ARGUMENTS = {
    "batch_norm_activation": batch_norm_arguments,
    "dice_ce_loss": small_dice_ce,
    "depthwise_multi_kernel": small_convolutions,
    "dilated_attention": small_attention,
    "dilated_attention_weights": small_attention_weights,
    "upsample_argmax": small_maps,
    "mutation_loss": small_mutation,
}


def calls(name, device, dtype):
    """Yield the calls of an operator; where kernels are interpreted, on the stand-in GPU, small ones instead."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield from ARGUMENTS[name](device, dtype)
        return
    if name in SMALL_ARGUMENTS:
        yield from SMALL_ARGUMENTS[name](device, dtype)
        return
    listed = list(ARGUMENTS[name](device, dtype))
    least = min(map(largest, listed))
    yield from (arguments for arguments in listed if largest(arguments) <= max(least, SMALL))


def largest(arguments):
    """Return the elements of the largest tensor among arguments."""
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))


def without_keywords(arguments):
    return (*arguments[:-1],) if isinstance(arguments[-1], dict) else arguments


def keywords(arguments):
    return arguments[-1] if isinstance(arguments[-1], dict) else {}


def tolerance(arguments, dtype):
    """Return what float32 loses over the longest sum: its terms are added in another order than in the reference."""
    return 16 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * largest(arguments) ** 0.5


def assert_call_matches(operator, reference, arguments, dtype):
    """Hold the values and every gradient of one call against the reference."""
    atol = tolerance(arguments, dtype)
    assert_op_matches(operator, reference, *without_keywords(arguments), atol=atol, **keywords(arguments))
