"""DINOv2 as timm has it: other names, and sums in place of two tensors; the encoder computes the same."""

from __future__ import annotations

import pytest
import torch
from dinov2_layouts import random_state

from trifuse.architectures.dino_unet.convert import read_dinov2
from trifuse.architectures.dino_unet.encoder import DinoV2Encoder

pytestmark = pytest.mark.usefixtures("tiny_swiglu")


def as_timm_has_it(state):
    """timm's names of DINOv2, and what it adds up where there are registers."""
    renamed = {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): part for name, part in state.items()}
    renamed.pop("mask_token")
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


@pytest.mark.parametrize(("variant", "registers"), [("tiny", 0), ("tiny", 4), ("tiny_swiglu", 0), ("tiny_swiglu", 4)])
def test_c21_dinov2_as_timm_has_it(variant, registers, tmp_path):
    state = random_state(variant, registers)
    torch.save(as_timm_has_it(state), tmp_path / "timm.pth")
    found, report = read_dinov2(tmp_path / "timm.pth")
    assert (report.config.variant, report.config.num_registers) == (variant, registers)
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    maps = []
    for weights in (state, found):
        encoder = DinoV2Encoder(variant, report.config.pos_mode, num_registers=registers).eval()
        encoder.load_state_dict(weights)
        maps.append(torch.stack(encoder(image)["features"]))
    torch.testing.assert_close(*maps, rtol=1e-5, atol=1e-5)
