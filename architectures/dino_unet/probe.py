"""Which blocks of an encoder matter on a cohort: its features, computed once, and what is made of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.architectures.evaluation.block_probe import (
    Moments,
    Patches,
    best_blocks,
    explained,
    moments,
)
from trifuse.architectures.evaluation.block_probe_figure import BlockProbe, draw_block_probe
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import format_seconds
from trifuse.architectures.runs.folder import CACHE_FOLDER
from trifuse.architectures.runs.prepared_data import prepare_data
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.distributed import choose_device
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.blocks.weighted_block_fusion import WeightedBlockFusion
from trifuse.kernels import DataError

from .encoder_folder import describe_encoder
from .model import DinoUNet, DinoUNetConfig

_BATCH_PATCHES = 1024
_MOST_PATCHES = 20_000  # that weights are learned on
_SMALLEST_DECODER: dict[str, Any] = {"channels": (1,), "bottleneck_dim": 1, "top_k": 1}


def probe_blocks(
    encoder: Path,
    data: DataRecipe,
    out: Path,
    *,
    seeds: int = 5,
    steps: int = 300,
    width: int = 64,
    device: str = "auto",
) -> Picture:
    """Tell which blocks of an encoder know where the targets of a cohort are; draw it and write a table.

    Args:
        encoder: folder of converted weights, or of a Hugging Face model.
        data: which cases, and how their slices are prepared; their side is rounded to the encoder's patches.
        out: folder for the picture, the split, and the features.
        seeds: from which weights are learned.
        steps: of each.
        width: channels per block that are looked at; of wider tokens, so many random projections.
        device: where features are computed.

    Raises:
        CheckpointError: no encoder is in the folder.
        DataError: cases are unusable, no case validates, or there is no room for the features.
        ShapeError: the maps of its blocks differ in width or grid.
    """
    network = DinoUNet(
        DinoUNetConfig(**{**describe_encoder(encoder), "encoder_checkpoint": str(encoder), **_SMALLEST_DECODER})
    )
    patch = network.encoder.patch_size
    side = max(patch, patch * round(data.preprocessing.image_size / patch))
    prepared = prepare_data(data.with_preprocessing(image_size=side), out)
    if prepared.validated_on != "val":
        hint = "name some with --val-cases or --val-patients: what was fitted is judged on other cases"
        raise DataError(data.root, "validation cases", got="none", want="at least one", hint=hint)
    sets: list[Any] = [prepared.train_set, prepared.val_set]
    _tell_cost(network, sets, out, choose_device(device))
    cached = [FeatureCache(network, one, out / CACHE_FOLDER, device=device) for one in sets]
    classes = len(prepared.cohort.class_names)
    probe = probe_features(*(Projected(one, patch, classes, width) for one in cached), seeds=seeds, steps=steps)
    return draw_block_probe(probe, out, encoder.name, Path(data.root).name)


class Projected:
    """The patches of a feature cache's images: tokens at most so wide, and the shares of the classes.

    Args:
        samples: with ``features``, tokens (M, D) of every block, and ``target`` (S, S).
        patch: side of a patch.
        classes: number of classes, with the background.
        width: the most channels of a token.
    """

    def __init__(self, samples: Any, patch: int, classes: int, width: int) -> None:
        self._samples, self._patch, self._classes, self._width = samples, patch, classes, width

    def __iter__(self) -> Iterator[Patches]:
        for index in range(len(self._samples)):
            sample = self._samples[index]
            tokens = torch.stack(sample["features"]).float()
            if tokens.shape[2] > self._width:
                tokens = tokens @ _projection(tokens.shape[2], self._width)
            yield tokens, shares_of(sample["target"], self._patch, self._classes)


def shares_of(target: Tensor, patch: int, classes: int) -> Tensor:
    """Return the shares of the classes in each patch of a label map (S, S): (M, K), row by row."""
    shares = F.one_hot(target, classes).permute(2, 0, 1).float()
    return F.avg_pool2d(shares, patch).flatten(1).T


def probe_features(train: Any, val: Any, *, seeds: int, steps: int) -> BlockProbe:
    """Probe the patches of training and of validation images; each is iterated over as often as needed."""
    fitted, judged = moments(train), moments(val)
    num_blocks = len(next(iter(train))[0])
    known: dict[tuple[int, ...], float] = {}

    def score(blocks: tuple[int, ...]) -> float:
        if blocks not in known:
            known[blocks] = explained(fitted, judged, blocks, num_blocks)
        return known[blocks]

    best = best_blocks(score, num_blocks)
    everything = tuple(range(num_blocks))
    patches = _standardised(_drawn(train, fitted.count), fitted)
    weights = np.stack([learned_weights(patches, seed, steps=steps).numpy() for seed in range(seeds)])
    without = [score(tuple(b for b in everything if b != block)) if num_blocks > 1 else 0.0 for block in everything]
    return BlockProbe(weights, [score((block,)) for block in everything], without, best)


def learned_weights(patches: Patches, seed: int, *, steps: int, lr: float = 0.05) -> Tensor:
    """Train `WeightedBlockFusion` and a linear layer to tell the classes of patches; return the weights (N,).

    Args:
        patches: tokens (N, M, D), every channel of mean 0 and deviation 1, and shares (M, K).
        seed: of the first weights and of the order of patches.
        steps: of Adam, each on 1024 patches.
        lr: its learning rate.
    """
    tokens, shares = patches
    generator = torch.Generator().manual_seed(seed)
    fusion = WeightedBlockFusion(len(tokens), top_k=1)
    fusion.reset_parameters(generator)
    head = nn.Linear(tokens.shape[2], shares.shape[1])
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    optimizer = torch.optim.Adam([*fusion.parameters(), *head.parameters()], lr=lr)
    for _ in range(steps):
        drawn = torch.randint(tokens.shape[1], (min(_BATCH_PATCHES, tokens.shape[1]),), generator=generator)
        logits = head(fusion(list(tokens[:, drawn][:, None])))[0]
        optimizer.zero_grad()
        F.cross_entropy(logits, shares[drawn]).backward()
        optimizer.step()
    return fusion.weights.detach()


def _drawn(images: Any, count: int) -> Patches:
    """Return the patches of all images, or a part of them that is drawn, the same whenever it is."""
    generator = torch.Generator().manual_seed(0)
    share = min(1.0, _MOST_PATCHES / count)
    tokens, shares = [], []
    for of_image, shares_of_image in images:
        kept = torch.rand(len(shares_of_image), generator=generator) < share
        tokens.append(of_image[:, kept])
        shares.append(shares_of_image[kept])
    return torch.cat(tokens, dim=1), torch.cat(shares)


def _standardised(patches: Patches, found: Moments) -> Patches:
    tokens, shares = patches
    layout = (len(tokens), 1, -1)
    mean = found.mean[: found.channels].view(layout)
    deviation = found.products.diagonal()[: found.channels].clamp(min=0).sqrt().view(layout)
    return ((tokens - mean) / (deviation + 1e-6)).float(), shares


def _projection(wide: int, narrow: int) -> Tensor:
    """Return random directions, orthonormal, the same for every block: (wide, narrow)."""
    drawn = torch.randn(wide, narrow, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


@torch.no_grad()
def _tell_cost(network: DinoUNet, sets: list[Any], out: Path, device: torch.device) -> None:
    """Say how long the features will take, and how much room, before they are computed."""
    image = network.prepare(sets[0][0]["image"][None].to(device))
    network.to(device)
    for _ in range(2):  # the first pass also prepares the device
        started = time.perf_counter()
        features = network.encoder(image)["features"]
        features[-1].sum().item()  # a GPU is done by then
        seconds = time.perf_counter() - started
    slices = sum(map(len, sets))
    stored = slices * sum(tokens.numel() for tokens in features) * 2  # float16
    needed = format_seconds(slices * seconds)
    print(
        f"{slices} slices, {len(features)} blocks: features take about {needed} on {device} and "
        f"{stored / 1e9:.2g} GB in {out / CACHE_FOLDER}; those that are there already are kept"
    )
