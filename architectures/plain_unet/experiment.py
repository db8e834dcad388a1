"""Registration of the plain U-Net: what the rest of the package needs to know."""

from __future__ import annotations

from trifuse.architectures.runs.experiment import NNUNET_DEFAULTS, Converter, Experiment, Quick

EXPERIMENT = Experiment(
    name="plain_unet",
    package=__package__,
    summary="the U-Net that nnU-Net plans for 2-D images",
    network="model:PlainUNet",
    recipe="train:PlainUNetRecipe",
    fit="train:fit_options",
    title="train:title",
    mechanisms="mechanisms:mechanisms",
    report="train:report",
    paper="paper:PAPER",
    protocol="paper:PROTOCOL",
    paper_tables="paper:paper_tables",
    decisions="decisions:DECISIONS",
    shown_defaults=NNUNET_DEFAULTS,
    converters=(Converter("nnunet", "a 2-D nnU-Net checkpoint, for plain_unet", "convert:convert_nnunet"),),
    quick=Quick(
        words=(
            *("--epochs", "8", "--image-size", "16", "--batch-size", "4", "--device", "cpu"),
            *("--set", "network.base_dim=4", "--set", "data.preprocessing.patches.samples_per_epoch=24"),
            *("--set", "training.checkpoint_every_steps=2", "--set", "training.ema_decay=0.9"),
        ),
    ),
)
