"""A frozen vision transformer of Hugging Face in the place of DINOv2: loaded from a folder, read through hooks.

transformers is imported here alone, when such an encoder is read or built. Nothing is fetched and no code of a model's
folder is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifuse.architectures.storage.text import listed, parse_json, read_parsed
from trifuse.blocks.backbone_features import backbone_features, describe_backbone
from trifuse.blocks.streamed_block_fusion import Receive
from trifuse.kernels import CheckpointError, MissingExtra, ShapeError

from .frozen_encoder import FrozenEncoder

_CONFIG_FILE = "config.json"
_NOT_OF_THE_NETWORK = ("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id")
_BEHIND_THE_BLOCKS = {"pooler", "head"}  # parts that no patch token passes through


def is_hugging_face(folder: Path) -> bool:
    """Return whether a folder's ``config.json`` is that of a Hugging Face model."""
    try:
        values = read_parsed(folder / _CONFIG_FILE, parse_json)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def read_backbone(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the configuration of the Hugging Face model in a folder, all of its fields, as JSON values.

    Raises:
        CheckpointError: there is none, transformers does not know it, or it asks for code of its own.
        MissingExtra: transformers is not installed.
    """
    transformers = _transformers()
    folder = Path(folder)
    if not is_hugging_face(folder):
        raise CheckpointError(
            f"{folder}: expected the folder of a Hugging Face model, with a model_type in config.json"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parsers do
        raise CheckpointError(f"{folder / _CONFIG_FILE}: transformers cannot read it: {_first_line(error)}") from error
    values = config.to_dict()
    return {
        name: value
        for name, value in json.loads(json.dumps(values)).items()
        if not name.startswith("_") and name not in _NOT_OF_THE_NETWORK
    }


def depth_of(config: Mapping[str, Any]) -> int:
    """Return the number of blocks that a model's configuration counts.

    Raises:
        ValueError: it counts none.
    """
    depth = config.get("num_hidden_layers")
    if type(depth) is not int or depth < 1:
        raise ValueError(f"backbone: expected its number of blocks, num_hidden_layers, got {depth!r}")
    return depth


class BackboneEncoder(FrozenEncoder):
    """Turn images (B, 3, H, W) into the patch tokens (B, M, D) of a Hugging Face vision transformer; frozen for good.

    Args:
        config: the model's configuration, as `read_backbone` returns it.
        norm_blocks: whether the model's final norm is applied to every block's tokens.
        checkpoint: the model's folder, with its weights as safetensors; None draws random weights.
        dtype: type of the weights; None means float32.
        generator: source of the random weights; None means PyTorch's global one.

    Raises:
        MissingExtra: transformers is not installed.
        CheckpointError: the folder has no such model, not all of its weights, or they are damaged.
        ShapeError: the maps of its blocks differ in width or grid, its patches are not square, or its images are not
            RGB; found by a trial run on four patches.
        TypeError: it is no vision transformer.

    Attributes:
        model: the Hugging Face model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        norm_blocks: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device()
        # never on the meta device: what a model computes once and does not save would stay there
        with torch.device("cpu" if device.type == "meta" else device):
            self.model = _random_model(config, generator) if checkpoint is None else _load_model(Path(checkpoint))
        self.model = self.model.to(dtype or torch.float32)
        self.norm_blocks = norm_blocks
        self.requires_grad_(False)
        self.train(False)
        self._try_out()

    def visit(self, x: Tensor, blocks: str | Sequence[int], receive: Receive) -> None:
        self.grid_of(x)
        self._check_frozen()

        def receive_tokens(index: int, one: Tensor) -> None:
            receive(index, one.flatten(2).mT.contiguous())

        with torch.no_grad():
            backbone_features(
                self.model, x.detach(), self._ascending(blocks), norm=self.norm_blocks, receive=receive_tokens
            )

    def extra_repr(self) -> str:
        return f"depth={self.depth}, norm_blocks={self.norm_blocks}, frozen"

    def _try_out(self) -> None:
        """Find the width of the maps, and refuse maps that differ, before anything is trained on them."""
        described = describe_backbone(self.model)
        height, width = described.patch
        name = type(self.model).__name__
        if height != width:
            raise ShapeError(f"{name}: expected square patches, got {height} x {width}; use an encoder that has them")
        if (channels := getattr(self.model.config, "num_channels", 3)) != 3:
            raise ShapeError(f"{name}: expected a model of RGB images, got one of {channels} channels; use another")
        self.depth, self.patch_size = described.depth, height
        weight = next(self.model.parameters())
        with torch.no_grad():
            trial = torch.zeros(1, 3, 2 * height, 2 * width, dtype=weight.dtype, device=weight.device)
            self.embed_dim = backbone_features(self.model, trial, norm=self.norm_blocks)[-1].shape[1]


def _random_model(config: Mapping[str, Any], generator: torch.Generator | None) -> Any:
    transformers = _transformers()
    seed = int(torch.randint(1 << 31, (), generator=generator)) if generator is not None else None
    with torch.random.fork_rng(enabled=seed is not None):  # transformers draws from the global generator
        if seed is not None:
            torch.manual_seed(seed)
        try:
            own = transformers.AutoConfig.for_model(**config)
            return transformers.AutoModel.from_config(own, trust_remote_code=False)
        except Exception as error:  # transformers raises what its layers do
            raise ValueError(
                f"backbone: transformers cannot build {config.get('model_type')!r}: {_first_line(error)}"
            ) from error


def _load_model(folder: Path) -> Any:
    transformers = _transformers()
    try:
        model, said = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises what its readers do
        raise CheckpointError(
            f"{folder}: expected a Hugging Face model with weights as safetensors: {_first_line(error)}"
        ) from error
    lacking = [name for name in said["missing_keys"] if not _BEHIND_THE_BLOCKS & set(name.split("."))]
    lacking += [str(name) for name in said["mismatched_keys"]]
    if lacking:
        raise CheckpointError(
            f"{folder}: expected all weights of one {type(model).__name__}, but {len(lacking)} are missing or have "
            f"another shape: {listed(sorted(lacking))}; save the model again"
        )
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "hf", "an encoder of Hugging Face") from None
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
