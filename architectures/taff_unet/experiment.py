"""Registration of TAFF-UNet and of the training of its ECG autoencoder: what the rest of the package needs to know."""

from __future__ import annotations

from pathlib import Path

from trifuse.architectures.runs.experiment import NNUNET_DEFAULTS, Ablation, Converter, Demo, Experiment, Pretraining
from trifuse.architectures.runs.options import OptionGroup, RecipeOption, positive

from .variants import SETTINGS

_NETWORK = OptionGroup(
    "network",
    (
        RecipeOption("network.setting", "--setting", "which inputs the network has (full)", {"choices": (*SETTINGS,)}),
        RecipeOption(
            "network.ecg_checkpoint",
            "--ecg",
            "folder of a trained ECG autoencoder; without it it starts at random",
            {"type": Path},
        ),
    ),
)
_PRIOR = OptionGroup(
    "AHA-17 prior",
    (
        RecipeOption(
            "prior.source",
            "--prior",
            "where it comes from; no default: a first pass, or the reference annotation, which is an oracle",
            {"choices": ("predicted", "gt")},
        ),
        RecipeOption("prior.labels", "--prior-labels", "folder of <case>.nii.gz to build it from", {"type": Path}),
        RecipeOption(
            "prior.reference",
            "--reference",
            "where its angles start (landmarks)",
            {"choices": ("landmarks", "orientation")},
        ),
        RecipeOption("strict", "--strict", "refuse an oracle prior", {"action": "store_true", "default": None}),
    ),
)
_COHORT_OF_ECGS = RecipeOption(
    "data.root",
    "--cohort",
    "cohort (cases.csv) whose training cases to fit; no others are read",
    {"type": Path},
    aliases=("--study",),
    sets={"data.kind": "cohort"},
)
ECG = Pretraining(
    name="ecg",
    summary="the ECG autoencoder: on PTB-XL, or further on a cohort's training cases",
    recipe="pretrain:EcgPretrainingRecipe",
    run="pretrain:train",
    sources=(
        RecipeOption(
            "data.root",
            "data",
            "PTB-XL's folder, or a folder of records",
            {"type": Path, "nargs": "?", "metavar": "records"},
        ),
        _COHORT_OF_ECGS,
    ),
    options=(
        RecipeOption(
            "data.also", "--also", "further folders of records, which train, too", {"type": Path, "nargs": "+"}
        ),
        RecipeOption(
            "data.val_records",
            "--val-records",
            "records that choose the best epoch",
            {"nargs": "+", "metavar": "PATTERN"},
        ),
        RecipeOption(
            "data.test_records",
            "--test-records",
            "records that are never trained on",
            {"nargs": "+", "metavar": "PATTERN"},
        ),
        RecipeOption("init", "--init", "folder of a trained autoencoder to start from", {"type": Path}),
    ),
    groups=(
        OptionGroup(
            "training",
            (
                RecipeOption(
                    "training.epochs", "--epochs", "passes over the beats (300; with --cohort 100)", {"type": positive}
                ),
                RecipeOption(
                    "training.batch_size",
                    "--batch-size",
                    "beats per step, over all processes (128)",
                    {"type": positive},
                ),
                RecipeOption(
                    "training.lr", "--lr", "highest learning rate (0.001; with --cohort 0.0001)", {"type": float}
                ),
                RecipeOption("data.min_beats", "--min-beats", "that make a median beat (3)", {"type": positive}),
                RecipeOption("training.seed", "--seed", "of the order of beats and of masking (42)", {"type": int}),
                RecipeOption("training.workers", "--workers", "processes that load beats (0)", {"type": int}),
                RecipeOption("training.device", "--device", "auto, cpu, cuda or cuda:<index> (auto)"),
            ),
        ),
    ),
    defaults="pretrain:chosen_defaults",
)

_PHANTOM = RecipeOption(
    "phantom",
    "--phantom",
    "easy: one scar, here and there an artefact; ambiguous: always a second candidate, only the ECG knows (easy)",
    {"choices": ("easy", "ambiguous")},
)

EXPERIMENT = Experiment(
    name="taff_unet",
    package=__package__,
    summary="scar from LGE, an ECG, the days between, and the atlas",
    network="model:TaffUNet",
    recipe="train:TaffUNetRecipe",
    fit="train:fit_options",
    title="train:title",
    mechanisms="mechanisms:mechanisms",
    run_inputs="mechanisms:run_inputs",
    report="train:report",
    paper="paper:PAPER",
    protocol="paper:PROTOCOL",
    paper_tables="paper:paper_tables",
    decisions="decisions:DECISIONS",
    shown_defaults=NNUNET_DEFAULTS,
    options=(_NETWORK, _PRIOR),
    check="train:check",
    training_inputs="train:training_side_inputs",
    prediction_inputs="train:prediction_side_inputs",
    input_shapes="inputs:side_input_shapes",
    phantom="phantoms:write_ambiguous",
    demo=Demo(
        "myocardial scar from LGE, ECG and the AHA-17 atlas, on a synthetic cohort",
        "demo:run_demo",
        (_PHANTOM,),
        folders=("run", "without_time", "ecg"),
    ),
    ablation=Ablation(
        "with and without the atlas, the ECG and the days between, predicted and oracle prior",
        "ablate:ablate",
        epochs="12; ambiguous: 5",
        cases="72; ambiguous: 300",
        seeds="3; ambiguous: 5",
        options=(
            _PHANTOM,
            RecipeOption(
                "cohort",
                "--cohort",
                "cohort of your own (cases.csv) in place of the phantom",
                {"type": Path},
                aliases=("--study",),
            ),
            RecipeOption("jobs", "--jobs", "trainings at a time (1)", {"type": positive}),
        ),
    ),
    converters=(
        Converter(
            "ecg",
            "an ECG dual-attention checkpoint, for taff_unet's autoencoder",
            "convert:convert_ecg_dual_attention",
        ),
    ),
    pretrainings=(ECG,),
)
