"""DINO-UNet on images of any size, type and number of channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dino_unet import backward, images, network
from torch.nn import functional as F

from trifuse.kernels import ShapeError


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["error", "pad", "resize"]))
@settings(max_examples=30)
def test_b1_any_size_is_segmented_whole_or_refused(height, width, policy):
    model, image = MODELS_BY_POLICY[policy], images(1, 3, height, width)
    if policy == "error" and (height % 14 or width % 14):
        with pytest.raises(ShapeError, match=r"(height|width) \d+ is not divisible by the patch size 14; use \d+"):
            model(image)
    else:
        assert model(image).shape == (1, 2, height, width)


MODELS_BY_POLICY = {policy: network(size_policy=policy).eval() for policy in ("error", "pad", "resize")}


def test_b1_padding_repeats_the_border_and_resizing_goes_to_the_nearest_multiple():
    image = images(1, 3, 30, 41)
    plain = MODELS_BY_POLICY["error"]
    padded = F.pad(image, (0, 1, 0, 12), mode="replicate")
    assert torch.equal(MODELS_BY_POLICY["pad"](image), plain(padded)[..., :30, :41])
    assert torch.equal(MODELS_BY_POLICY["pad"].prepare(image), padded)
    assert MODELS_BY_POLICY["resize"].prepare(image).shape == (1, 3, 28, 42)


@pytest.mark.parametrize("policy", ["error", "pad", "resize"])
def test_b1_a_size_that_fits_is_left_alone(policy):
    image = images(1, 3, 42, 14)
    assert torch.equal(MODELS_BY_POLICY[policy](image), MODELS_BY_POLICY["error"](image))


def test_b2_grey_images_are_repeated_where_declared():
    image = images(2, 1, 28, 28)
    declared = network(in_channels=1).eval()
    assert torch.equal(declared(image), network().eval()(image.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 28, 28), {}, r"images of shape \(B, 3, H, W\), got \(2, 1, 28, 28\); .* built with in_channels=1"),
        ((2, 4, 28, 28), {}, r"got \(2, 4, 28, 28\)"),
        ((2, 3, 28, 28), {"in_channels": 1}, r"images of shape \(B, 1, H, W\), got \(2, 3, 28, 28\)"),
        ((3, 28, 28), {}, r"got \(3, 28, 28\); add the batch dimension with image\[None\]"),
        ((28, 28), {}, r"got \(28, 28\)"),
        ((2, 28, 28, 3), {}, r"channels come second: use image.permute\(0, 3, 1, 2\)"),
    ],
)
def test_b2_b3_b4_images_of_another_shape(shape, options, message):
    with pytest.raises(ShapeError, match=message):
        network(**options)(images(*shape))


def test_images_of_integers():
    with pytest.raises(TypeError, match=r"expected normalised floating-point images, got torch.uint8"):
        network()(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_classes": 5}, {"final_resize": "features"}])
def test_shape_of_the_logits(options):
    logits = network(**options)(images(2, 3, 70, 42))
    assert logits.shape == (2, options.get("num_classes", 2), 70, 42)


@pytest.mark.parametrize("channels", [(8,), (8, 4), (8, 8, 4, 4, 2)])
def test_any_number_of_stages(channels):
    assert network(channels=channels, top_k=len(channels))(images(2, 3, 28, 28)).shape == (2, 2, 28, 28)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_low_precision_encoder_feeds_a_float32_decoder(dtype, stream):
    image = images(2, 3, 28, 28)
    model = network(encoder_dtype=dtype, stream_fusion=stream)
    logits = backward(model, image)
    assert logits.dtype == torch.float32
    assert model.fusion.logits.grad.isfinite().all()
    exact = network()(image)
    assert (logits - exact).abs().max() <= 0.1 * exact.abs().max()


@pytest.mark.parametrize("conv_then_resize", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_images_of_another_type_are_converted(dtype, stream, conv_then_resize):
    model = network(stream_fusion=stream, conv_then_resize=conv_then_resize).eval()
    image = images(1, 3, 28, 42)
    expected = model(image)
    torch.testing.assert_close(model(image.to(dtype)), expected, atol=0.1, rtol=0)
    converted = model.to(dtype)(image)
    assert converted.dtype == dtype
    torch.testing.assert_close(converted.float(), expected, atol=0.1, rtol=0)


def test_fixed_blocks_are_known_on_the_meta_device_and_to_an_export():
    model, image = network(blocks="last4").eval(), images(1, 3, 28, 42)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), model(image))
    assert model.to("meta")(image.to("meta")).shape == (1, 2, 28, 42)


def test_autocast():
    image = images(2, 3, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        low = network()(image)
    exact = network()(image)
    assert (low - exact).abs().max() <= 0.1 * exact.abs().max()
