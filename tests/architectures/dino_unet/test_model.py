"""DINO-UNet as a whole: what its options do, gradients, number of parameters, epochs, copies, files."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from small_dino_unet import DEAD, SHAPE, backward, double, images, network, spread_logits
from torch import nn

from trifuse.architectures import dino_unet
from trifuse.architectures.dino_unet import DinoUNet, DinoV2Encoder
from trifuse.architectures.storage.pretrained import write_safetensors
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.benchmarks.reporting.network_calls import Recorder
from trifuse.blocks import block_selection
from trifuse.kernels import CheckpointError, backend

# --- the definition ---------------------------------------------------------------------------------------------------


def test_forward_is_the_figure():
    """Weighing, selection, scaling and order into the stages, written out; the decoder has its own test."""
    model, image = double(), images(2, 3, 42, 28, dtype=torch.float64)
    spread_logits(model)
    features = model.encoder(image)["features"]
    w = torch.softmax(model.fusion.logits, 0)
    selected = sorted(torch.topk(w, 4).indices.tolist(), reverse=True)
    fused = sum(w[i] * features[i] for i in range(SHAPE.depth)) @ model.decoder.proj_fused.weight.T
    scales = [4 * w[i] / sum(w[j] for j in selected) for i in selected]
    expected = model.decoder(features[-1], fused, [features[i] for i in selected], scales, (3, 2), image)
    torch.testing.assert_close(model(image), expected)
    assert expected.shape == (2, 2, 42, 28)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"order": "weight"}, {"bottleneck": "fused"}, {"bottleneck": "last"}], ids=str)
def test_a_selection_that_cannot_be_read_changes_nothing(options, name, monkeypatch):
    """As on a GPU, where the fusion's kernel finds out which maps are selected."""
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU machine nothing is interpreted")
    model, image = network(norm="group", **options), images(2, 3, 28, 42)
    spread_logits(model)
    read = backward(model, image)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    monkeypatch.setattr(block_selection, "values_at_hand", lambda tensors: False)
    with backend(name, strict=False):
        torch.testing.assert_close(backward(model, image), read, atol=1e-5, rtol=1e-4)
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, gradients[key], atol=1e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_maps_are_selected_by_their_fusion():
    """On the meta device, as on a GPU."""
    with torch.device("meta"), Recorder() as recorder:
        network()(torch.empty(2, 3, 28, 28))
    operators = [call.operator for call in recorder.calls.elements() if "fusion" in call.operator]
    assert operators == ["weighted_block_fusion_selecting"]
    assert "aten::index_copy_" not in recorder.nbytes


@pytest.mark.parametrize(
    ("selection", "stages"),
    [("last4", [5, 4, 3, 2]), ((4, 2, 1, 0), [4, 2, 1, 0]), ((0, 1, 2, 4), [0, 1, 2, 4])],
)
@pytest.mark.parametrize("stream", [False, True])
def test_fixed_blocks_reach_the_stages_in_the_order_listed(selection, stages, stream):
    model, image = double(blocks=selection, stream_fusion=stream), images(2, 3, 28, 28, dtype=torch.float64)
    features = model.encoder(image)["features"]
    expected = model.decoder(features[-1], None, [features[i] for i in stages], None, (2, 2), image)
    torch.testing.assert_close(model(image), expected)


def test_7531_is_not_reversed():
    model = network(variant=replace(SHAPE, depth=12), blocks=(7, 5, 3, 1))
    seen = []
    for skip in model.decoder.skips:
        skip.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    image = images(1, 3, 28, 28)
    model.eval()(image)
    features = model.encoder(image)["features"]
    assert all(torch.equal(tokens, features[i]) for tokens, i in zip(seen, [7, 5, 3, 1], strict=True))
    assert network(variant=replace(SHAPE, depth=12), blocks=(8, 6, 4, 2), index_base=1).fusion.selected == (
        7,
        5,
        3,
        1,
    )


def test_fixed_modes_have_no_logits_and_no_fused_map():
    model = network(blocks="last4", bottleneck="fused", skip_scale="raw")
    names = dict(model.named_parameters())
    assert not any("logits" in name or "proj_fused" in name for name in names)
    assert "decoder.proj_last.weight" in names


