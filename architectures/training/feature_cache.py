"""A frozen encoder's features, computed once per image and then read from disk.

Without augmentation an image gives the same features in every epoch, so the encoder, by far the largest part of such a
network, need not run again. A file is named by all that decides its content: the encoder's weights and settings, the
blocks, the precision, and the image itself; whatever changes is computed anew and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trifuse.architectures.storage.atomic_files import remove_leftovers
from trifuse.architectures.storage.safetensors_file import (
    bytes_of,
    digest_of_tensors,
    read_safetensors,
    write_safetensors,
)
from trifuse.kernels.errors import CheckpointError, DataError, NumericError

from .distributed import World, open_world
from .progress import Progress

_DIGEST = "digest"  # of the features in a file: its name tells what they were made of


class FeatureCache(Dataset[dict[str, Any]]):
    """A data set whose samples also have ``features``: a list with a map (M, D) for each block that is needed.

    Missing features are computed when the cache is made, shared among the ranks that torchrun started. The maps come
    back in the type of the encoder's weights.

    Args:
        model: has a frozen ``encoder(image, blocks)`` that returns ``{"features": [(B, M, D), ...]}``,
            ``required_blocks()``, and ``prepare(image)``, which makes the encoder's input from a batch of images.
        dataset: samples with ``image`` of shape (C, H, W), the same for every key with the same index.
        folder: where the files are; may be shared by several runs.
        dtype: in which features are stored: ``torch.float16`` or ``torch.float32``.
        device: where missing features are computed, see `open_world`.

    Raises:
        ValueError: the data set augments its images, or the encoder is not frozen.
        DataError: there is not enough room for the features.
        NumericError: features that ``dtype`` cannot hold.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float16,
        device: str = "auto",
    ) -> None:
        if getattr(dataset, "augment", None) is not None:
            raise ValueError("augmented images have no constant features; cache features without augmentation")
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype = {dtype}; allowed: torch.float16, torch.float32")
        learning = [name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad]
        if learning:
            raise ValueError(f"encoder.{learning[0]} learns; only a frozen encoder has constant features")
        self._dataset, self._folder, self._dtype = dataset, Path(folder), dtype
        self._blocks = tuple(model.required_blocks())
        self._returned_dtype = next(model.encoder.parameters()).dtype
        self._encoder_digest = _digest_encoder(model, self._blocks, dtype)
        with open_world(device) as world:
            with world.raise_on_any_rank():  # nobody writes before what a killed run left behind is gone
                if world.is_main:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    remove_leftovers(self._folder)
            with world.raise_on_any_rank():  # nobody reads before all have written
                self._fill(model, world)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._dataset)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        """Return the data set's sample and its ``features``.

        Raises:
            DataError: the image is not one of those that the cache was made for.
            CheckpointError: its features are damaged; a cache that is made computes them anew.
        """
        sample = self._dataset[key]
        path = self._path(sample["image"])
        if not path.exists():
            raise DataError(path, "features", got="none", want=f"those of sample {key}; does the data set augment?")
        tensors = _read(path)
        return sample | {"features": [tensors[_name(block)].to(self._returned_dtype) for block in self._blocks]}

    def name_of(self, key: Any) -> str:
        """Say what a sample shows, as its data set does."""
        return self._dataset.name_of(key)

    def _fill(self, model: Any, world: World) -> None:
        """Compute this rank's part of what is missing."""
        mine = range(world.rank, len(self._dataset), world.size)
        missing = [index for index in mine if not _is_whole(self._path(self._dataset[index]["image"]))]
        if not missing:
            return
        model.to(world.device)
        progress = Progress(world.is_main)
        progress.start("features", len(missing))
        for done, index in enumerate(missing, start=1):
            image = self._dataset[index]["image"]
            features = _encode(model, image.to(world.device), self._blocks, self._dtype)
            if done == 1:
                self._check_room(features, len(missing))
            tensors = dict(zip(map(_name, self._blocks), features, strict=True))
            write_safetensors(self._path(image), {**tensors, _DIGEST: _digest_of(tensors)})
            progress.advance(done)
        progress.end()

    def _check_room(self, features: Sequence[Tensor], images: int) -> None:
        needed = images * sum(tensor.numel() * tensor.element_size() for tensor in features)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise DataError(
                self._folder,
                "room for features",
                got=f"{free / 1e9:.1f} GB free",
                want=f"{needed / 1e9:.1f} GB",
                hint="train without the cache, or with fixed blocks, which need fewer maps",
            )

    def _path(self, image: Tensor) -> Path:
        digest = hashlib.sha256(f"{self._encoder_digest} {tuple(image.shape)} {image.dtype}".encode())
        digest.update(bytes_of(image))
        return self._folder / f"{digest.hexdigest()}.safetensors"


@torch.no_grad()
def _encode(model: Any, image: Tensor, blocks: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    maps = model.encoder(model.prepare(image.unsqueeze(0)), blocks)["features"]
    stored = [tokens.squeeze(0).to(dtype) for tokens in maps]
    if not all(bool(tokens.isfinite().all()) for tokens in stored):
        raise NumericError(f"features are not finite in {dtype}; store them in torch.float32")
    return stored


def _digest_encoder(model: Any, blocks: Sequence[int], dtype: torch.dtype) -> str:
    """Digest all that decides features beside the image: the encoder, and how an image is brought to its size."""
    weights = digest_of_tensors(model.encoder.state_dict())
    size_policy = getattr(getattr(model, "config", None), "size_policy", None)
    made_by = f"{model.encoder!r} {size_policy} {tuple(blocks)} {dtype} {weights}"
    return hashlib.sha256(made_by.encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the file is there and reads; one that does not stays: another process may be about to replace it."""
    try:
        _read(path)
    except CheckpointError:
        return False
    return True


def _read(path: Path) -> dict[str, Tensor]:
    """Return the features in a file, by block.

    Raises:
        CheckpointError: it is missing or damaged, or of an older version, which wrote no digest.
    """
    tensors = read_safetensors(path)
    digest = tensors.pop(_DIGEST, None)
    if digest is None or not torch.equal(digest, _digest_of(tensors)):
        raise CheckpointError(f"{path}: the content has changed since it was written; resume, and it is made anew")
    return tensors


def _digest_of(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest_of_tensors(tensors))), dtype=torch.uint8)


def _name(block: int) -> str:
    return f"block_{block}"
