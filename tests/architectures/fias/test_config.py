"""The configuration: what it refuses, and what it says then."""

from __future__ import annotations

import pytest

from trifuse.architectures.fias import FiasConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"variant": "huge"}, "variant: expected one of 'nano', 'tiny', 'small', 'base', got 'huge'"),
        ({"fusion": "mean"}, "fusion: expected one of 'caf', 'sum', 'concat', got 'mean'"),
        ({"no_dmk": "zero"}, "no_dmk: expected one of 'dup', 'bypass', None, got 'zero'"),
        ({"norm": "instance"}, "norm: expected one of 'batch', 'group'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dmk_depth": 0}, "dmk_depth must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"dmk_kernels": (5, 6)}, r"dmk_kernels must be odd numbers, at least one, got \(5, 6\)"),
        ({"dmk_kernels": ()}, r"at least one, got \(\)"),
        ({"spatial_kernel": 4}, "spatial_kernel must be an odd number, got 4"),
        ({"spatial_kernel": -1}, "spatial_kernel must be an odd number, got -1"),
        ({"in_channels": 3, "input_adapter": "repeat"}, "'repeat' takes images of 1 channels, got in_channels 3"),
        ({"input_adapter": "none"}, "'none' takes images of 3 channels, got in_channels 1"),
        ({"channel_weights": "as written"}, "channel_weights: expected one of 'normalised', 'literal'"),
        ({"dilations": ()}, r"dilations must be whole numbers of at least 1, at least one, got \(\)"),
        ({"dilations": (0, 1, 2)}, "dilations must be whole numbers of at least 1"),
        ({"dilations": (1, 2)}, r"stage 1: 3 heads are no multiple of the 2 dilations \(1, 2\); each dilation has"),
        ({"scales": ()}, "scales must be positive"),
        ({"scales": (0, 1)}, "scales must be positive"),
        ({"scale_probs": (0.5, 0.5)}, "scale_probs must be a probability for each of"),
        ({"scale_probs": (0.5, 0.7, -0.2)}, "scale_probs must be a probability for each of"),
        ({"scale_probs": (0.5, 0.1, 0.1)}, "scale_probs must be a probability for each of"),
        ({"decoder_heads": (4, 4, 4)}, "decoder_heads must be 4 numbers"),
        ({"decoder_heads": (8, 6, 4, 5)}, "5 heads do not divide the 72 channels of block 4"),
        ({"decoder_heads": (8, 6, 4, 0)}, "0 heads do not divide the 72 channels of block 4"),
    ],
)
def test_b8_configurations_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=message):
        FiasConfig(**overrides)