def test_skip_scale_raw_and_none():
    image = images(2, 3, 28, 28, dtype=torch.float64)
    results = []
    for kind in ("renorm", "raw", "none"):
        model = double(skip_scale=kind)
        spread_logits(model)
        seen = []
        model.decoder.register_forward_pre_hook(lambda module, arguments, seen=seen: seen.append(arguments[3]))
        model(image)
        results.append((seen[0], model.fusion.weights[list(model.fusion.selected)]))
    (renorm, weights), (raw, _), (none, _) = results
    torch.testing.assert_close(renorm, 4 * weights / weights.sum())
    assert renorm.mean().item() == pytest.approx(1)
    torch.testing.assert_close(raw, weights)
    assert none is None


def test_options_reach_the_parts_that_they_are_for():
    encoder = network(pos_mode="size", norm_blocks=False, num_registers=2, encoder_dtype="bfloat16").encoder
    assert (encoder.pos_mode, encoder.norm_blocks, encoder.num_registers) == ("size", False, 2)
    assert encoder.cls_token.dtype == torch.bfloat16
    decoder = network(norm="group", final_resize="features", convs_per_stage=2, conv_then_resize=True).decoder
    assert all(image.conv_then_resize for image in decoder.images)
    assert [len(stage.convs) for stage in decoder.stages] == [2] * 4
    assert decoder.resize_features
    assert not any(isinstance(module, nn.BatchNorm2d) for module in decoder.modules())
    assert network(order="weight").fusion.order == "weight"


