"""Safetensors files: written whole, read with suspicion."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from trifuse.architectures.storage import atomic_files, safetensors_file
from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.safetensors_file import digest_of_tensors, read_safetensors, write_safetensors
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


def test_c17_a_transposed_view_is_another_tensor(tmp_path):
    square = torch.arange(9.0).reshape(3, 3)
    write_safetensors(tmp_path / "x", {"a": square, "b": square.t()})
    assert_same(read_safetensors(tmp_path / "x"), {"a": square, "b": square.t()})


def test_every_tensor_is_aligned_in_the_file(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS)
    content = (tmp_path / "x").read_bytes()
    data = 8 + struct.unpack("<Q", content[:8])[0]
    for name, described in json.loads(content[8:data]).items():
        assert (data + described["data_offsets"][0]) % TENSORS[name].element_size() == 0, name


def test_what_does_not_read_back_the_same_never_replaces_the_old_file(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x", {"a": torch.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "sha256_of", lambda path: "of other bytes")
        with pytest.raises(CheckpointError, match="does not read back the same"):
            write_safetensors(tmp_path / "x", {"a": torch.zeros(2)})
    assert_same(read_safetensors(tmp_path / "x"), {"a": torch.ones(2)})


def test_an_unknown_type_is_refused_and_the_old_file_kept(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"'b' is torch\.complex64"):
        write_safetensors(tmp_path / "x", {"b": torch.ones(2, dtype=torch.complex64)})
    assert_same(read_safetensors(tmp_path / "x"), {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    """The library writes files for their owner alone."""
    (tmp_path / "any").touch()
    write_safetensors(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize(
    ("text", "number"), [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("else", errno.EIO)]
)
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch, text, number):
    def fail(*arguments):
        raise safetensors.SafetensorError(text)

    monkeypatch.setattr(safetensors_file, "save_file", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_safetensors(tmp_path / "x", TENSORS)
    assert caught.value.errno == number
    assert not list(tmp_path.iterdir())


def test_what_a_killed_write_leaves_is_removed(tmp_path, monkeypatch):
    """The library writes to a temporary file of its own, beside the one that it is given."""

    def killed(tensors, path, metadata):
        path.with_name(".tmpXyZ").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "save_file", killed)
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda *arguments, **options: None)  # a kill cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x", TENSORS)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] != []
    monkeypatch.undo()
    monkeypatch.setattr(atomic_files, "is_running", lambda process: False)
    atomic_files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_metadata_may_have_a_key_of_any_name(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "x", {"format": "pt", "dtype": "bfloat16"})
    assert_same(read_safetensors(tmp_path / "x"), {"a": torch.ones(2)})


def test_a_path_need_not_be_utf_8(tmp_path):
    """The library takes no such path."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    digest = write_safetensors(folder / "x", TENSORS)
    assert_same(read_safetensors(folder / "x", digest), TENSORS)
    (folder / "x").write_bytes((folder / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="x: the file is damaged or truncated"):
        read_safetensors(folder / "x")


DAMAGED = r"x: the file is damaged or truncated \(.+\); restore it from its source"  # the reason in the library's words


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
    in_payload = position >= 8 + struct.unpack("<Q", whole_file[:8])[0]
    said = "the content has changed since it was written" if in_payload else ""
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{said}"):
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


@pytest.mark.parametrize("bit", range(8))
def test_c3_a_flag_that_is_neither_true_nor_false_is_found_by_the_digest(tmp_path, bit):
    digest = write_safetensors(tmp_path / "x", {"flags": torch.tensor([False, True])})
    content = bytearray((tmp_path / "x").read_bytes())
    content[-1] ^= 1 << bit
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="the content has changed"):
        read_safetensors(tmp_path / "x", digest)


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
    header = {f"t{i}": entry([0], 0, 0) for i in range(100_001)}
    with pytest.raises(CheckpointError, match="declares 100001 tensors; expected at most 100000"):
        read_safetensors(write_raw(tmp_path / "x", header))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (entry([2**40, 2**40], 0, 4), DAMAGED),
        (entry([2**62, 2, 0], 0, 0), DAMAGED),
        (entry([2**63, 0], 0, 0), DAMAGED),
        (entry([2**50], 0, 2**52), DAMAGED),
        (entry([3], 0, 8), DAMAGED),
        (entry([1], 4, 8), DAMAGED),
        (entry([1], 0, 4, "F31"), "tensor 'a' has type 'F31'; this trifuse reads F64, F32"),
        (entry([2], 0, 8, "C64"), "tensor 'a' has type 'C64'"),
        (entry([1], 0, 4, ["F32"]), DAMAGED),
        (entry([-1], 0, 4), DAMAGED),
        (entry([1.0], 0, 4), DAMAGED),
        (entry([True], 0, 4), DAMAGED),
        ({"dtype": "F32", "shape": [1]}, DAMAGED),
        ({"shape": [1], "data_offsets": [0, 4]}, DAMAGED),
        ([1, 2], DAMAGED),
        (entry([1], 0, 4), DAMAGED),
    ],
)
def test_c6_headers_that_cannot_be(tmp_path, monkeypatch, tensor, message):
    monkeypatch.setattr(safetensors_file, "_copied", lambda tensor: pytest.fail("memory is asked for"))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write_raw(tmp_path / "x", {"a": tensor}, b"\0" * 8))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' more than once"),
        (b"[1, 2]", "a header that maps names"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ({"__metadata__": {"trifuse.tied": '{"a": "b"}'}}, "metadata is malformed"),
        ({"__metadata__": ["trifuse.tied"]}, DAMAGED),
        ({"__metadata__": None}, "metadata is malformed"),
        ({"__metadata__": {"trifuse.tied": "{"}}, "metadata is malformed"),
        ({"a": entry([2**63, 0], 0, 0)}, DAMAGED),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, DAMAGED),
    ],
)
def test_headers_that_are_no_headers(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write_raw(tmp_path / "x", header))


def test_the_digest_of_tensors_sees_every_bit_name_shape_and_type():
    names = ["a", "b"]
    tensors = {name: torch.arange(4.0).reshape(2, 2) for name in names}
    digest = digest_of_tensors(tensors)
    assert digest == digest_of_tensors({name: tensors[name].t().clone().t() for name in reversed(names)})
    others = [
        {**tensors, "a": tensors["a"] + 1e-7},
        {**tensors, "a": tensors["a"].flatten()},
        {**tensors, "a": tensors["a"].bfloat16()},
        {"a": tensors["a"], "c": tensors["b"]},
    ]
    assert len({digest, *map(digest_of_tensors, others)}) == 5
