"""What a configuration of DINO-UNet refuses, and what older versions wrote."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_dino_unet import TINY, network

from trifuse.architectures.dino_unet import DinoUNet, DinoUNetConfig
from trifuse.architectures.storage.pretrained import config_from_json, config_to_json
from trifuse.architectures.storage.record import read_record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variant": "huge"},
            r"variant: expected one of 'tiny', 'small', .*, 'dinov3_huge_plus', 'dinov3_7b', got 'huge'",
        ),
        ({"pos_mode": "x"}, "pos_mode: expected one of"),
        ({"encoder_dtype": "int8"}, "encoder_dtype: expected one of"),
        ({"in_channels": 4}, "in_channels: expected one of 1, 3, got 4"),
        ({"size_policy": "crop"}, "size_policy: expected one of 'error', 'pad', 'resize', got 'crop'"),
        ({"order": "x"}, "order: expected one of"),
        ({"bottleneck": "first"}, "bottleneck: expected one of"),
        ({"skip_scale": "x"}, "skip_scale: expected one of"),
        ({"norm": "x"}, "norm: expected one of"),
        ({"final_resize": "x"}, "final_resize: expected one of"),
        ({"stream_gradient": "x"}, "stream_gradient: expected one of"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"bottleneck_dim": 0}, "bottleneck_dim must be at least 1"),
        ({"convs_per_stage": 0}, "convs_per_stage must be at least 1"),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"freeze_selection_epoch": -1}, "freeze_selection_epoch must be at least 0"),
        ({"channels": ()}, "one positive number for each stage"),
        ({"channels": (8, 8, 0, 4)}, "one positive number for each stage"),
        ({"top_k": 7}, "top_k is 7, but the encoder has only 6 blocks"),
        ({"top_k": 3}, r"top_k is 3, but channels \(8, 8, 4, 4\) make 4 stages"),
        ({"blocks": (5, 3, 1)}, "names 3 blocks for 4 stages"),
        ({"blocks": (7, 5, 3, 1)}, r"asks for blocks \[7\] \(0-based\), but there are only 0 to 5"),
        ({"blocks": "random"}, "'last4', or None for a learned selection, got 'random'"),
        ({"blocks": "last4", "index_base": 3}, "index_base must be 0 or 1"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


def test_a_list_of_blocks_is_kept_as_a_tuple():
    config = replace(TINY, blocks=[3, 0, 2, 1])
    assert config.blocks == (3, 0, 2, 1)
    assert hash(config) == hash(replace(TINY, blocks=(3, 0, 2, 1)))


@pytest.mark.parametrize("blocks", [None, "last4", (7, 5, 3, 1)])
def test_blocks_survive_json(blocks):
    config = DinoUNetConfig(blocks=blocks)
    assert config_from_json(DinoUNetConfig, json.loads(json.dumps(config_to_json(config))), "here") == config


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"block_selection": "learned"}, {}),
        ({"block_selection": "last4"}, {"blocks": "last4"}),
        ({"block_selection": "fixed:[7,5,3,1]"}, {"blocks": (7, 5, 3, 1)}),
        ({"block_selection": "fixed:[ 8, 6 ,4,2 ]", "index_base": 1}, {"blocks": (8, 6, 4, 2), "index_base": 1}),
        ({"stream_fusion": True, "stream_gradient": "rerun"}, {"stream_fusion": True, "stream_gradient": "recompute"}),
    ],
)
def test_what_older_versions_wrote_is_understood(written, read):
    assert config_from_json(DinoUNetConfig, written, "here") == DinoUNetConfig(**read)


def test_a_network_saved_by_an_older_version_loads(tmp_path):
    model = network(blocks=(4, 2, 1, 0), stream_fusion=True, stream_gradient="recompute")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = read_record(path)
    assert description["config"].pop("blocks") == [4, 2, 1, 0]
    description["config"] |= {"block_selection": "fixed:[4,2,1,0]", "stream_gradient": "rerun"}
    path.write_text(json.dumps(description))  # without a digest of itself
    assert DinoUNet.from_pretrained(tmp_path).config == model.config
