"""What the encoders share: frozen for good, asked for the patch tokens of any of their blocks."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trifuse.architectures.storage.pretrained import load_strict
from trifuse.blocks.plain_layers import normalise
from trifuse.blocks.streamed_block_fusion import Receive, hand_out
from trifuse.blocks.transformer_block import iterate_blocks
from trifuse.kernels import CheckpointError, ShapeError, TrifuseError


class FrozenEncoder(nn.Module):
    """Turn images (B, 3, H, W) into the patch tokens (B, M, D) of chosen blocks; frozen for good.

    The weights never require gradients, the module stays in eval mode whatever `train` is told, and nothing is recorded
    for a backward pass. Images are converted to the type of the weights.

    Attributes:
        embed_dim: token width D.
        depth: number of blocks N.
        patch_size: side of a patch in pixels.
    """

    embed_dim: int
    depth: int
    patch_size: int

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Return the patch grid (h, w) of images of shape (B, 3, H, W).

        Raises:
            ShapeError: the shape is not that of a batch of RGB images, or a side is not a multiple of the patch size.
            TypeError: the images are not of a floating-point type, and so cannot have been normalised.
        """
        _check_images(type(self).__name__, x, self.patch_size)
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def forward(self, x: Tensor, blocks: str | Sequence[int] = "all") -> dict[str, Any]:
        """Return the patch tokens of some blocks.

        Args:
            x: images of shape (B, 3, H, W), H and W multiples of the patch size.
            blocks: ``"all"``, or block indices from 0 in any order, negative ones counting from the end.

        Returns:
            ``features``: a list of contiguous maps (B, M, D) in **ascending block order**, whatever the order asked
            for (the order of the published implementation, too), each block once; ``grid``: (h, w), M = h * w, row by
            row.

        Raises:
            ShapeError, TypeError: see `grid_of`.
            ValueError: a block that does not exist.
            TrifuseError: a weight was made to require gradients behind the module's back.
        """
        features: list[Tensor] = []
        self.visit(x, blocks, lambda _, tokens: features.append(tokens))
        return {"features": features, "grid": self.grid_of(x)}

    @abstractmethod
    def visit(self, x: Tensor, blocks: str | Sequence[int], receive: Receive) -> None:
        """Call ``receive`` with each block index and its patch tokens (B, M, D), ascending, as soon as they are made.

        See `forward` for the other arguments.
        """

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenEncoder:
        """Refuse to be unfrozen."""
        if requires_grad:
            self._refuse_unfreezing("it")
        return super().requires_grad_(False)

    def _ascending(self, blocks: str | Sequence[int]) -> list[int]:
        name = type(self).__name__
        if isinstance(blocks, str):
            if blocks != "all":
                raise ValueError(f"{name}: expected blocks 'all' or a sequence of indices, got {blocks!r}")
            return list(range(self.depth))
        blocks = tuple(blocks)
        for index in blocks:
            if not -self.depth <= index < self.depth:
                raise ValueError(f"{name}: block {index} does not exist; it has blocks 0 to {self.depth - 1}")
        return sorted({index % self.depth for index in blocks})

    def _check_frozen(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                self._refuse_unfreezing(name)

    def _refuse_unfreezing(self, what: str) -> NoReturn:
        raise TrifuseError(
            f"{type(self).__name__}: {what} was asked to require gradients, but the encoder is frozen and records "
            "none; leave it out of requires_grad_(True) and train the parts around it"
        )


class FrozenTransformer(FrozenEncoder):
    """A frozen encoder made of this library's transformer blocks.

    Attributes:
        shape: the sizes of a published variant.
        num_registers: register tokens, which stand between the class token and the patches.
        norm_blocks: whether the final norm is applied to every block's tokens.
        blocks: the N transformer blocks.
        norm: the final LayerNorm.
    """

    shape: Any
    num_registers: int
    norm_blocks: bool
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    def _make(
        self,
        build: Callable[[], None],
        checkpoint: str | os.PathLike[str] | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        """Make the parts, draw or load their weights, and freeze them; the end of the constructors."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: expected a floating-point dtype, got {dtype}")
        device = torch.get_default_device()
        with torch.device("meta"):  # so that no weight is drawn twice, nor drawn only to be loaded over
            build()
        self.to(dtype or torch.float32).to_empty(device=device)
        if checkpoint is None:
            self.reset_parameters(generator)
        else:
            self.load_checkpoint(checkpoint)
        self.requires_grad_(False)
        self.train(False)

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw random weights."""

    @abstractmethod
    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load published or converted weights."""

    def _load(self, path: Path, state: Mapping[str, Tensor], found: Any, shape: object) -> None:
        """Load renamed weights, which ``found`` says are those of an encoder of ``shape``, if this is one."""
        if (shape, found.num_registers) != (self.shape, self.num_registers):
            asked = f"{self.shape} with {self.num_registers} registers"
            raise CheckpointError(f"{path}: holds the weights of {found}, but {asked} was asked for")
        load_strict(self, state, path)

    def visit(self, x: Tensor, blocks: str | Sequence[int], receive: Receive) -> None:
        hand_out(self.iterate(x, blocks), receive)

    def iterate(self, x: Tensor, blocks: str | Sequence[int] = "all") -> Iterator[tuple[int, Tensor]]:
        """Yield (block index, patch tokens (B, M, D)) in ascending order, keeping no map once it was handed out.

        Blocks deeper than the last one asked for are not run. See `forward` for the arguments.
        """
        wanted = self._ascending(blocks)
        self._check_frozen()
        # Neither weights nor images require gradients from here on, so none are recorded. A no_grad around a generator
        # would do the same, but its wrapper keeps a reference to each map.
        for index, tokens in self._streams(x.detach(), stop=max(wanted, default=-1) + 1):
            if index in wanted:
                yield index, self._patch_tokens(tokens)

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Return the tokens (B, 1 + registers + M, D) that the first block is given."""

    def _streams(self, x: Tensor, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (block index, all tokens after it (B, 1 + registers + M, D)) for the first ``stop`` blocks."""
        yield from enumerate(iterate_blocks(list(self.blocks)[:stop], self.embed(x)))

    def _patch_tokens(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1 + self.num_registers :]
        return (
            normalise(self.norm, patches) if self.norm_blocks else patches.clone(memory_format=torch.contiguous_format)
        )


def _check_images(name: str, x: Tensor, patch_size: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected normalised images of a floating-point type, got {x.dtype}")
    got = f"got {tuple(x.shape)}"
    if x.dim() == 3:
        raise ShapeError(f"{name}: expected images (B, 3, H, W), {got}; add the batch with image[None]")
    if x.dim() != 4:
        raise ShapeError(f"{name}: expected images (B, 3, H, W), {got}")
    if x.shape[1] != 3:
        if x.shape[3] in (1, 3, 4):
            advice = "channels come second: use images.permute(0, 3, 1, 2)"
        elif x.shape[1] == 1:
            advice = "repeat a grey image with images.expand(-1, 3, -1, -1)"
        else:
            advice = f"choose 3 of the {x.shape[1]} channels, e.g. images[:, :3] of an RGBA image"
        raise ShapeError(f"{name}: expected images (B, 3, H, W), {got}; {advice}")
    for what, side in (("height", x.shape[2]), ("width", x.shape[3])):
        if side == 0 or side % patch_size:
            nearest = max(patch_size, patch_size * round(side / patch_size))
            raise ShapeError(
                f"{name}: {what} {side} is not divisible by the patch size {patch_size}; "
                f"use {nearest} (resize or pad the image)"
            )
