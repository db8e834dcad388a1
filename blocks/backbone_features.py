"""The maps of the blocks of anybody's vision transformer: Hugging Face's, timm's, or maps that are there already.

None of the packages is imported: a model is asked for what it declares (its blocks, its patch size, its registers), and
its blocks are read by forward hooks while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trifuse.kernels.errors import ShapeError, TrifuseError

Receive = Callable[[int, Tensor], None]
_FINAL_NORMS = ("layernorm", "norm", "post_layernorm", "layer_norm", "final_layer_norm")
_MOST_PREFIX_TOKENS = 32  # class, distillation and register tokens; more than these are patches of another grid
_PLAIN_VIT = (
    "choose blocks that agree, or a plain vision transformer; or resize and project its maps, and pass them as a list"
)


@dataclass(frozen=True)
class Backbone:
    """What a model declares of its blocks.

    Attributes:
        model: the model itself.
        blocks: its transformer blocks, in order; None where hooks cannot reach them.
        depth: number of blocks N.
        patch: (height, width) of a patch, in pixels.
        declared: (channels, pixels per side of a map's element) of each block, where the model says so.
        call: runs the model on images (B, 3, H, W).
    """

    model: nn.Module
    blocks: Sequence[nn.Module] | None
    depth: int
    patch: tuple[int, int]
    declared: tuple[tuple[int, int], ...]
    call: Callable[[Tensor, Sequence[int]], Any]

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """Return the grid (h, w) of the maps of images (B, 3, H, W)."""
        return image.shape[-2] // self.patch[0], image.shape[-1] // self.patch[1]

    def final_norm(self) -> nn.Module:
        """Return the norm that the model applies to the tokens of its last block.

        Raises:
            TrifuseError: it has none.
        """
        inside = {id(part) for block in self.blocks or () for part in block.modules()}
        parts: Iterable[tuple[str, nn.Module]] = self.model.named_modules()
        outside = [(name, part) for name, part in parts if id(part) not in inside]
        for name, module in sorted(outside, key=lambda named: named[0].count(".")):  # the outermost: not the patches'
            if name.rpartition(".")[2] in _FINAL_NORMS:
                return module
        raise TrifuseError(
            f"backbone_features: expected a final norm in {type(self.model).__name__}, called "
            f"{', '.join(_FINAL_NORMS)}; found none: take its blocks as they are, with norm=False"
        )


def backbone_features(
    model: nn.Module | Sequence[Tensor],
    image: Tensor | None = None,
    blocks: str | Sequence[int] = "all",
    *,
    norm: bool = False,
    receive: Receive | None = None,
) -> list[Tensor]:
    """Return the maps (B, C, h, w) of some blocks of a vision transformer, without its class and register tokens.

    Runs the model as it is: in its mode, with or without gradients, on its device; freeze it before, if it is to be
    frozen. Images are converted to the type of its weights.

    Args:
        model: a vision transformer of Hugging Face (of `AutoModel` or `AutoBackbone`); a model with timm's
            ``forward_intermediates`` and ``feature_info``; or a list of maps (B, C, h, w), of which some are chosen.
        image: images (B, 3, H, W), normalised as the model wants them; H and W multiples of its patch size.
        blocks: ``"all"``, or block indices from 0, negative ones counting from the end.
        norm: apply the model's final norm to every map.
        receive: is called with each block index and map, in ascending order, as soon as the block is done, where hooks
            reach the blocks; nothing is kept then. With ``WeightedBlockFusion.streamed(...).add`` the maps are fused
            while the model runs.

    Returns:
        A map for each block, in the order asked for; an empty list where ``receive`` has them. They are views of the
        model's own tokens, channels innermost in memory.

    Raises:
        ShapeError: the maps differ in width or grid, or the image does not divide into patches; before the model runs
            where it declares them, else with the first block that differs.
        ValueError: a block that does not exist.
        TypeError: neither of these models, or no images.
        TrifuseError: ``norm`` where the model has no final norm.
    """
    if not isinstance(model, nn.Module):
        maps = _alike(model)
        chosen = chosen_blocks(blocks, len(maps))
        return _handed_out([(index, maps[index]) for index in sorted(set(chosen))], chosen, receive)
    backbone = describe_backbone(model)
    chosen = chosen_blocks(blocks, backbone.depth)
    wanted = sorted(set(chosen))
    _check_declared(backbone, wanted)
    image = _checked_image(backbone, image)
    final_norm = backbone.final_norm() if norm else None
    if not wanted:
        return []
    if backbone.blocks is None:
        maps = backbone.call(image, wanted)
        if final_norm is not None:
            maps = [_normalised(final_norm, one) for one in maps]
        return _handed_out(list(zip(wanted, _alike(maps), strict=True)), chosen, receive)
    kept: dict[int, Tensor] = {}
    with _read_by_hooks(backbone, wanted, image, final_norm, kept.__setitem__ if receive is None else receive):
        backbone.call(image, wanted[-1:])
    return [kept[index] for index in chosen] if receive is None else []


def describe_backbone(model: nn.Module) -> Backbone:
    """Return what a model declares of its blocks.

    Raises:
        TypeError: it declares neither what Hugging Face's nor what timm's vision transformers do.
        ShapeError: its maps shrink from stage to stage.
    """
    if callable(getattr(model, "forward_intermediates", None)) and hasattr(model, "feature_info"):
        return _describe_timm(model)
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "pixel_values" or not hasattr(config, "patch_size"):
        raise TypeError(
            "backbone_features: expected a vision transformer of Hugging Face (pixel_values in, a patch_size in its "
            "config; of an image-text model its vision part), a model with timm's forward_intermediates and "
            f"feature_info, or a list of maps (B, C, h, w); got {type(model).__name__}"
        )
    return _describe_hugging_face(model, config)


def _describe_timm(model: Any) -> Backbone:
    declared = tuple((int(info["num_chs"]), int(info["reduction"])) for info in model.feature_info)
    found = getattr(model, "blocks", None)
    reached = isinstance(found, nn.ModuleList | nn.Sequential) and len(found) == len(declared)
    blocks = list(found) if reached and found is not None else None

    def call(image: Tensor, wanted: Sequence[int]) -> Any:
        return model.forward_intermediates(
            image, indices=list(wanted), norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )

    side = declared[0][1]
    return Backbone(model, blocks, len(declared), (side, side), declared, call)


def _describe_hugging_face(model: nn.Module, config: Any) -> Backbone:
    name, depth = type(model).__name__, getattr(config, "num_hidden_layers", None)
    if getattr(config, "depths", None) is not None:
        raise ShapeError(
            f"backbone_features: expected blocks with maps of one width and one grid, got {name}, whose maps shrink "
            f"from stage to stage (depths {list(config.depths)}); {_PLAIN_VIT}"
        )
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    blocks = next((part for part in lists if len({type(block) for block in part}) == 1), None)
    if blocks is None:
        raise TypeError(
            f"backbone_features: expected the {depth} blocks of {name} in one list, as its config counts them, found "
            "no such list; pass its maps as a list"
        )
    patch = config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch[-2:]
    # without this, models with a table of positions take images of one size alone
    resample = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if resample else {}
    call = lambda image, wanted: model(pixel_values=image, **options)  # noqa: E731
    return Backbone(model, list(blocks), len(blocks), (height, width), (), call)


def chosen_blocks(blocks: str | Sequence[int], depth: int) -> list[int]:
    """Return block indices counted from 0, in the order in which they were asked for.

    Raises:
        ValueError: a block that does not exist, or another word than ``"all"``.
    """
    if isinstance(blocks, str):
        if blocks != "all":
            raise ValueError(f"backbone_features: expected blocks 'all' or a sequence of indices, got {blocks!r}")
        return list(range(depth))
    for index in blocks:
        if not -depth <= index < depth:
            raise ValueError(f"backbone_features: block {index} does not exist; there are blocks 0 to {depth - 1}")
    return [index % depth for index in blocks]


@contextmanager
def _read_by_hooks(
    backbone: Backbone, wanted: Sequence[int], image: Tensor, norm: nn.Module | None, receive: Receive
) -> Iterator[None]:
    """Call ``receive`` with the map of each wanted block as soon as the block is done."""
    assert backbone.blocks is not None
    grid, widths = backbone.grid_of(image), set[int]()

    def hook_of(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, arguments: Any, output: Any) -> None:
            tokens = _patch_tokens(index, output[0] if isinstance(output, tuple) else output, grid)
            widths.add(tokens.shape[-1])
            if len(widths) > 1:
                raise ShapeError(
                    f"backbone_features: expected maps of one width, got {tokens.shape[-1]} channels of block {index} "
                    f"after {min(widths - {tokens.shape[-1]})}; {_PLAIN_VIT}"
                )
            tokens = tokens if norm is None else norm(tokens)
            receive(index, tokens.mT.unflatten(-1, grid))

        return hook

    handles = [backbone.blocks[index].register_forward_hook(hook_of(index)) for index in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _patch_tokens(index: int, output: Any, grid: tuple[int, int]) -> Tensor:
    """Return the tokens (B, h * w, C) of the patches in what a block returned: tokens, or a map (B, C, h, w)."""
    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:] == grid:
        return output.flatten(2).mT
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    patches = grid[0] * grid[1]
    prefix = output.shape[1] - patches if isinstance(output, Tensor) and output.ndim == 3 else -1
    if not 0 <= prefix <= _MOST_PREFIX_TOKENS:
        raise ShapeError(
            f"backbone_features: expected of block {index} the tokens of the image's {grid[0]} x {grid[1]} patches, "
            f"{patches} and a few before them, got {shape}; {_PLAIN_VIT}"
        )
    tokens: Tensor = output[:, prefix:]
    return tokens


def _check_declared(backbone: Backbone, wanted: Sequence[int]) -> None:
    """Refuse, before anything runs, blocks whose declared widths or grids differ."""
    declared = backbone.declared
    for index in wanted:
        if declared and declared[index] != declared[wanted[0]]:
            first, other = declared[wanted[0]], declared[index]
            raise ShapeError(
                "backbone_features: expected blocks with maps of one width and one grid, got "
                f"{first[0]} channels at 1/{first[1]} of the image of block {wanted[0]} and "
                f"{other[0]} at 1/{other[1]} of block {index}; {_PLAIN_VIT}"
            )


def _checked_image(backbone: Backbone, image: Tensor | None) -> Tensor:
    if image is None:
        raise TypeError("backbone_features: expected images (B, 3, H, W) for the model, got none")
    if not image.is_floating_point():
        raise TypeError(f"backbone_features: expected normalised floating-point images, got {image.dtype}")
    if image.ndim != 4:
        hint = "; add the batch dimension with image[None]" if image.ndim == 3 else ""
        raise ShapeError(f"backbone_features: expected images (B, 3, H, W), got {tuple(image.shape)}{hint}")
    for name, side, patch in zip(("height", "width"), image.shape[2:], backbone.patch, strict=True):
        if side == 0 or side % patch:
            raise ShapeError(
                f"backbone_features: expected a {name} divisible by the patch size {patch}, got {side}; "
                f"use {max(patch, patch * round(side / patch))} (resize or pad the image)"
            )
    weight = next((weight for weight in backbone.model.parameters() if weight.is_floating_point()), image)
    return image.to(weight.dtype)


def _alike(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return maps, if they are all (B, C, h, w) and of one shape."""
    for index, one in enumerate(maps):
        if not isinstance(one, Tensor) or one.ndim != 4:
            got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise ShapeError(
                f"backbone_features: expected maps (B, C, h, w), got {got} at {index}; of tokens (B, M, C), with M = "
                "h * w and no class token among them: tokens.mT.unflatten(-1, (h, w))"
            )
        if one.shape != maps[0].shape:
            raise ShapeError(
                f"backbone_features: expected maps of one width and one grid, got {tuple(maps[0].shape)} at 0 and "
                f"{tuple(one.shape)} at {index}; {_PLAIN_VIT}"
            )
    return maps


def _handed_out(maps: list[tuple[int, Tensor]], chosen: Sequence[int], receive: Receive | None) -> list[Tensor]:
    if receive is None:
        return [dict(maps)[index] for index in chosen]
    for index, one in maps:
        receive(index, one)
    return []


def _normalised(norm: nn.Module, one: Tensor) -> Tensor:
    """Apply a norm over the last axis to the channels of a map (B, C, h, w)."""
    normalised: Tensor = norm(one.movedim(1, -1)).movedim(-1, 1)
    return normalised
