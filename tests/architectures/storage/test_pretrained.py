"""Networks on disk: what does not fit is said, and a save that is cut short destroys nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trifuse.architectures.storage import pretrained
from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.pretrained import Pretrained, load_strict, write_safetensors
from trifuse.architectures.storage.record import read_record, write_record
from trifuse.kernels import CheckpointError


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# --- load_strict ------------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3))
    network.add_module("norm", nn.BatchNorm2d(4))
    network.add_module("head", nn.Linear(4, 2))
    return network


def test_load_strict_loads():
    source, target = small_network(), small_network()
    load_strict(target, source.state_dict(), Path("x"))
    assert_same(target.state_dict(), source.state_dict())


@given(data=st.data())
def test_c8_missing_and_unexpected_keys_are_listed_with_the_nearest_name(data):
    network = small_network()
    state = dict(network.state_dict())
    names = sorted(state)
    renamed = data.draw(st.sets(st.sampled_from(names), max_size=3))
    deleted = data.draw(st.sets(st.sampled_from(names), min_size=0 if renamed else 1, max_size=2)) - renamed
    for name in renamed:
        state[f"module.{name}"] = state.pop(name)
    for name in deleted:
        del state[name]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_strict(network, {name: tensor + 1 for name, tensor in state.items()}, Path("weights.safetensors"))
    message = str(caught.value)
    assert message.startswith("weights.safetensors does not fit Sequential:")
    assert f"{len(renamed | deleted)} missing:" in message
    assert not renamed or f"{len(renamed)} unexpected:" in message
    for name in renamed | deleted:
        assert name in message
    assert_same(network.state_dict(), before)


def test_c8_nearest_name():
    network = small_network()
    state = dict(network.state_dict())
    state["heads.weight"] = state.pop("head.weight")
    with pytest.raises(CheckpointError, match=r"head.weight  \(nearest: heads.weight\)"):
        load_strict(network, state, Path("x"))


def test_a_long_list_is_cut():
    state = {f"stranger{i}": torch.ones(1) for i in range(25)} | dict(small_network().state_dict())
    with pytest.raises(CheckpointError, match=r"25 unexpected:(\n    stranger\d+){10}\n    and 15 more$"):
        load_strict(small_network(), state, Path("x"))


def test_c9_wrong_shapes_are_shown_with_both_shapes():
    state = dict(small_network().state_dict())
    state["head.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=r"1 of the wrong shape:\n.*head.weight: expected \(2, 4\), got \(3, 4\)"):
        load_strict(small_network(), state, Path("x"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_c11_weights_that_are_not_finite_are_refused_unless_allowed(value):
    network, state = small_network(), dict(small_network().state_dict())
    state["norm.running_var"] = torch.tensor([1, 2, value, 3])
    with pytest.raises(CheckpointError, match=r"1 not finite.*\n    norm.running_var$"):
        load_strict(network, state, Path("x"))
    load_strict(network, state, Path("x"), allow_nonfinite=True)
    torch.testing.assert_close(network.norm.running_var, state["norm.running_var"], equal_nan=True)


def test_c11_a_network_that_has_diverged_is_loaded_where_that_is_allowed(tmp_path):
    net = Net(NetConfig())
    with torch.no_grad():
        net.bias[0] = torch.nan
    net.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 not finite.*\n    bias$"):
        Net.from_pretrained(tmp_path)
    assert Net.from_pretrained(tmp_path, allow_nonfinite=True).bias[0].isnan()


# --- folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetConfig:
    width: int = 4


class Net(Pretrained, nn.Linear):
    architecture: ClassVar[str] = "net"
    config_type: ClassVar[type] = NetConfig

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config.width, 2)
        self.config = config


class OtherNet(Net):
    architecture: ClassVar[str] = "other_net"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    write_record(path, read_record(path) | changes)


@pytest.fixture
def saved(tmp_path) -> tuple[Net, Path]:
    net = Net(NetConfig(width=7))
    net.save_pretrained(tmp_path / "net")
    return net, tmp_path / "net"


def test_save_and_load(saved):
    net, folder = saved
    loaded = Net.from_pretrained(str(folder))
    assert not loaded.training
    assert loaded.config == net.config
    assert_same(loaded.state_dict(), net.state_dict())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    description = read_record(folder / "config.json")
    assert description == {
        "format": "trifuse",
        "schema_version": 1,
        "architecture": "net",
        "config": {"width": 7},
        "sha256": {"model.safetensors": sha256_of(folder / "model.safetensors")},
    }


def test_c10_weights_of_another_type_are_converted_with_a_note_or_refused(saved, capsys):
    net, folder = saved
    Net.from_pretrained(folder, same_types=True)
    assert capsys.readouterr().err == ""
    digest = write_safetensors(folder / "model.safetensors", copy.deepcopy(net).half().state_dict())
    edit_config(folder, sha256={"model.safetensors": digest})
    loaded = Net.from_pretrained(folder)
    weights = folder / "model.safetensors"
    said = capsys.readouterr().err
    assert said == f"note: {weights}: 2 tensors stored as torch.float16, converted to torch.float32\n"
    assert loaded.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.weight, net.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(
        CheckpointError, match=r"2 of another type:\n.*weight: expected torch.float32, got torch.float16"
    ):
        Net.from_pretrained(folder, same_types=True)


def test_c10_a_type_that_was_asked_for_needs_no_note(saved, capsys):
    net, folder = saved
    load_strict(Net(net.config).half(), net.state_dict(), folder)
    assert capsys.readouterr().err == ""


@dataclass(frozen=True)
class ClassesConfig:
    num_classes: int = 2
    width: int = 5


class ClassesNet(Pretrained, nn.Module):
    architecture: ClassVar[str] = "classes"
    config_type: ClassVar[type] = ClassesConfig

    def __init__(self, config: ClassesConfig) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Linear(3, config.width)
        self.head = nn.Linear(config.width, config.num_classes)


def test_c9_weights_for_other_classes_are_refused_and_taken_but_for_the_head(tmp_path):
    two, three = ClassesNet(ClassesConfig()), ClassesNet(ClassesConfig(num_classes=3))
    two.save_pretrained(tmp_path)
    before = copy.deepcopy(three.state_dict())
    with pytest.raises(CheckpointError, match=r"head.weight: expected \(3, 5\), got \(2, 5\)(.|\n)*--reset-head"):
        three.start_from(tmp_path)
    assert_same(three.state_dict(), before)
    three.start_from(tmp_path, reset_head=True)
    assert_same(three.state_dict(), before | {f"body.{name}": value for name, value in two.body.state_dict().items()})


def test_c9_the_head_is_no_remedy_for_another_width(tmp_path):
    ClassesNet(ClassesConfig(width=4)).save_pretrained(tmp_path)
    for reset_head in (False, True):
        with pytest.raises(CheckpointError, match=r"body.weight: expected \(5, 3\), got \(4, 3\)") as caught:
            ClassesNet(ClassesConfig()).start_from(tmp_path, reset_head=reset_head)
        assert "head is for other classes" not in str(caught.value) or not reset_head


def test_the_head_of_the_same_classes_may_be_drawn_anew(tmp_path):
    saved, fresh = ClassesNet(ClassesConfig()), ClassesNet(ClassesConfig())
    saved.save_pretrained(tmp_path)
    head = fresh.head.weight.detach().clone()
    fresh.start_from(tmp_path, reset_head=True)
    assert torch.equal(fresh.head.weight, head)
    assert torch.equal(fresh.body.weight, saved.body.weight)
    fresh.start_from(tmp_path)
    assert_same(fresh.state_dict(), saved.state_dict())


def test_t2_training_starts_from_the_new_weights_of_a_save_that_was_cut_short(tmp_path, monkeypatch):
    old, new, fresh = (ClassesNet(ClassesConfig()) for _ in range(3))
    old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "replace", interrupt)
        with pytest.raises(Interrupted):
            new.save_pretrained(tmp_path)
    fresh.start_from(tmp_path)
    assert_same(fresh.state_dict(), new.state_dict())


def test_c1_missing_parts_of_a_folder(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match=r"nowhere: not found; expected a folder with config.json and model.saf"):
        Net.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "away")
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a safetensors file, found nothing"):
        Net.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        Net.from_pretrained(folder)
    want = r"away: expected a folder with config.json and model.safetensors, got a file; trifuse convert"
    with pytest.raises(CheckpointError, match=want):
        Net.from_pretrained(folder / "away")


def test_c3_weights_of_another_day(saved):
    _, folder = saved
    write_safetensors(folder / "model.safetensors", Net(NetConfig(width=7)).state_dict())
    with pytest.raises(CheckpointError, match="the content has changed"):
        Net.from_pretrained(folder)


def test_c7_wrong_architecture_is_said_before_anything_else(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    edit_config(folder, config={"strange": 1})
    for load in (OtherNet.from_pretrained, OtherNet(NetConfig()).start_from):
        with pytest.raises(CheckpointError, match=r"config.json: wrong architecture: got 'net', want 'other_net'"):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, this trifuse reads up to 1; upgrade trifuse"),
        ({"schema_version": "1"}, "schema_version is '1'"),
        ({"format": "other"}, "written by trifuse"),
        ({"config": {"width": 7, "depth": 1}}, "unknown field 'depth' of NetConfig.*schema version 1: .*newer one"),
        ({"config": {"width": 2**70}}, "field 'width': expected a number that 64 bits hold"),
        ({"config": {"width": 2**62}}, "no network can be built of this: "),
        ({"config": {"width": -3}}, "no network can be built of this: "),
        ({"config": None}, "expected the fields of NetConfig, got None"),
        ({"sha256": {}}, "expected the SHA-256 of model.safetensors, got None"),
        ({"sha256": None}, "expected the SHA-256 of model.safetensors, got None"),
    ],
)
def test_c12_config_file(saved, changes, message):
    _, folder = saved
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config.json.*{message}"):
        Net.from_pretrained(folder)


def test_l3_config_that_is_no_json(saved):
    _, folder = saved
    (folder / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError, match="expected JSON, found an HTML page"):
        Net.from_pretrained(folder)


class Interrupted(BaseException):
    pass


def interrupt(*args, **kwargs):
    raise Interrupted


@pytest.mark.parametrize(
    ("owner", "name", "survivor"),
    [(pretrained, "write_safetensors", "old"), (pretrained, "write_record", "old"), (pretrained, "replace", "new")],
)
def test_t2_a_save_that_is_cut_short_leaves_the_old_network_or_the_new_one(saved, monkeypatch, owner, name, survivor):
    old, folder = saved
    new = Net(NetConfig(width=9))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(Interrupted):
            new.save_pretrained(folder)
    assert_same(Net.from_pretrained(folder).state_dict(), (old if survivor == "old" else new).state_dict())
    newest = Net(NetConfig(width=3))
    newest.save_pretrained(folder)
    assert_same(Net.from_pretrained(folder).state_dict(), newest.state_dict())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
