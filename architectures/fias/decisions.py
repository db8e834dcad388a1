"""What the paper on FIAS says of a run, and what is decided where it is silent."""

from __future__ import annotations

from typing import Any

from trifuse.architectures.runs import shared_decisions as shared
from trifuse.architectures.runs.decisions import NOT_SAID, OURS, Decision, shown
from trifuse.architectures.runs.prepared_data import PreparedData

_MIST, _SVANET, _DILATEFORMER, _TRANSUNET = "MIST", "SvANet", "DilateFormer", "TransUNet"


def _encoder_weights(recipe: Any, data: PreparedData | None) -> str:
    return "random" if recipe.network.encoder_checkpoint is None else "pretrained"


def _variant(recipe: Any, data: PreparedData | None) -> str:
    variant = recipe.network.variant
    return variant if isinstance(variant, str) else f"depths {shown(variant.depths)}, width {variant.embed_dim}"


def _weights_of_the_loss(recipe: Any, data: PreparedData | None) -> str:
    return f"{recipe.gamma:g} Dice + {1 - recipe.gamma:g} cross-entropy"


def _dmk(recipe: Any, data: PreparedData | None) -> Any:
    return True if recipe.network.no_dmk is None else f"no: {recipe.network.no_dmk}"


def _has_dmk(recipe: Any) -> bool:
    return recipe.network.no_dmk is None


def _has_caf(recipe: Any) -> bool:
    return recipe.network.fusion == "caf"


def _mixes(recipe: Any) -> bool:
    return recipe.network.mixatt


_TRAINING = shared.silent_but(
    Decision("Optimiser", "Adam", "training.optimizer", ("adam",)),
    Decision("Learning rate", "0.0001", "training.lr", (1e-4,)),
    Decision("Weight decay", "0.0001", "training.weight_decay", (1e-4,)),
    Decision("Schedule", NOT_SAID, "training.schedule", by=_MIST),
    Decision("Epochs", NOT_SAID, "training.epochs", (300, 400), by="MIST; ACDC 400"),
    Decision("Batch size", "2", "training.batch_size", (2,)),
    Decision("Seeds", NOT_SAID, shared.SEEDS, by=_MIST),
    Decision(
        "Loss",
        "0.4 Dice + 0.6 cross-entropy",
        "gamma",
        ("0.4 Dice + 0.6 cross-entropy",),
        answer=_weights_of_the_loss,
    ),
    Decision("Dice", NOT_SAID, (), by=_TRANSUNET, answer=lambda recipe, data: "squared, background included"),
    Decision("Sums of heads in the loss", "all 7 subsets", "subsets", ("mutation",)),
    Decision("Losses of the subsets are", NOT_SAID, "reduction", by="MERIT"),
)

_DATA = (
    Decision(
        "Split",
        "Synapse 18/12, ACDC 70/10/20",
        shared.SPLIT,
        (shared.OWN_SPLIT, shared.DRAWN_SPLIT),
        answer=shared.how_it_is_split,
    ),
    Decision("Image side, pixels", "256", "data.preprocessing.image_size", (256,)),
    Decision("Slices are seen", "whole", (), ("whole slices",), answer=shared.how_slices_are_seen),
    *shared.patch_rows(),
    Decision("Slices to train on", NOT_SAID, "data.slices", by=OURS),
    Decision("Augmentation", "rotation, zoom, shift, flip", "data.augment", ("transunet",), OURS),
    shared.strength_row(_TRANSUNET),
    Decision("Intensities", NOT_SAID, shared.INTENSITY, ("as_is",), OURS, shared.how_values_are_scaled),
    Decision("Slices are resized by", NOT_SAID, "data.preprocessing.resize", by=_TRANSUNET),
    Decision("Predictions get back as", NOT_SAID, "data.preprocessing.restore", by=_TRANSUNET),
    Decision("Channels of an image", NOT_SAID, ("data.preprocessing.channels", "network.in_channels"), by=OURS),
    Decision("Three channels come from", NOT_SAID, "network.input_adapter", by=OURS),
    Decision("Sides are padded to 32", NOT_SAID, "network.pad", by=OURS),
)

