"""TAFF-UNet's configuration: what it refuses, and with which advice."""

from __future__ import annotations

import pytest

from trifuse.architectures.taff_unet.config import TaffUNetConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "oracle"}, r"setting: expected one of 'baseline', 'ap', .* got 'oracle'"),
        ({"skip": "both"}, "skip: expected one of 'fused', 'original'"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"image_size": 100}, "image_size must be a multiple of 16 .*got 100; use 112"),
        ({"image_size": 16}, "fusion_stage must be one of 0 to 2, .*16 pixels, got 3"),
        ({"fusion_stage": 7}, "fusion_stage must be one of 0 to 6"),
        ({"fusion_stage": 6, "skip": "original"}, "would leave the fused map unused"),
        ({"max_days": 0}, "max_days must be positive and finite, got 0"),
        ({"max_days": float("inf")}, "max_days must be positive and finite, got inf"),
        ({"projection": "grid", "grid_side": 0}, "grid_side must be at least 1, or None, got 0"),
        ({"grid_side": 4}, "grid_side is for projection='grid', got 4 with 'segments'; leave it out"),
        (
            {"setting": "ecg", "projection": "segments"},
            "needs a setting with a prior, such as 'full', got 'ecg'; .*'grid'",
        ),
        (
            {"projection": "spread"},
            "projection: expected one of 'segments', 'segments_full', 'grid', 'broadcast', None",
        ),
        ({"gate": "after"}, "gate: expected one of 'before_norm', 'after_norm'"),
        (
            {"setting": "ecg", "gate_time": "apart"},
            "gate_time='apart' needs a setting with time, such as 'full', got 'ecg'",
        ),
        ({"setting": "ap", "ecg_checkpoint": "x"}, "needs a setting with an ECG, such as 'full', got 'ap'"),
    ],
)
def test_configuration_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        TaffUNetConfig(**changes)
