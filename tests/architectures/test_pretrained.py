"""Weights and configurations on disk: written whole, read with suspicion."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trifuse.architectures import pretrained
from trifuse.architectures.files import sha256_of
from trifuse.architectures.pretrained import (
    Pretrained,
    config_from_json,
    config_to_json,
    load_strict,
    read_safetensors,
    write_safetensors,
)
from trifuse.kernels import CheckpointError

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "strided": torch.arange(20)[::3],
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- round trips ------------------------------------------------------------------------------------------------------


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_round_trip(tmp_path):
    digest = write_safetensors(tmp_path / "x", TENSORS, {"note": "ä"})
    assert digest == sha256_of(tmp_path / "x")
    assert_same(read_safetensors(tmp_path / "x", digest), TENSORS)


def test_the_library_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"note": "ä"})
    assert_same(safetensors.torch.load_file(tmp_path / "x"), TENSORS)
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"note": "ä"}


def test_we_read_what_the_library_writes(tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "x", {"note": "ä"})
    assert_same(read_safetensors(tmp_path / "x"), contiguous)


def test_c17_tensors_that_are_one_are_stored_once_and_come_back_as_one(tmp_path):
    shared = torch.randn(1000)
    write_safetensors(tmp_path / "x", {"a": shared, "b": shared, "part": shared[:10]})
    assert (tmp_path / "x").stat().st_size < 4 * 1010 + 600
    got = read_safetensors(tmp_path / "x")
    assert got["a"] is got["b"]
    assert torch.equal(got["part"], shared[:10])


def test_an_unknown_type_is_refused_and_the_old_file_kept(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"'b' is torch\.complex64"):
        write_safetensors(tmp_path / "x", {"b": torch.ones(2, dtype=torch.complex64)})
    assert_same(read_safetensors(tmp_path / "x"), {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def test_c1_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*expected a safetensors file, found nothing"):
        read_safetensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found a folder"):
        read_safetensors(tmp_path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x"
    write_safetensors(path, TENSORS, {"note": "x"})
    return path.read_bytes()


@given(data=st.data())
def test_c2_truncated_at_any_byte(whole_file, tmp_path_factory, data):
    cut = data.draw(st.sampled_from([0, 4, 7, 8, 9, 100, len(whole_file) - 1]) | st.integers(0, len(whole_file) - 1))
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(whole_file[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_safetensors(path)


@given(data=st.data())
def test_c3_flipped_bit_is_found_by_the_digest(whole_file, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(whole_file)
    digest = sha256_of(path)
    position, bit = data.draw(st.integers(0, len(whole_file) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole_file)
    flipped[position] ^= 1 << bit
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_safetensors(path, digest)


@given(noise=st.binary(min_size=1, max_size=8), data=st.data())
def test_a_damaged_header_never_raises_anything_else(whole_file, tmp_path_factory, noise, data):
    """Without a digest some damage cannot be seen; whatever is seen is a CheckpointError."""
    end = 8 + struct.unpack("<Q", whole_file[:8])[0]
    at = data.draw(st.integers(0, end - len(noise)))
    path = tmp_path_factory.mktemp("noise") / "x"
    path.write_bytes(whole_file[:at] + noise + whole_file[at + len(noise) :])
    with contextlib.suppress(CheckpointError):
        read_safetensors(path)


def test_c3_message_names_both_digests(tmp_path):
    digest = write_safetensors(tmp_path / "x", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"expected SHA-256 {'0' * 64}, got {digest}"):
        read_safetensors(tmp_path / "x", "0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 2**62) + b"{}" * 100, "4611686018427387904 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>log in</html>", "HTML page"),
        (b"PK\x03\x04" + b"\0" * 100, "a zip file.*trifuse convert"),
        (b"just words, nothing else", "a text file"),
        (b"", "an empty file"),
        (struct.pack("<Q", 1) + b"{", "unknown binary file"),
    ],
)
def test_c4_what_it_really_is(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model.safetensors.*{message}"):
        read_safetensors(path)


def test_c5_too_many_tensors(tmp_path):
    header = {f"t{i}": entry([0], 0, 0) for i in range(200_000)}
    with pytest.raises(CheckpointError, match="declares 200000 tensors; expected at most 100000"):
        read_safetensors(write_raw(tmp_path / "x", header))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (entry([2**40, 2**40], 0, 4), "impossible shape"),
        (entry([2**62, 2, 0], 0, 0), "impossible shape"),
        (entry([2**50], 0, 2**52), "truncated: it declares 4503599627370496 bytes"),
        (entry([3], 0, 8), "needs 12 bytes, but the header gives it 8"),
        (entry([1], 4, 8), "starts at byte 4 of the data; expected 0"),
        (entry([1], 0, 4, "F31"), "type 'F31'"),
        (entry([-1], 0, 4), "malformed"),
        (entry([1.0], 0, 4), "malformed"),
        (entry([True], 0, 4), "malformed"),
        ({"dtype": "F32", "shape": [1]}, "malformed"),
        ([1, 2], "malformed"),
        (entry([1], 0, 4), "4 bytes follow the last tensor"),
    ],
)
def test_c6_headers_that_cannot_be(tmp_path, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write_raw(tmp_path / "x", {"a": tensor}, b"\0" * 8))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b"[1, 2]", "a header that maps names"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ({"__metadata__": {"trifuse.tied": '{"a": "b"}'}}, "metadata is malformed"),
        ({"__metadata__": ["trifuse.tied"]}, "metadata is malformed"),
    ],
)
def test_headers_that_are_no_headers(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write_raw(tmp_path / "x", header))


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
def test_c11_weights_that_are_not_finite_are_refused(value):
    state = dict(small_network().state_dict())
    state["norm.running_var"] = torch.tensor([1, 2, value, 3])
    with pytest.raises(CheckpointError, match=r"not finite.*\n    norm.running_var"):
        load_strict(small_network(), state, Path("x"))


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    width: int
    kind: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Outer:
    name: str | Inner = "n"
    rate: float = 0.5
    flag: bool = False
    count: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    source: str | None = field(default=None, metadata={"saved": False})

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must not be negative")


@pytest.mark.parametrize(
    "config", [Outer(), Outer(name=Inner(3, "y"), rate=2.0, flag=True, count=4, sizes=(), pair=(2, "b"))]
)
def test_config_round_trip(config):
    assert config_from_json(Outer, json.loads(json.dumps(config_to_json(config))), "c.json") == config


def test_fields_that_are_not_saved():
    assert "source" not in config_to_json(Outer(source="/somewhere"))


def test_a_whole_number_is_a_float():
    assert isinstance(config_from_json(Outer, {"rate": 2}, "c.json").rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"unknown field 'nmae' of Outer"),
        ({"sizs": "x"}, r"unknown field 'sizs' of Outer  \(nearest: sizes\).*schema version 1"),
        ({"rate": "fast"}, "field 'rate': expected float, got 'fast'"),
        ({"flag": 1}, "field 'flag': expected bool, got 1"),
        ({"count": True}, "field 'count'.*got True"),
        ({"sizes": 3}, "field 'sizes'.*got 3"),
        ({"sizes": [1, "2"]}, "field 'sizes': expected int, got '2'"),
        ({"pair": [1]}, "field 'pair'"),
        ({"name": {"width": 1, "kind": "z"}}, "field 'name'"),
        ({"rate": -1.0}, "rate must not be negative"),
        ([], "expected the fields of Outer"),
    ],
)
def test_c12_config_values_that_are_refused(values, message):
    with pytest.raises(CheckpointError, match=rf"c.json.*{message}"):
        config_from_json(Outer, values, "c.json")


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
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(tmp_path) -> tuple[Net, Path]:
    net = Net(NetConfig(width=7))
    net.save_pretrained(tmp_path / "net")
    return net, tmp_path / "net"


def test_save_and_load(saved):
    net, folder = saved
    loaded = Net.from_pretrained(str(folder))
    assert loaded.config == net.config
    assert_same(loaded.state_dict(), net.state_dict())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    description = json.loads((folder / "config.json").read_text())
    assert description == {
        "format": "trifuse",
        "schema_version": 1,
        "architecture": "net",
        "config": {"width": 7},
        "sha256": {"model.safetensors": sha256_of(folder / "model.safetensors")},
    }


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


def test_c3_weights_of_another_day(saved):
    _, folder = saved
    write_safetensors(folder / "model.safetensors", Net(NetConfig(width=7)).state_dict())
    with pytest.raises(CheckpointError, match="the content has changed"):
        Net.from_pretrained(folder)


def test_c7_wrong_architecture_is_said_before_anything_else(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    edit_config(folder, config={"strange": 1})
    with pytest.raises(CheckpointError, match="wrong architecture: got 'net', want 'other_net'"):
        OtherNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, this trifuse reads up to 1; upgrade trifuse"),
        ({"schema_version": "1"}, "schema_version is '1'"),
        ({"format": "other"}, "written by trifuse"),
        ({"config": {"width": 7, "depth": 1}}, "unknown field 'depth' of NetConfig"),
        ({"sha256": {}}, "expected the SHA-256 of model.safetensors, got None"),
        ({"sha256": None}, "expected the SHA-256 of model.safetensors, got None"),
    ],
)
def test_c12_config_file(saved, changes, message):
    _, folder = saved
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config.json.*{message}"):
        Net.from_pretrained(folder)


def test_config_that_is_no_json(saved):
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
    [(pretrained, "write_safetensors", "old"), (pretrained, "write_json", "old"), (Path, "replace", "new")],
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
