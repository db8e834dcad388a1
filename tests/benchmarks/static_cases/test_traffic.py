"""What the kernels move is what they declare: every address that a launch touches is counted, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the interpreter is triton's")

from triton.runtime import interpreter

from trifuse import kernels
from trifuse.benchmarks.reporting.ahead_of_time import case_modules
from trifuse.kernels.gpu import launching, segmentation_loss
from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss

TRAFFIC = [(file, traffic) for file, module in case_modules().items() for traffic in module.TRAFFIC]
MOST_BEYOND = 0.03  # of what is declared: logits, gates, kernels and partial sums, at these small sizes


class Meter:
    """Adds up the bytes of all addresses that each launch loads, and of those that it stores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self.seen: dict[tuple[str, int], list[np.ndarray]] = {}
        builder, launch = interpreter.InterpreterBuilder, launching.launch
        load, store = builder.create_masked_load, builder.create_masked_store

        def metered_load(own, pointers, mask, *rest):
            self._see("load", pointers, mask)
            return load(own, pointers, mask, *rest)

        def metered_store(own, pointers, value, mask, *rest):
            self._see("store", pointers, mask)
            return store(own, pointers, value, mask, *rest)

        def metered_launch(*arguments, **settings):
            launch(*arguments, **settings)
            self.bytes += sum(size * len(np.unique(np.concatenate(seen))) for (_, size), seen in self.seen.items())
            self.seen.clear()

        monkeypatch.setattr(builder, "create_masked_load", metered_load)
        monkeypatch.setattr(builder, "create_masked_store", metered_store)
        monkeypatch.setattr(launching, "launch", metered_launch)

    def _see(self, what: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.seen.setdefault((what, size), []).append(pointers.data[mask.data.astype(bool)].ravel())


def _tensor(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def _fusion(trained: bool) -> Callable:
    return lambda B, M, D, N, **_: kernels.weighted_block_fusion(
        [_tensor(B, M, D, grad=trained) for _ in range(N)], _tensor(N)
    )


def _fusion_selecting(B, M, D, N, K, **_):
    maps = [_tensor(B, M, D, grad=False) for _ in range(N)]
    return kernels.weighted_block_fusion(maps, _tensor(N), torch.arange(N)[-K:].flip(0))[0]


def _windows(B, H, W, C, heads, e=4, **_):
    dtype = {2: torch.bfloat16, 4: torch.float32}[e]
    return kernels.dilated_attention(*(_tensor(B, H, W, C).to(dtype) for _ in range(3)), num_heads=heads)


def _segmentation(B, K, H, W, N, **_):
    target = torch.arange(B * H * W).reshape(B, H, W) % K
    if N == 1:
        return kernels.dice_ce_loss(_tensor(B, K, H, W), target)
    return kernels.mutation_loss([_tensor(B, K, H, W) for _ in range(N)], target)


def _losses(B, K, S, **_):
    options = {"first": 0, "batch_dice": True, "squared": True, "w_ce": 1.0, "w_dice": 1.0, "best": 1.0, "smooth": 1e-5}
    return segmentation_loss.forward(_tensor(B, S, 2 * K + 1), _tensor(B, K), None, **options)


def _levels(B, K, H, W, **_):
    target = torch.arange(B * H * W).reshape(B, H, W) % K
    targets = [target[:, ::step, ::step] for step in (1, 2, 4, 8, 16)]
    maps = [_tensor(B, K, *each.shape[1:]) for each in targets]
    options = {"batch_dice": True, "w_ce": 1.0, "w_dice": 1.0}
    return deep_supervision_loss(maps, targets, [1.0] * 5, **options)


def _film(B, C, H, W, **_):
    return kernels.temporal_film_gate(_tensor(B, C, H, W), _tensor(B, C), _tensor(B, 2), _tensor(B, C), _tensor(B, C))


def _segment_film(B, C, H, W, **_):
    segments = (torch.arange(B * H * W).view(B, H, W) % 18).to(torch.uint8)
    sizes = ((B, C), (B, 17), (C,), (B, 2), (B, C), (B, C))
    return kernels.segment_film_gate(_tensor(B, C, H, W), segments, *(_tensor(*size) for size in sizes))


def _norm(B, C, H, W, **_):
    return kernels.instance_norm_leaky_relu(_tensor(B, C, H, W), _tensor(C), _tensor(C))


def _tokens(with_branch, **options):
    def run(B, M, C, **_):
        terms = [_tensor(B, M, C) for _ in range(1 + with_branch)]
        kept = {name: torch.ones(B) for name in options}
        results = kernels.residual_layer_norm(*terms, *[None] * (2 - len(terms)), _tensor(C), _tensor(C), **kept)
        return torch.stack(results) if with_branch else results[1]

    return run


def _batch_norm(training):
    return lambda B, C, H, W, **_: kernels.batch_norm_activation(
        _tensor(B, C, H, W),
        torch.zeros(C),
        torch.ones(C),
        _tensor(C),
        _tensor(C),
        training=training,
    )


def _depthwise(B, C, H, W, K, **_):
    return kernels.depthwise_multi_kernel(_tensor(B, C, H, W), [_tensor(C, 1, K, K)])


def _labels(B, K, H, W, cells, **_):
    side = round(cells**0.5)
    return kernels.upsample_argmax([_tensor(B, K, side, side, grad=False)], (H, W))


_MAP = {"B": 1, "C": 4, "H": 16, "W": 64}
_BATCH = {"B": 2, "C": 2, "H": 64, "W": 128}
_FUSED = {"B": 2, "M": 16, "D": 64, "N": 3, "launches": 1}
_CONVOLVED = {"B": 1, "C": 16, "H": 16, "W": 64, "K": 3}
_CONVOLVED_WIDE = {"B": 1, "C": 4, "H": 64, "W": 64, "K": 9, "samples": 1}
_TOKENS = {"B": 2, "M": 192, "C": 128, "parts": 6}
_LOSS = {"B": 1, "K": 2, "H": 16, "W": 128}
# Module, pass, sizes with whole tiles, and what to run; a backward pass is what follows the forward one.
RUNS = [
    ("weighted_block_fusion", "forward", _FUSED, _fusion(False)),
    ("weighted_block_fusion", "forward, selecting", _FUSED | {"K": 2}, _fusion_selecting),
    ("weighted_block_fusion", "forward, selecting", _FUSED | {"N": 12, "K": 4}, _fusion_selecting),
    ("weighted_block_fusion", "backward, frozen maps", _FUSED, _fusion(False)),
    ("weighted_block_fusion", "backward, frozen maps", _FUSED | {"N": 26, "launches": 2}, _fusion(False)),
    ("weighted_block_fusion", "backward, trained maps", _FUSED, _fusion(True)),
    *(("dilated_attention", name, {"B": 1, "H": 8, "W": 16, "C": 72, "heads": 3}, _windows)
      for name in ("forward", "backward")),
    *((f"dilated_attention_{file}", name, {"B": 1, "H": 8, "W": 16, "C": 72, "heads": 3, "e": 2}, _windows)
      for file, name in (("pairs", "forward"), ("pairs_backward", "backward"))),
    *(("gates", name, _MAP, lambda B, C, H, W, **_: kernels.channel_gate(_tensor(B, C, H, W), _tensor(B, C)))
      for name in ("forward", "backward")),
    *(("gates", name, _MAP | {"C": 64, "H": 4},
       lambda B, C, H, W, **_: kernels.spatial_gate(_tensor(B, C, H, W), _tensor(B, 1, H, W)))
      for name in ("forward", "backward")),
    *(("monte_carlo_pool", name, _MAP | {"scale": 2},
       lambda B, C, H, W, scale, **_: kernels.monte_carlo_pool(_tensor(B, C, H, W), scale=scale, cell=1))
      for name in ("forward", "backward")),
    *(("temporal_film_gate", name, _MAP, _film) for name in ("forward", "backward")),
    ("segment_film_gate", "forward", _MAP, _segment_film),
    ("segment_film_gate_backward", "backward", _MAP, _segment_film),
    ("segmentation_sums", "forward", _LOSS | {"N": 1}, _segmentation),
    ("segmentation_sums", "forward", _LOSS | {"N": 2}, _segmentation),
    ("segmentation_sums_backward", "backward", _LOSS | {"N": 2}, _segmentation),
    *(("deep_supervision_loss", name, {"B": 1, "K": 2, "H": 64, "W": 64}, _levels) for name in ("forward", "backward")),
    *((file, f"{name}, {planes} planes", _MAP | size, _norm)
      for file, name in (("instance_norm_leaky_relu", "forward"), ("instance_norm_leaky_relu_backward", "backward"))
      for planes, size in (("held", {}), ("large", {"C": 1, "H": 160, "W": 128}))),
    ("residual_layer_norm", "forward", _TOKENS, _tokens(True)),
    ("residual_layer_norm", "forward, nothing added", _TOKENS, _tokens(False)),
    ("residual_layer_norm_backward", "backward", _TOKENS, _tokens(True)),
    ("residual_layer_norm_backward", "backward, branch apart", _TOKENS, _tokens(True, sample_scale=True)),
    ("batch_norm_activation", "forward, training", _BATCH, _batch_norm(True)),
    ("batch_norm_activation", "forward, evaluation", _BATCH, _batch_norm(False)),
    ("batch_norm_activation_backward", "backward, training", _BATCH, _batch_norm(True)),
    ("depthwise_multi_kernel", "forward", _CONVOLVED, _depthwise),
    ("depthwise_multi_kernel_backward", "backward", _CONVOLVED, _depthwise),
    *(("depthwise_multi_kernel_wide", name, _CONVOLVED_WIDE, _depthwise) for name in ("forward", "backward")),
    ("segmentation_loss", "losses", {"B": 40, "K": 4, "S": 3}, _losses),
    ("upsample_argmax", "labels", {"B": 1, "K": 3, "H": 8, "W": 128, "cells": 16}, _labels),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "sizes", "run"), RUNS, ids=[f"{m}, {n}" for m, n, *_ in RUNS])
def test_pass_moves_what_is_declared(module, name, sizes, run, monkeypatch):
    meter = Meter(monkeypatch)
    with kernels.backend("triton"):
        result = run(**sizes)
        if name.startswith("backward"):
            meter.bytes = 0
            result.backward(_tensor(*result.shape, grad=False).to(result.dtype))
    sizes = {"e": 4, **sizes}
    for traffic in [traffic for file, traffic in TRAFFIC if (file, traffic.name) == (module, name)]:
        declared = traffic.evaluate(traffic.elements, **sizes) * traffic.evaluate(traffic.moved, **sizes)
        assert declared <= meter.bytes <= (1 + MOST_BEYOND) * declared


def test_every_declared_pass_is_counted():
    assert {(file, traffic.name) for file, traffic in TRAFFIC} == {(module, name) for module, name, *_ in RUNS}
    assert {file for file, _ in TRAFFIC} == case_modules().keys()


def test_nothing_moves_less_than_the_least():
    for _, traffic in TRAFFIC:
        assert traffic.evaluate(traffic.moved) >= traffic.evaluate(traffic.least) > 0
