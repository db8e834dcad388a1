"""Registration of DINO-UNet: what the rest of the package needs to know."""

from __future__ import annotations

from trifuse.architectures.runs.experiment import Ablation, Converter, Demo, Experiment, Quick
from trifuse.architectures.runs.options import OptionGroup, RecipeOption

from .variants import DINOV3_VARIANTS, VARIANTS

EXPERIMENT = Experiment(
    name="dino_unet",
    package=__package__,
    summary="frozen DINOv2 with weighted block fusion",
    network="model:DinoUNet",
    recipe="train:DinoUNetRecipe",
    fit="train:fit_options",
    title="train:title",
    mechanisms="mechanisms:mechanisms",
    probe="probe:probe_blocks",
    report="train:report",
    paper="paper:PAPER",
    protocol="paper:PROTOCOL",
    paper_tables="paper:paper_tables",
    decisions="decisions:DECISIONS",
    variants=(*VARIANTS, *DINOV3_VARIANTS),
    shown_defaults={
        "variant": "that of --encoder, else giant",
        "image_size": "448",
        "augment": "none",
        "epochs": "50, of which 5 warm up; of other numbers a tenth, at most 5",
        "batch_size": "32",
        "lr": "5e-05",
        "seed": "42",
    },
    options=(
        OptionGroup(
            "network",
            (
                RecipeOption(
                    "network.encoder_checkpoint",
                    "--encoder",
                    "folder of converted weights, or of a Hugging Face model; without it they are random",
                    weights="encoder_folder:describe_encoder",
                ),
                RecipeOption(
                    "cache_features",
                    "--cache-features",
                    "keep the frozen encoder's features on disk",
                    {"action": "store_true", "default": None},
                ),
            ),
        ),
    ),
    defaults="train:chosen_defaults",
    sigmoid=True,
    check="train:check",
    demo=Demo("left atrium, on a synthetic LGE phantom", "demo:run_demo"),
    ablation=Ablation("Table II: which blocks, with and without the image", "ablate:ablate", epochs="14", cases="16"),
    converters=(
        Converter("dinov2", "a DINOv2 checkpoint, of either publisher", "convert:convert_dinov2"),
        Converter("dinov3", "a DINOv3 checkpoint, of either publisher", "convert:convert_dinov3"),
    ),
    quick=Quick(
        words=(
            *("--epochs", "6", "--image-size", "28", "--batch-size", "4", "--lr", "3e-3", "--device", "cpu"),
            *("--variant", "tiny", "--cache-features", "--set", "network.channels=[8,8,8,4]"),
            *("--set", "network.bottleneck_dim=8", "--set", "training.checkpoint_every_steps=2"),
        ),
        cohort="demo:write_quick_cohort",
    ),
)
