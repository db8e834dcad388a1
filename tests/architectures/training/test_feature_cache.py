"""Cached features are the encoder's, and nothing stale or damaged is ever read."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from children import Child, run_ranks
from leftovers import leave_half
from tiny_run import run
from torch.utils.data import default_collate

from trifuse.architectures.dino_unet import dino_unet_tiny
from trifuse.architectures.storage.safetensors_file import read_safetensors, write_safetensors
from trifuse.architectures.training import feature_cache
from trifuse.architectures.training.batches import keyed_seed
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.architectures.training.step import forward_image
from trifuse.kernels.errors import CheckpointError, DataError, NumericError

SIZE = 28


class Images:
    """Noise with a bright corner, as the network takes it."""

    augment = None

    def __init__(self, length: int = 3, seed: int = 0) -> None:
        self._length, self._seed = length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key):
        index = key[2] if isinstance(key, tuple) else key
        generator = torch.Generator().manual_seed(keyed_seed(self._seed, index))
        target = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        target[: 10 + index, :10] = 1
        return {"image": torch.randn(3, SIZE, SIZE, generator=generator) + target, "target": target}


def network(**overrides):
    return dino_unet_tiny(**{"norm": "group", **overrides})


def segment_features(model, batch):
    image = model.prepare(batch["image"])
    return model.forward_features(batch["features"], model.encoder.grid_of(image), image)


@pytest.fixture
def runs(monkeypatch):
    """How many images the encoder was run on."""
    count = []
    encode = feature_cache._encode
    monkeypatch.setattr(feature_cache, "_encode", lambda *arguments: count.append(1) or encode(*arguments))
    return count


@pytest.mark.parametrize("options", [{}, {"blocks": "last4"}], ids=["learned", "fixed"])
def test_training_from_the_cache_is_training(tmp_path, options):
    def trained(name, data, step):
        model = network(**options)
        scores = {"validate": lambda model: {"dice": 0.0}}
        run(tmp_path / name, model=model, data=data, forward=step, epochs=2, batch_size=2, **scores)
        return model.state_dict()

    cache = FeatureCache(network(**options), Images(), tmp_path / "cache", dtype=torch.float32)
    batch = default_collate([cache[0], cache[1]])
    model = network(**options).eval()
    torch.testing.assert_close(segment_features(model, batch), model(batch["image"]), rtol=1e-5, atol=1e-5)
    plain = trained("plain", Images(), forward_image)
    for name, tensor in trained("cached", cache, segment_features).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-4, msg=name)


def test_features_are_computed_once(tmp_path, runs):
    FeatureCache(network(), Images(3), tmp_path)
    assert len(runs) == 3
    cache = FeatureCache(network(), Images(4), tmp_path)
    assert len(runs) == 4
    assert len(cache) == 4
    before = len(list(tmp_path.iterdir()))
    assert cache[(42, 7, 3)]["features"][0].dtype == torch.float32
    assert torch.equal(cache[(42, 7, 3)]["features"][1], cache[3]["features"][1])
    assert len(runs) == before == 4


def test_float16_halves_the_files_and_keeps_three_digits(tmp_path):
    half = FeatureCache(network(), Images(1), tmp_path / "half")
    full = FeatureCache(network(), Images(1), tmp_path / "full", dtype=torch.float32)
    torch.testing.assert_close(half[0]["features"], full[0]["features"], rtol=1e-3, atol=1e-3)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]


def _with_other_weights():
    model = network()
    with torch.no_grad():
        model.encoder.norm.bias[0] += 1e-6
    return model


@pytest.mark.parametrize(
    "changed",
    [
        lambda folder: FeatureCache(_with_other_weights(), Images(1), folder),
        lambda folder: FeatureCache(network(pos_mode="size"), Images(1), folder),
        lambda folder: FeatureCache(network(norm_blocks=False), Images(1), folder),
        lambda folder: FeatureCache(network(blocks=(2, 1, 0, 3)), Images(1), folder, dtype=torch.float32),
        lambda folder: FeatureCache(network(size_policy="pad"), Images(1), folder),
        lambda folder: FeatureCache(network(), Images(1, seed=1), folder),
        lambda folder: FeatureCache(network(), Images(1), folder, dtype=torch.float32),
    ],
    ids=["weights", "positions", "norm", "blocks and dtype", "size", "image", "dtype"],
)
def test_d34_whatever_changes_is_computed_anew(tmp_path, runs, changed):
    FeatureCache(network(), Images(1), tmp_path)
    changed(tmp_path)
    assert len(runs) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_d34_features_without_a_digest_are_those_of_an_older_version(tmp_path, runs):
    whole = FeatureCache(network(), Images(1), tmp_path)[0]["features"]
    (path,) = tmp_path.iterdir()
    write_safetensors(path, {name: 0 * tensor for name, tensor in read_safetensors(path).items() if name != "digest"})
    again = FeatureCache(network(), Images(1), tmp_path)[0]["features"]
    assert len(runs) == 2
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


def test_d34_killed_while_writing(tmp_path, runs):
    whole = FeatureCache(network(), Images(1), tmp_path / "whole")[0]["features"]

    def die():
        os.replace = lambda *names: os._exit(9)
        FeatureCache(network(), Images(1), tmp_path / "cut")

    assert Child(die).wait() == 9
    assert [path.name[:9] for path in (tmp_path / "cut").iterdir()] == [".trifuse-"]
    again = FeatureCache(network(), Images(1), tmp_path / "cut")[0]["features"]
    assert len(runs) == 2
    assert len(list((tmp_path / "cut").iterdir())) == 1
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


def test_d34_half_a_file_is_computed_anew(tmp_path, runs):
    whole = FeatureCache(network(), Images(1), tmp_path)[0]["features"]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    leave_half(path)
    again = FeatureCache(network(), Images(1), tmp_path)[0]["features"]
    assert len(runs) == 2
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


def test_d34_a_flipped_byte_of_a_feature_is_not_believed(tmp_path, runs):
    cache = FeatureCache(network(), Images(1), tmp_path)
    whole = cache[0]["features"]
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="content has changed since it was written"):
        cache[0]
    again = FeatureCache(network(), Images(1), tmp_path)[0]["features"]
    assert len(runs) == 2
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


def test_d35_two_ranks_share_the_work(tmp_path):
    def work():
        count = []
        encode = feature_cache._encode
        feature_cache._encode = lambda *arguments: count.append(1) or encode(*arguments)
        cache = FeatureCache(network(), Images(5), tmp_path)
        assert len(count) in (2, 3)
        assert all("features" in cache[index] for index in range(5)), "all are there when the cache is made"

    assert run_ranks(work) == [0, 0]


def test_d35_two_runs_compute_the_same_features(tmp_path, monkeypatch):
    """Both are held until both compute; both end right, and one file per image remains."""
    expected = FeatureCache(network(), Images(2), tmp_path / "alone")
    computing, encode = multiprocessing.get_context("fork").Barrier(2), feature_cache._encode

    def held(*arguments):
        computing.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(feature_cache, "_encode", held)

    def compute():
        cache = FeatureCache(network(), Images(2), tmp_path / "shared")
        for index in range(2):
            pairs = zip(cache[index]["features"], expected[index]["features"], strict=True)
            assert all(torch.equal(*pair) for pair in pairs)

    children = [Child(compute) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "shared").iterdir()} == names


def test_what_a_killed_run_left_is_removed_before_any_rank_writes(tmp_path, monkeypatch):
    """Else the first rank takes a file that another one is writing for a leftover."""
    folder = tmp_path / "cache"

    def remove_slowly(folder):
        time.sleep(0.5)
        (tmp_path / "removed").touch()

    def write(path, tensors):
        assert (tmp_path / "removed").exists()
        write_safetensors(path, tensors)

    monkeypatch.setattr(feature_cache, "remove_leftovers", remove_slowly)
    monkeypatch.setattr(feature_cache, "write_safetensors", write)
    assert run_ranks(lambda: FeatureCache(network(), Images(), folder)) == [0, 0]


def test_rejects(tmp_path, monkeypatch):
    augmented = Images()
    augmented.augment = lambda image, target, generator: (image, target)
    with pytest.raises(ValueError, match="no constant features"):
        FeatureCache(network(), augmented, tmp_path)
    with pytest.raises(ValueError, match=r"allowed: torch\.float16, torch\.float32"):
        FeatureCache(network(), Images(), tmp_path, dtype=torch.bfloat16)
    cache = FeatureCache(network(), Images(1), tmp_path)
    cache._dataset = Images(1, seed=5)
    with pytest.raises(DataError, match="features: expected those of sample 0; does the data set augment"):
        cache[0]
    loud = network(norm_blocks=False)
    with torch.no_grad():
        loud.encoder.pos_embed *= 1e9
    with pytest.raises(NumericError, match=r"not finite in torch\.float16; store them in torch\.float32"):
        FeatureCache(loud, Images(1), tmp_path)

    class Usage:
        free = 10

    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(DataError, match=r"room for features: expected .* GB, got 0\.0 GB free; train without"):
        FeatureCache(network(), Images(2, seed=9), tmp_path)