_NETWORK = (
    Decision("DilateFormer", "depths 2, 2, 6, 2: tiny", "network.variant", ("tiny",), answer=_variant),
    Decision(
        "DilateFormer: weights", "pretrained", "network.encoder_checkpoint", ("pretrained",), answer=_encoder_weights
    ),
    Decision("DilateFormer: dilations", NOT_SAID, "network.dilations", by=_DILATEFORMER),
    Decision("DilateFormer: maps normalised", NOT_SAID, "network.out_norm", by=OURS),
    Decision("DilateFormer: drop-path", NOT_SAID, "network.drop_path", by=_DILATEFORMER),
    Decision("DMK: encoder of convolutions", "yes", "network.no_dmk", (True,), answer=_dmk),
    Decision("DMK: depthwise kernels", "5, 7", "network.dmk_kernels", ((5, 7),), applies=_has_dmk),
    Decision("DMK: 3x3 convolutions", "dense", "network.ks_groups", ("dense",), applies=_has_dmk),
    Decision(
        "DMK: depthwise kernels see",
        "the size before (Eq. 1)",
        (),
        ("the size before",),
        "PKINet",
        answer=lambda recipe, data: "their own size",
        applies=_has_dmk,
    ),
    Decision("DMK: blocks per size", NOT_SAID, "network.dmk_depth", by=OURS, applies=_has_dmk),
    Decision("Fusion of the encoders", "CAF", "network.fusion", ("caf",)),
    Decision("CAF: convolution before pooling", "yes, of no size", "network.pre_conv", (True,), OURS, applies=_has_caf),
    Decision(
        "CAF: pooled channels are",
        "taken as they are (Eq. 3)",
        "network.channel_weights",
        ("literal",),
        OURS,
        applies=_has_caf,
    ),
    Decision("CAF: weight sees the maximum", "yes (Eq. 3)", "network.max_pool", (True,), applies=_has_caf),
    Decision(
        "CAF: Eq. 5 pools over",
        "average; over what?",
        "network.spatial_pool",
        ("channel", "local3"),
        OURS,
        applies=_has_caf,
    ),
    Decision("CAF: kernel of its spatial weight", NOT_SAID, "network.spatial_kernel", by=OURS, applies=_has_caf),
    Decision("Decoder: starts from", NOT_SAID, "network.bottleneck", by=OURS),
    Decision("Decoder: mixes attention", "yes", "network.mixatt", (True,)),
    Decision("Decoder: heads of its blocks", "8, 6, 4, 2", "network.decoder_heads", ((8, 6, 4, 2),), applies=_mixes),
    Decision("Decoder: position encoding", NOT_SAID, "network.pos", by=OURS, applies=_mixes),
    Decision("Decoder: dropout", "yes, no rate", "network.dropout", by=OURS),
    Decision("Monte Carlo: gate", "none: times the pooled map", "network.gate", ("none",), _SVANET, applies=_mixes),
    Decision("Monte Carlo: sides of the maps", "1, 2, 3", "network.scales", ((1, 2, 3),), applies=_mixes),
    Decision(
        "Monte Carlo: their chances",
        "one at random",
        "network.scale_probs",
        ("equal",),
        OURS,
        lambda recipe, data: recipe.network.scale_probs or "equal",
        _mixes,
    ),
    Decision("Monte Carlo: one draw for", NOT_SAID, "network.draw", by=_SVANET, applies=_mixes),
    Decision("Monte Carlo: pixels shuffled", NOT_SAID, "network.order_shuffle", by=_SVANET, applies=_mixes),
    Decision("Normalisation", "batch", "network.norm", ("batch",)),
)

DECISIONS = (*_TRAINING, *_DATA, *_NETWORK)
NO_ROW = shared.NO_ROW
