"""The network saved, copied, and computed in other forms: in float64 by the reference, in half precision."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trifuse.architectures.fias import Fias, fias
from trifuse.architectures.fias.variants import DilateFormerShape
from trifuse.kernels import CheckpointError, backend

THIN = DilateFormerShape(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))


def thin(**overrides) -> Fias:
    return fias(variant=THIN, decoder_heads=(4, 4, 4, 2), num_classes=4, **overrides)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_names_in_the_state_dict_stay():
    """Folders that users have saved load by these names."""
    names = set(thin().state_dict())
    assert {name.partition(".")[0] for name in names} == {
        "adapter", "global_encoder", "local_encoder", "fusions", "decoder"
    }  # fmt: skip
    assert names >= {
        "adapter.conv.weight",
        "global_encoder.patch_embed.proj.0.weight",
        "global_encoder.out_norms.2.bias",
        "global_encoder.norm.weight",
        "local_encoder.stem.conv.weight",
        "local_encoder.stages.3.units.0.project.conv.weight",
        "fusions.0.spatial.bias",
        "decoder.bottleneck.conv.conv.weight",
        "decoder.blocks.0.join.conv.conv.weight",
        "decoder.blocks.1.join.up.norm.running_var",
        "decoder.blocks.3.attn.qkv.bias",
        "decoder.blocks.3.mca.squeeze.weight",
        "decoder.blocks.3.out.conv.weight",
        "decoder.heads.2.bias",
    }


def test_another_network_s_folder_is_refused(tmp_path):
    thin().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"fias"', '"dino_unet"'))
    with pytest.raises(CheckpointError, match="wrong architecture: got 'dino_unet', want 'fias'"):
        Fias.from_pretrained(tmp_path)


def test_where_weights_came_from_is_not_saved(tmp_path):
    model = thin()
    model.config = replace(model.config, encoder_checkpoint="somewhere")
    model.save_pretrained(tmp_path)
    assert Fias.from_pretrained(tmp_path).config.encoder_checkpoint is None


def test_b14_copies_pickles_and_shared_memory():
    model = thin().eval()
    x = image(1, 1, 64, 64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(model.share_memory()(x), expected)


def test_the_reference_form_of_every_operator_gives_the_same():
    """Values and gradients of a training step, in float64, the draws alike."""
    results = []
    for name in ("torch", "reference"):
        model = thin(dropout=0.0, drop_path=0.0).double()
        with backend(name):
            maps = model(image(2, 1, 64, 64).double(), torch.Generator().manual_seed(0))
            sum(logits.square().sum() for logits in maps).backward()
        results.append([*maps, *(parameter.grad for parameter in model.parameters())])
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-9, rtol=1e-6)


def test_memory_format_of_the_image_changes_nothing():
    model = thin(in_channels=3).eval()
    x = image(2, 3, 64, 64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x.transpose(2, 3)), model(x.transpose(2, 3).contiguous()), atol=1e-5, rtol=1e-4)


def test_half_precision_under_autocast():
    model = thin().eval()
    x = image(1, 1, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)
    with torch.no_grad():
        logits = model(x)
    assert float((rounded.float() - logits).norm() / logits.norm()) < 0.1
