"""Checkpoints as frameworks save them: the tensors nested, or a word before each of their names."""

from __future__ import annotations

import pytest
import torch
from dinov2_layouts import random_state

from trifuse.architectures.dino_unet.convert import read_dinov2
from trifuse.architectures.fias.convert import read_dilateformer
from trifuse.architectures.fias.dilateformer import DilateFormer
from trifuse.architectures.plain_unet import PlainUNet, PlainUNetConfig
from trifuse.architectures.plain_unet.convert import read_nnunet
from trifuse.architectures.storage import pretrained
from trifuse.architectures.storage.pretrained import write_network
from trifuse.architectures.storage.published_weights import read_tensors
from trifuse.kernels import CheckpointError

PREFIXES = [
    "module.",
    "model.",
    "net.",
    "network.",
    "_orig_mod.",
    "model.module._orig_mod.",
    "state_dict.net.",
    "backbone.",
]
SAVED = {
    "Lightning": lambda state: {"epoch": 3, "state_dict": state, "loops": {}, "hyper_parameters": {"lr": 0.1}},
    "timm": lambda state: {"arch": "vit", "epoch": 3, "state_dict": state, "state_dict_ema": state},
    "a loop of one's own": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.1},
    "DeepSpeed": lambda state: {"module": state, "global_steps": 3},
    "a trainer's folder": lambda state: {"net": {"state_dict": state}},
}


def saved(state, path, prefix="", wrap=dict):
    torch.save(wrap({f"{prefix}{name}": tensor for name, tensor in state.items()}), path)
    return path


def assert_same(state, expected):
    assert set(state) == set(expected)
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


@pytest.fixture(scope="module")
def networks():
    """A state dict and its reader, for each kind of published weights."""
    torch.manual_seed(0)
    unet = PlainUNet(PlainUNetConfig(image_size=16, base_dim=4)).state_dict()
    return {
        "dinov2": (random_state(), read_dinov2),
        "dilateformer": (DilateFormer("nano", out_norm=False).state_dict(), read_dilateformer),
        "nnunet": (unet, read_nnunet),
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["dinov2", "dilateformer", "nnunet"])
def test_c21_words_before_names(networks, kind, prefix, tmp_path):
    state, read = networks[kind]
    found, report = read(saved(state, tmp_path / "a.ckpt", prefix))
    assert_same(found, state)
    assert f"tensors mapped, {prefix} left out before their names" in str(report)
    assert "left out" not in str(read(saved(state, tmp_path / "b.ckpt"))[1])


@pytest.mark.parametrize("wrap", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("prefix", ["", "model.", "net."])
def test_c21_tensors_beside_what_else_is_saved(networks, wrap, prefix, tmp_path):
    state, read = networks["dinov2"]
    assert_same(read(saved(state, tmp_path / "a.ckpt", prefix, wrap))[0], state)


def test_c8_another_word_before_names_is_none_to_leave_out(networks, tmp_path):
    for kind in ("dinov2", "nnunet"):
        state, read = networks[kind]
        with pytest.raises(CheckpointError):
            read(saved(state, tmp_path / "a.ckpt", "discriminator."))


@pytest.mark.parametrize("kind", ["dinov2", "dilateformer", "nnunet"])
def test_c8_missing_and_unexpected_names_are_grouped_with_the_nearest(networks, kind, tmp_path):
    state, read = networks[kind]
    name = next(name for name in reversed(state) if name.endswith(".weight"))
    changed = {each: tensor for each, tensor in state.items() if each != name} | {f"{name}s": state[name]}
    with pytest.raises(CheckpointError) as refused:
        read(saved(changed, tmp_path / "a.ckpt"))
    assert f"\n  1 missing: {name}  (nearest: {name}s)\n  1 unexpected: {name}s" in str(refused.value)


def test_c8_one_network_under_two_words(networks, tmp_path):
    state, read = networks["dinov2"]
    changed = {f"net.{name}": tensor + 1 for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match="a second time"):
        read(saved(state | changed, tmp_path / "a.ckpt"))


def test_t2_a_conversion_that_was_cut_short_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    old, new = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    write_network(tmp_path, old, "unet", PlainUNetConfig())
    assert_same(read_tensors(tmp_path, "unet"), old)

    def killed(pending, weights):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_network(tmp_path, new, "unet", PlainUNetConfig())
    assert_same(read_tensors(tmp_path, "unet"), new)


def test_c21_names_of_many_wrappers_are_read_in_time(networks, tmp_path):
    with pytest.raises(CheckpointError, match="unexpected"):
        read_dinov2(saved({**networks["dinov2"][0], "module." * 3000 + "x": torch.ones(1)}, tmp_path / "a.ckpt"))
