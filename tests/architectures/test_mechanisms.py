"""The tables of mechanisms: each switch of each network does what it says, and leaves the network as it was."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_networks import NETWORKS, dino, fias, taff

from trifuse.architectures.dino_unet.mechanisms import other_blocks
from trifuse.architectures.evaluation.mechanisms import together
from trifuse.architectures.plain_unet.model import PlainUNet, PlainUNetConfig
from trifuse.architectures.runs.registry import experiments

KINDS = {name: tiny for name, tiny in NETWORKS.items() if name != "ecg_autoencoder"}
every_network = pytest.mark.parametrize("name", KINDS)


def table_of(model):
    (known,) = (one for one in experiments() if one.name == model.architecture)
    return known.load(known.mechanisms)(model)


def made(name):
    """Return a network whose parts that start as zero were given values, with a batch."""
    torch.manual_seed(0)
    model = KINDS[name].make().eval()
    batch = KINDS[name].batch(3)
    batch["image"] *= 5
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, {key: value for key, value in batch.items() if key != "target"}


@torch.no_grad()
def predict(model, batch):
    return model(**batch)


def means_of(model, mechanism, batch):
    """Return the means of what a mechanism watches, over the batch."""
    seen = {watch.name: [] for watch in mechanism.watches}
    with together(watch.record(model, seen[watch.name].append) for watch in mechanism.watches):
        predict(model, batch)
    return {name: torch.cat(values).mean(0) for name, values in seen.items()}


@every_network
def test_names_tell_mechanisms_apart_and_say_what_is_done(name):
    model, _ = made(name)
    table = table_of(model)
    assert len({each.name for each in table}) == len(table) >= 4
    assert all(each.change for each in table)


@every_network
def test_each_switch_changes_the_logits_and_leaves_the_network_as_it_was(name):
    model, batch = made(name)
    before = predict(model, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    switches = [each for each in table_of(model) if each.switch is not None]
    assert switches or not getattr(model.config, "takes_ecg", True)
    for each in switches:
        means = means_of(model, each, batch)
        with each.switch(model, means):
            inside = predict(model, batch)
        assert torch.isfinite(inside).all(), each.name
        assert not torch.equal(inside, before), each.name
        assert torch.equal(predict(model, batch), before), each.name
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), each.name
        assert not any(module.training for module in model.modules()), each.name
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), each.name


# ---------------------------------------------------------------------------------------------------- plain U-Net


def row(model, name):
    (found,) = (each for each in table_of(model) if each.name == name)
    return found


def with_switch(model, batch, name, means=None):
    each = row(model, name)
    with each.switch(model, means_of(model, each, batch) if means is None else means):
        return predict(model, batch)


def test_plain_unet_without_skips_and_depth_sees_nothing():
    """At the finest stage the decoder has the skip and what lies below, and nothing else."""
    model, batch = made("plain_unet")
    other = {"image": batch["image"].flip(0) * 2}
    both = ("skip at 1/1", "all below 1/1")
    with together(row(model, each).switch(model, {}) for each in both):
        assert torch.equal(predict(model, batch), predict(model, other))
    for each in both:
        assert not torch.equal(with_switch(model, batch, each), with_switch(model, other, each))


def test_plain_unet_without_what_is_below_has_no_deeper_skip():
    model = PlainUNet(PlainUNetConfig(1, 3, image_size=32, base_dim=2)).eval()
    batch = {"image": torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))}
    below = with_switch(model, batch, "all below 1/2")
    with together(row(model, each).switch(model, {}) for each in ("all below 1/2", "skip at 1/4")):
        assert torch.equal(predict(model, batch), below)


# ------------------------------------------------------------------------------------------------------ DINO-UNet


@pytest.mark.parametrize("name", ["dino_unet", "dino_unet streaming", "dino_unet streaming skips alone"])
def test_dino_unet_with_uniform_weights_keeps_its_blocks(name):
    model, _ = made(name)
    chosen = model.fusion.selected
    each = row(model, "learned weights of blocks")
    away = (model.fusion.weights.detach() * 3 - 1).abs().max()
    assert f"within {float(away):.1%} of uniform".replace("%", " %") in each.change
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    chosen = model.fusion.selected
    assert chosen == (2, 1)
    with each.switch(model, {}):
        torch.testing.assert_close(model.fusion.weights, torch.full((3,), 1 / 3))
        assert model.fusion.selected == chosen
    assert model.fusion.frozen_selection.tolist() == [-1, -1]


def test_dino_unet_takes_the_blocks_that_were_not_selected():
    model, _ = made("dino_unet")
    with torch.no_grad():
        model.fusion.logits.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert other_blocks(model).tolist() == [1, 0]  # deepest first; block 1 is the lighter of the selected ones
    each = row(model, "selection of blocks")
    assert "blocks 1, 0 in place of 2, 1" in each.change
    with each.switch(model, {}):
        assert model.fusion.selected == (1, 0)
    assert model.fusion.selected == (2, 1)


def test_dino_unet_says_what_it_does_not_select():
    fixed, all_of_them = dino(blocks=(2, 0)).make(), dino(top_k=3, channels=(8, 4, 4)).make()
    assert row(fixed, "selection of blocks").unmeasured == "the blocks are fixed, none is selected"
    assert row(fixed, "learned weights of blocks").unmeasured
    assert row(all_of_them, "selection of blocks").unmeasured.startswith("all 3 blocks are selected")
    blind = dino(spatial_integration=False, bottleneck="last").make()
    assert "does not see the image" in row(blind, "image branch").unmeasured
    assert "does without it" in row(blind, "fused map").unmeasured


def test_dino_unet_has_a_row_for_each_skip():
    model, batch = made("dino_unet")
    names = [each.name for each in table_of(model) if each.name.startswith("skip")]
    assert names == ["skip of stage 1", "skip of stage 2"]
    with row(model, names[1]).switch(model, {}):
        kept = []
        handle = model.decoder.skips[1].register_forward_hook(lambda module, given, result: kept.append(result))
        predict(model, batch)
        handle.remove()
    assert not kept[0].any()


# ----------------------------------------------------------------------------------------------------------- FIAS


def test_fias_weights_of_fusion_are_what_the_row_says():
    model, batch = made("fias")
    for which, method in (("channel", "channel_logits"), ("position", "spatial_logits")):
        maps = model.global_encoder(model.adapter(batch["image"]))
        fusion = model.fusions[1]
        own = torch.sigmoid(getattr(fusion, method)(maps[1], maps[1] * 2))
        with row(model, f"{which} weights of fusion at 1/2").switch(model, {}):
            weights = torch.sigmoid(getattr(fusion, method)(maps[1], maps[1] * 2))
        assert torch.equal(weights, torch.full_like(own, 0.5))
        fixed = row(model, f"{which} weights of fusion fixed")
        means = means_of(model, fixed, batch)
        assert len(means) == 4
        with fixed.switch(model, means):
            weights = torch.sigmoid(getattr(fusion, method)(maps[1], maps[1] * 2))
        mean = means[f"CAF's {which} weights at 1/8"]
        torch.testing.assert_close(weights, mean.expand_as(weights), atol=1e-5, rtol=1e-5)


def test_fias_fixed_weights_do_not_look_at_the_image():
    """With both weights held at what one image has, that image's logits stay, and another's weights are its."""
    model, batch = made("fias")
    one = {"image": batch["image"][:1]}
    rows = [row(model, f"{which} weights of fusion fixed") for which in ("channel", "position")]
    means = {name: value for each in rows for name, value in means_of(model, each, one).items()}
    with together(each.switch(model, means) for each in rows):
        torch.testing.assert_close(predict(model, one), predict(made("fias")[0], one), atol=2e-3, rtol=1e-3)


def test_fias_heads_and_dilations_and_kernels_have_a_row_each():
    model, batch = made("fias")
    names = [each.name for each in table_of(model)]
    assert [each for each in names if each.startswith("heads of")] == [f"heads of dilation {d}" for d in (1, 2, 3)]
    assert [each for each in names if each.startswith("depthwise")] == [f"depthwise kernel {k}x{k}" for k in (5, 7)]
    assert [each for each in names if each.endswith("alone")] == [
        f"heads {sizes} alone" for sizes in ("1/16", "1/8", "1/4", "1/16 + 1/8", "1/16 + 1/4", "1/8 + 1/4")
    ]
    assert len([each for each in names if each.startswith("encoder block")]) == 4
    assert "Monte Carlo attention of decoder block 4" in names
    _, maps = model(batch["image"], return_all=True)
    alone = with_switch(model, batch, "heads 1/16 + 1/4 alone")
    torch.testing.assert_close(alone, (maps[0] + maps[2]).detach())


def test_fias_equal_dilations_and_kernels_are_one_mechanism():
    model = fias(dilations=(2, 1, 2), dmk_kernels=(3, 3)).make().eval()
    names = [each.name for each in table_of(model)]
    assert [each for each in names if each.startswith("heads of")] == ["heads of dilation 2", "heads of dilation 1"]
    assert names.count("depthwise kernel 3x3") == 1
    seen = []
    with row(model, "heads of dilation 2").switch(model, {}), row(model, "depthwise kernel 3x3").switch(model, {}):
        kernels = [conv for stage in model.local_encoder.stages for conv in stage.units[0].depthwise.convs]
        assert not any(conv.weight.any() for conv in kernels)
        attention = model.global_encoder.stages[0].blocks[0].attn
        handle = attention.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        predict(model, {"image": torch.randn(1, 1, 32, 32)})
        handle.remove()
    assert [not group.any() for group in seen[0].chunk(3, dim=-1)] == [True, False, True]


def test_fias_heads_of_a_dilation_are_the_only_ones_that_are_silent():
    model, batch = made("fias")
    attention = model.global_encoder.stages[0].blocks[0].attn
    seen = []
    with row(model, "heads of dilation 2").switch(model, {}):
        handle = attention.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        predict(model, batch)
        handle.remove()
    silent = [not group.any() for group in seen[0].chunk(3, dim=-1)]
    assert silent == [False, True, False]


def test_fias_draws_the_same_each_time_and_leaves_the_generator_alone():
    model, batch = made("fias")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = (with_switch(model, batch, "Monte Carlo draw") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fias_says_what_it_lacks():
    bare = fias(no_dmk="bypass", mixatt=False).make()
    reasons = {each.name: each.unmeasured for each in table_of(bare)}
    for name in ("convolutional encoder", "depthwise kernel 5x5", "channel weights of fusion fixed"):
        assert "no_dmk" in reasons[name]
    for name in ("self-attention", "Monte Carlo attention", "Monte Carlo draw"):
        assert "mixatt=False" in reasons[name]


# ------------------------------------------------------------------------------------------------------ TAFF-UNet


def gate_of(model, batch, name):
    each = row(model, name)
    with each.switch(model, means_of(model, each, batch)), torch.no_grad():
        return model.run(**batch).gate


def test_taff_unet_weighs_as_the_row_says_and_leaves_out_those_without_an_ecg():
    model, batch = made("taff_unet full, some without an ECG")
    with torch.no_grad():
        own = model.run(**batch).gate
    assert not own[1].any()  # the second has no ECG
    assert gate_of(model, batch, "gate at 1/2").tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]
    mean = own[[0, 2]].mean(0)
    torch.testing.assert_close(gate_of(model, batch, "gate fixed"), torch.stack([mean, 0 * mean, mean]))


def test_taff_unet_without_time_does_not_hear_the_days():
    model, batch = made("taff_unet full")
    later = {**batch, "interval": batch["interval"] + 40}
    assert not torch.equal(predict(model, batch), predict(model, later))
    assert torch.equal(with_switch(model, batch, "time"), with_switch(model, later, "time"))


@pytest.mark.parametrize("setting", ["baseline", "ap", "ecg", "ecg_ap", "ecg_time", "full"])
def test_taff_unet_says_what_its_setting_lacks(setting):
    config = (model := taff(setting).make()).config
    lacking = {each.name for each in table_of(model) if each.unmeasured}
    for taken, names in (
        (config.takes_prior, {"prior", "prior of another case"}),
        (config.takes_ecg, {"ECG", "ECG of another case", "gate at 1/2", "gate fixed"}),
        (config.takes_time, {"time", "interval of another case"}),
    ):
        assert (names <= lacking) is (not taken)
        assert taken is not bool(names & lacking)
    assert all(first.unmeasured == second.unmeasured for first, second in pairwise(
        each for each in table_of(model) if each.unmeasured))  # fmt: skip
