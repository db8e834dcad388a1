"""What the tests of DINO-UNet share."""

from __future__ import annotations

import pytest

from trifuse.architectures.dino_unet.variants import VARIANTS


@pytest.fixture
def tiny_swiglu(monkeypatch):
    """A variant with giant's feed-forward that is small enough to be written and read in a moment."""
    monkeypatch.setitem(
        VARIANTS, "tiny_swiglu", type(VARIANTS["tiny"])(embed_dim=16, depth=2, num_heads=2, ffn="swiglu", native_grid=3)
    )
