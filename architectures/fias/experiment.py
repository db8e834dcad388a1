"""Registration of FIAS: what the rest of the package needs to know."""

from __future__ import annotations

from trifuse.architectures.runs.experiment import Ablation, Converter, Demo, Experiment
from trifuse.architectures.runs.options import OptionGroup, RecipeOption

from .variants import VARIANTS

EXPERIMENT = Experiment(
    name="fias",
    package=__package__,
    summary="DilateFormer and a convolutional encoder, mixing attention",
    network="model:Fias",
    recipe="train:FiasRecipe",
    fit="train:fit_options",
    title="train:title",
    mechanisms="mechanisms:mechanisms",
    report="train:report",
    paper="paper:PAPER",
    protocol="paper:PROTOCOL",
    paper_tables="paper:paper_tables",
    decisions="decisions:DECISIONS",
    variants=tuple(VARIANTS),
    shown_defaults={
        "variant": "that of --encoder, else tiny",
        "image_size": "256",
        "augment": "transunet",
        "epochs": "300, for ACDC 400",
        "batch_size": "2",
        "lr": "0.0001",
        "seed": "2222",
    },
    options=(
        OptionGroup(
            "network",
            (
                RecipeOption(
                    "network.encoder_checkpoint",
                    "--encoder",
                    "folder of converted DilateFormer weights; without it they are random",
                    weights="published_names:describe_encoder",
                ),
            ),
        ),
    ),
    defaults="train:chosen_defaults",
    demo=Demo(
        "eight organs, on a synthetic abdomen",
        "demo:run_demo",
        packages={"scipy": "med", "matplotlib": "med", "h5py": "h5"},
    ),
    ablation=Ablation(
        "Table 3: without the local encoder, without the fusion, without mixing attention",
        "ablate:ablate",
        epochs="8",
        cases="16",
        packages=("h5py",),
    ),
    converters=(Converter("dilateformer", "a DilateFormer checkpoint", "convert:convert_dilateformer"),),
)