def test_the_encoder_starts_from_a_checkpoint(tmp_path):
    source = DinoV2Encoder("tiny", generator=torch.Generator().manual_seed(1))
    write_safetensors(tmp_path / "dinov2.safetensors", source.state_dict())
    model = dino_unet.dino_unet_tiny(encoder_checkpoint=str(tmp_path / "dinov2.safetensors"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name


# --- gradients --------------------------------------------------------------------------------------------------------

LEGAL = [
    {"bottleneck": bottleneck, "skip_scale": scale, "norm": norm}
    for bottleneck, scale, norm in itertools.product(
        ["last+fused", "last", "fused"], ["renorm", "raw", "none"], ["batch", "instance", "group"]
    )
    if (bottleneck, scale) != ("last", "none")
]


@pytest.mark.parametrize("options", LEGAL, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("stream", ["stored", "project", "recompute"])
def test_gradient_reaches_the_block_weights_in_every_legal_combination(options, stream):
    streaming = {} if stream == "stored" else {"stream_fusion": True, "stream_gradient": stream}
    model = double(**options, **streaming)
    spread_logits(model)
    backward(model, images(2, 3, 42, 28, dtype=torch.float64))
    grad = model.fusion.logits.grad
    assert grad.abs().max() > 1e-6
    assert grad.sum().abs() < 1e-12 * max(1, grad.abs().max())


def test_scaled_skips_train_the_block_weights_as_finite_differences_say():
    """The scale comes after the skip's norm: before it, batch normalisation would cancel it."""
    model, image = double(bottleneck="last"), images(2, 3, 28, 28, dtype=torch.float64)
    spread_logits(model)
    target = images(2, 2, 28, 28, seed=1, dtype=torch.float64)
    (model(image) * target).sum().backward()
    grad, step = model.fusion.logits.grad.clone(), 1e-6
    assert grad.abs().max() > 1e-2 * model.decoder.stages[0].convs[0].norm.bias.grad.abs().max()
    with torch.no_grad():
        for i in range(SHAPE.depth):
            values = []
            for sign in (1, -1):
                model.fusion.logits[i] += sign * step
                values.append((model(image) * target).sum())
                model.fusion.logits[i] -= sign * step
            assert (values[0] - values[1]).item() / (2 * step) == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-6)


def test_dead_combination_is_refused():
    with pytest.raises(ValueError, match="would leave the learned block weights without any gradient"):
        network(**DEAD)
    network(**DEAD, blocks="last4")


def test_a_step_leaves_the_encoder_alone_and_moves_the_rest():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    backward(model, images(2, 3, 28, 28))
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, tensor in model.state_dict().items():
        unchanged = name.startswith("encoder.") or name == "fusion.frozen_selection"
        assert torch.equal(tensor, before[name]) == unchanged, name


def test_b12_train_leaves_the_encoder_in_eval():
    model = network().train()
    assert model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


# --- counts -----------------------------------------------------------------------------------------------------------

COUNTS = {
    "small": (22_056_576, 3_182_606, 2_385_326, 3_084_290, 2_287_010),
    "base": (86_580_480, 3_563_534, 2_766_254, 3_366_914, 2_569_634),
    "large": (304_368_640, 3_817_498, 3_020_218, 3_555_330, 2_758_050),
    "giant": (1_136_480_768, 4_325_418, 3_528_138, 3_932_162, 3_134_882),
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    encoder, *decoders = COUNTS[variant]
    build = getattr(dino_unet, f"dino_unet_{variant}")
    for selection, integration in itertools.product([None, "last4"], [True, False]):
        with torch.device("meta"):
            model = build(blocks=selection, spatial_integration=integration)
        assert sum(p.numel() for p in model.encoder.parameters()) == encoder
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == decoders.pop(0)


def test_tiny_is_small_and_takes_overrides():
    model = dino_unet.dino_unet_tiny(num_classes=3)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model(images(1, 3, 28, 28)).shape == (1, 3, 28, 28)


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_the_selection_freezes_when_its_epoch_begins():
    model = network(freeze_selection_epoch=2)
    for epoch in range(4):
        spread_logits(model, seed=epoch)
        free = model.fusion.selected
        model.start_epoch(epoch)
        assert (model.fusion.frozen_selection[0] >= 0) == (epoch >= 2)
        if epoch == 2:
            frozen = free
        assert epoch < 2 or model.fusion.selected == frozen
    assert model(images(1, 3, 28, 28)).isfinite().all()


def test_a_resumed_epoch_does_not_freeze_anew():
    model = network(freeze_selection_epoch=1)
    model.start_epoch(1)
    resumed = network(freeze_selection_epoch=1)
    resumed.load_state_dict(model.state_dict())
    spread_logits(resumed, seed=7)
    free = network()
    spread_logits(free, seed=7)
    resumed.start_epoch(1)
    assert resumed.fusion.selected == model.fusion.selected != free.fusion.selected


def test_without_the_option_the_selection_never_freezes():
    model = network()
    model.start_epoch(0)
    assert (model.fusion.frozen_selection == -1).all()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_whatever_came_before():
    torch.manual_seed(1)
    first = network(init_seed=3).state_dict()
    torch.manual_seed(2)
    second, other = network(init_seed=3).state_dict(), network(init_seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("encoder.blocks.0.attn.qkv.weight", "fusion.logits", "decoder.head.weight"):
        assert not torch.equal(first[name], other[name])


def test_save_and_load(tmp_path):
    model = network(norm="group", channels=(8, 4, 4, 2), encoder_dtype="bfloat16", init_seed=5)
    spread_logits(model)
    model.save_pretrained(tmp_path)
    loaded = DinoUNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    image = images(1, 3, 28, 28)
    assert torch.equal(loaded.eval()(image), model.eval()(image))
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any(name.startswith("encoder.") for name in trained)


def test_where_the_encoder_came_from_is_not_saved(tmp_path):
    model = network()
    model.config = replace(model.config, encoder_checkpoint="/a/folder/that/is/not/there")
    model.save_pretrained(tmp_path)
    assert "folder" not in (tmp_path / "config.json").read_text()
    DinoUNet.from_pretrained(tmp_path)


def test_c9_other_classes_are_shown_with_both_shapes(tmp_path):
    network(num_classes=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = read_record(path)
    description["config"]["num_classes"] = 2
    write_record(path, description)
    with pytest.raises(CheckpointError, match=r"decoder.head.weight: expected \(2, 4, 3, 3\), got \(3, 4, 3, 3\)"):
        DinoUNet.from_pretrained(tmp_path)


def test_b13_state_dict_is_the_same_stored_and_streaming():
    stored, streaming = network(init_seed=1), network(init_seed=2, stream_fusion=True)
    streaming.load_state_dict(stored.state_dict(), strict=True)
    stored.load_state_dict(streaming.state_dict(), strict=True)
    image = images(2, 3, 28, 28)
    torch.testing.assert_close(stored(image), streaming(image))


def test_b14_copies_pickles_shared_memory_and_hooks():
    model, image = network().eval(), images(1, 3, 28, 28)
    expected = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).share_memory()):
        assert torch.equal(twin(image), expected)
        assert not any(parameter.requires_grad for parameter in twin.encoder.parameters())
    seen = []
    model.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    model(image)
    assert seen == [(1, 2, 28, 28)]
