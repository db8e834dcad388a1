"""DINO-UNet with its maps streamed or taken from a cache: the same results, and less memory."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_dino_unet import SHAPE, backward, double, images, network, spread_logits

from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.dino_unet.variants import EncoderShape
from trifuse.kernels import ShapeError
from trifuse.kernels.testing.measuring import peak_memory_bytes

# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_gradient", ["project", "recompute"])
@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_scale": "raw", "order": "weight"},
        {"skip_scale": "none"},
        {"bottleneck": "fused"},
        {"bottleneck": "last"},
        {"blocks": "last4"},
        {"norm_blocks": False},
    ],
    ids=str,
)
def test_streaming_equals_stored(options, dtype, relative, stream_gradient):
    """Against float64, so that in float32 what both lose by rounding is not held against streaming."""
    image = images(2, 3, 42, 28, dtype=getattr(torch, dtype))
    stored = network(encoder_dtype=dtype, norm="group", **options).to(image.dtype)
    if stored.fusion.logits is not None:
        spread_logits(stored)
    exact = copy.deepcopy(stored).double()
    streaming = network(
        stream_fusion=True, stream_gradient=stream_gradient, encoder_dtype=dtype, norm="group", **options
    ).to(image.dtype)
    streaming.load_state_dict(stored.state_dict())

    def results(model, image):
        logits = backward(model, image)
        return {"": logits} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    wanted, got, truth = results(stored, image), results(streaming, image), results(exact, image.double())
    for name in truth:
        lost = (wanted[name] - truth[name]).abs().max()
        assert (got[name] - truth[name]).abs().max() <= 2 * lost + relative * truth[name].abs().max(), name


def test_streaming_runs_no_block_that_nobody_needs():
    model = network(stream_fusion=True, bottleneck="last")
    asked = []
    iterate = model.encoder.iterate
    model.encoder.iterate = lambda x, blocks: asked.append(blocks) or iterate(x, blocks)
    model(images(2, 3, 28, 28))
    assert asked == [sorted({*model.fusion.selected, SHAPE.depth - 1})]


GIANT_PROPORTIONS = EncoderShape(embed_dim=96, depth=4, num_heads=2, ffn="swiglu", native_grid=16)


def peak(depth: int, pass_: str, **options) -> int:
    """Peak extra memory with the bottleneck six times narrower than the tokens, as in the giant variant."""
    model = DinoUNet(
        DinoUNetConfig(
            variant=replace(GIANT_PROPORTIONS, depth=depth), channels=(16, 8, 4, 2), bottleneck_dim=16, **options
        )
    )
    image = images(1, 3, 224, 224)
    keep = {*model.fusion.selected, depth - 1}

    def encode_and_fuse():
        if not model.config.stream_fusion:
            features = model.encoder(image)["features"]
            return features, model.decoder.proj_fused(model.fusion(features))
        recompute = (lambda: model.encoder.iterate(image)) if model.config.stream_gradient == "recompute" else None
        return model.fusion.stream(model.encoder.iterate(image), keep, model.decoder.proj_fused.weight, recompute)

    def encode_fuse_and_differentiate():
        kept, fused = encode_and_fuse()
        fused.sum().backward()
        return kept

    @torch.no_grad()
    def infer():
        return encode_and_fuse()

    passes = {"infer": infer, "fuse": encode_fuse_and_differentiate, "step": lambda: backward(model, image)}
    passes[pass_]()
    return peak_memory_bytes(passes[pass_])


@pytest.mark.parametrize(
    ("pass_", "stream_gradient", "bound"),
    [
        ("infer", "project", 1.3),
        ("fuse", "recompute", 1.3),
        ("step", "project", 1.3),
        ("step", "recompute", 1.3),
        ("fuse", "project", 1.5),
    ],
)
def test_streaming_memory_hardly_grows_with_depth(pass_, stream_gradient, bound):
    """40 blocks against 4. Only the pass that keeps projections grows with them: by a sixth of a map for each block."""
    options = {"stream_fusion": True, "stream_gradient": stream_gradient}
    assert peak(40, pass_, **options) <= bound * peak(4, pass_, **options)


def test_stored_memory_does_grow_with_depth():
    assert peak(40, "fuse") > 3 * peak(4, "fuse")


# --- cached features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bottleneck": "last"}, {"blocks": "last4"}, {"blocks": (3, 0, 2, 1)}])
def test_features_from_a_cache_give_the_same(options):
    model, image = double(**options), images(2, 3, 28, 42, dtype=torch.float64)
    blocks = model.required_blocks()
    encoded = model.encoder(image, blocks)
    assert torch.equal(model.forward_features(encoded["features"], encoded["grid"], image), model(image))


def test_required_blocks():
    assert network().required_blocks() == tuple(range(6))
    assert network(blocks="last4").required_blocks() == (2, 3, 4, 5)
    assert network(blocks=(3, 0, 2, 1)).required_blocks() == (0, 1, 2, 3, 5)


def test_wrong_number_of_features():
    model = network(blocks="last4")
    with pytest.raises(ShapeError, match=r"the features of blocks \(2, 3, 4, 5\), got 6 maps"):
        model.forward_features([images(1, 4, 16)] * 6, (2, 2), images(1, 3, 28, 28))
