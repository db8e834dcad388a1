"""Images of every size: padded and cropped, or refused with the size that would do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trifuse.architectures.fias import fias
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.kernels import ShapeError

THIN = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))
MODEL = fias(variant=THIN, decoder_heads=(4, 4, 4, 2), num_classes=2, pad=True).eval()


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 2))
@torch.no_grad()
def test_every_size_comes_back_or_is_refused(height, width, batch):
    """A side is continued by at most itself less one pixel: 17 pixels are enough, 16 are not."""
    image = torch.randn(batch, 1, height, width)
    if min(height, width) > 16:
        logits, maps = MODEL(image, return_all=True)
        assert logits.shape == (batch, 2, height, width)
        assert bool(logits.isfinite().all())
        assert [x.shape for x in maps] == [logits.shape] * 3
    else:
        with pytest.raises(ShapeError, match=r"too small to be continued .* resize it to at least 17 x 17"):
            MODEL(image)
