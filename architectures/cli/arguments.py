"""The words of the ``trifuse`` command: which commands there are, which options they take, what their help says."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.data.layouts.cohort_options import COHORT_OPTIONS
from trifuse.kernels.choices import nearest

EXIT_CODES = "exit codes: 0 ok, 2 usage, 3 bad data, 4 bad checkpoint, 5 numeric failure, 75 interrupted and resumable"
CONVENTIONS = ("strict", "transunet", "nnunet", "monai")
NONFINITE = ("error", "zero", "median")
NETWORKS = ("dino_unet", "fias", "plain_unet", "taff_unet")
REFERENCES = ("landmarks", "rv_mask", "orientation", "fixed_angle")
SETTINGS = ("baseline", "ap", "ecg", "ecg_ap", "ecg_time", "full")
VARIANTS = {
    "dino_unet": ("tiny", "small", "base", "large", "giant"),
    "fias": ("nano", "tiny", "small", "base"),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that suggests what an unknown word may have meant."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}{self._suggestion(message)}\n")

    def _suggestion(self, message: str) -> str:
        if "unrecognized arguments: " in message:
            known = [option for action in self._actions for option in action.option_strings]
            words = [word.split("=")[0] for word in message.split() if word.startswith("-")]
        elif found := re.search(r"argument ([^:]+): invalid choice: '([^']*)'", message):
            name, word = found.groups()
            words = [word]
            known = [str(choice) for action in self._actions if _is(action, name) for choice in action.choices or ()]
        else:
            return ""
        near = next(filter(None, (nearest(word, known) for word in words)), None)
        return f"; did you mean {near}?" if near else ""


def _is(action: argparse.Action, name: str) -> bool:
    """Tell whether an error message of argparse means this argument by that name."""
    return name == "/".join(action.option_strings) or name in (action.metavar, action.dest)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(prog="trifuse", description="Fused kernels, blocks and segmentation networks.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"trifuse {version('trifuse')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo_words(commands)
    _data_words(commands)
    _train_words(commands)
    _predict_words(commands)
    _evaluate_words(commands)
    _compare_words(commands)
    _plot_words(commands)
    _ablate_words(commands)
    _convert_words(commands)
    _bench_words(commands)
    sub = _command(commands, "doctor", "doctor", "say what is installed, and which backend each operator would use")
    sub.add_argument("--model", choices=NETWORKS, help="say instead what that network costs: parameters and GFLOPs")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _demo_words(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train, predict and report on a synthetic cohort, in minutes on a CPU")
    networks = demo.add_subparsers(title="networks", required=True, metavar="NETWORK")
    for network, what in (
        ("dino_unet", "left atrium, on a synthetic LGE phantom"),
        ("fias", "eight organs, on a synthetic abdomen"),
        ("taff_unet", "myocardial scar from LGE, ECG and the AHA-17 atlas, on a synthetic cohort"),
    ):
        sub = _command(networks, network, f"demo_{network}", what)
        sub.add_argument("--out", type=Path, default=Path("demo") / network, help="folder to write to (%(default)s)")
        sub.add_argument("--seed", type=int, default=0, help="of the phantom and of training (%(default)s)")
        sub.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")


def _data_words(commands: Any) -> None:
    data = commands.add_parser("data", help="look at a cohort or at ECGs, or write a cohort in another layout")
    data_command = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    sub = _command(
        data_command, "check", "data_check", "read every file of a cohort and list all that is wrong with it"
    )
    _cohort_options(sub)
    sub.add_argument("--strict", action="store_true", help="count warnings as errors")
    sub.add_argument("--digests", type=Path, help="JSON file of SHA-256 digests: compared if there, else written")

    sub = _command(data_command, "check-ecg", "data_check_ecg", "read every ECG of a folder down to its median beat")
    sub.add_argument("data", type=Path, help="PTB-XL's folder, a folder of WFDB records or arrays, or one file")
    sub.add_argument("--min-beats", type=_positive, default=3, help="that make a median beat (%(default)s)")

    sub = _command(data_command, "convert", "data_convert", "write a cohort in another layout")
    _cohort_options(sub)
    written = [layout for layout in LAYOUTS if layout.export is not None]
    names = [layout.name for layout in written]
    sub.add_argument("--to", choices=names, required=True, help="; ".join(f"{a.name}: {a.summary}" for a in written))
    sub.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    sub.add_argument("--split", type=Path, help='JSON file with "train", "val" and "test"')
    sub.add_argument(
        "--test-cases", nargs="+", metavar="PATTERN", default=[], help="cases to test on (the cohort's own)"
    )
    sub.add_argument("--nonfinite", choices=NONFINITE, default="error", help="NaN and infinite voxels (%(default)s)")
    for layout in written:
        for option in layout.export.options if layout.export else ():
            option.add_to(sub)


def _train_words(commands: Any) -> None:
    train = commands.add_parser("train", help="train a network, predict its test cases, write a report")
    networks = train.add_subparsers(title="networks", required=True, metavar="NETWORK")
    sub = _command(networks, "dino_unet", "train_dino_unet", "frozen DINOv2 with weighted block fusion")
    _cohort_options(sub)
    group = _training_options(sub, "dino_unet")
    group.add_argument("--encoder", type=Path, help="folder of converted DINOv2 weights; without it they are random")
    group.add_argument("--cache-features", action="store_true", help="keep the frozen encoder's features on disk")
    sub = _command(networks, "fias", "train_fias", "DilateFormer and a convolutional encoder, mixing attention")
    _cohort_options(sub)
    group = _training_options(sub, "fias")
    group.add_argument(
        "--encoder", type=Path, help="folder of converted DilateFormer weights; without it they are random"
    )
    sub = _command(networks, "plain_unet", "train_plain_unet", "the U-Net that nnU-Net plans for 2-D images")
    _cohort_options(sub)
    _training_options(sub, "plain_unet")
    sub = _command(networks, "taff_unet", "train_taff_unet", "scar from LGE, an ECG, the days between, and the atlas")
    _cohort_options(sub)
    group = _training_options(sub, "taff_unet")
    group.add_argument("--setting", choices=SETTINGS, help="which inputs the network has (full)")
    group.add_argument("--ecg", type=Path, help="folder of a trained ECG autoencoder; without it it starts at random")
    _prior_options(sub)
    _ecg_training_words(networks)


def _prior_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("AHA-17 prior")
    group.add_argument(
        "--prior",
        choices=("predicted", "gt"),
        help="where it comes from; no default: a first pass, or the reference annotation, which is an oracle",
    )
    group.add_argument("--prior-labels", type=Path, help="folder of <case>.nii.gz to build it from")
    group.add_argument("--reference", choices=("landmarks", "orientation"), help="where its angles start (landmarks)")
    group.add_argument("--strict", action="store_true", help="refuse an oracle prior")


def _ecg_training_words(networks: Any) -> None:
    sub = _command(
        networks, "ecg", "train_ecg", "the ECG autoencoder: on PTB-XL, or further on a cohort's training cases"
    )
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("data", type=Path, nargs="?", help="PTB-XL's folder, or a folder of records")
    source.add_argument(
        "--cohort", type=Path, help="cohort (cases.csv) whose training cases to fit; no others are read"
    )
    sub.add_argument("--also", type=Path, nargs="+", help="further folders of records, which train, too")
    sub.add_argument("--val-records", nargs="+", metavar="PATTERN", help="records that choose the best epoch")
    sub.add_argument("--test-records", nargs="+", metavar="PATTERN", help="records that are never trained on")
    sub.add_argument("--init", type=Path, help="folder of a trained autoencoder to start from")
    _run_options(sub)
    group = sub.add_argument_group("training")
    group.add_argument("--epochs", type=_positive, help="passes over the beats (300; with --cohort 100)")
    group.add_argument("--batch-size", type=_positive, help="beats per step, over all processes (128)")
    group.add_argument("--lr", type=float, help="highest learning rate (0.001; with --cohort 0.0001)")
    group.add_argument("--min-beats", type=_positive, help="that make a median beat (3)")
    group.add_argument("--seed", type=int, help="of the order of beats and of masking (42)")
    group.add_argument("--workers", type=int, help="processes that load beats (0)")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:<index> (auto)")


def _predict_words(commands: Any) -> None:
    sub = _command(commands, "predict", "predict", "segment volumes with a trained network, on their native grid")
    sub.add_argument("model", type=Path, help="folder of a run, or of a saved network")
    sub.add_argument("images", type=Path, help="a NIfTI file, a folder of them, or a cohort")
    sub.add_argument("--out", type=Path, required=True, help="folder for <case>.nii.gz")
    sub.add_argument("--image-size", type=_positive, help="side of the network's input in pixels (the run's)")
    sub.add_argument(
        "--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values told apart, in place of what the run did"
    )
    sub.add_argument("--prior-labels", type=Path, help="for taff_unet: folder of <case>.nii.gz to build the prior from")
    sub.add_argument(
        "--spacing", nargs=2, type=float, metavar=("ROWS", "COLUMNS"), help="mm, for a network on patches without a run"
    )
    sub.add_argument("--batch-size", type=_positive, default=8, help="slices at a time (%(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (%(default)s)")
    sub.add_argument("--nonfinite", choices=NONFINITE, default="error", help="NaN and infinite voxels")


def _evaluate_words(commands: Any) -> None:
    sub = _command(commands, "evaluate", "evaluate", "score predictions against the labels of a cohort")
    sub.add_argument("predictions", type=Path, help="folder of <case>.nii.gz")
    _cohort_options(sub)
    sub.add_argument(
        "--out", type=Path, required=True, help="CSV file, one line per case and class; further conventions beside it"
    )
    sub.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help="cases to score (all with labels)")
    sub.add_argument(
        "--convention",
        nargs="+",
        choices=CONVENTIONS,
        default=["strict"],
        help="of empty masks and distances (strict); several are shown side by side",
    )
    sub.add_argument("--slices", choices=("all", "labelled"), default="all", help="which slices count (%(default)s)")
    sub.add_argument(
        "--volume",
        choices=("absolute", "signed", "relative", "signed_relative"),
        default="absolute",
        help="how the volume difference is stated (%(default)s)",
    )
    sub.add_argument("--per-slice", action="store_true", help="one score per slice instead of per volume")
    sub.add_argument("--voxels", action="store_true", help="HD95 in voxels (as transunet has it anyway)")
    sub.add_argument("--accept-spacing", action="store_true", help="score although a spacing is hard to believe")
    sub.add_argument("--overwrite", action="store_true", help="replace the CSV file")


def _compare_words(commands: Any) -> None:
    sub = _command(commands, "compare", "compare", "test runs against each other, case by case, or show them together")
    sub.add_argument("runs", type=Path, nargs="+", metavar="run", help="case table (CSV), or folder of a run; two")
    sub.add_argument("--out", type=Path, help="CSV file for the comparison, or folder for the picture")
    sub.add_argument(
        "--overlay", action="store_true", help="draw image, truth and the predictions of two or more runs side by side"
    )


def _plot_words(commands: Any) -> None:
    plot = commands.add_parser("plot", help="draw an ECG, or a bull's-eye of the left ventricle")
    kinds = plot.add_subparsers(title="pictures", required=True, metavar="PICTURE")
    sub = _command(kinds, "ecg", "plot_ecg", "the twelve leads of a record's median beat on ECG paper")
    sub.add_argument("file", type=Path, help="WFDB record, .npy, .npz or .csv")
    sub.add_argument("--rate", type=float, metavar="HZ", help="samples per second, where the file does not say")
    sub.add_argument("--min-beats", type=_positive, default=3, help="that make a median beat (%(default)s)")
    sub.add_argument("--out", type=Path, required=True, help="folder for the picture and its numbers")
    sub = _command(kinds, "bullseye", "plot_bullseye", "volume of scar or wall in each of the 17 segments")
    sub.add_argument("labels", type=Path, nargs="+", help="label maps of one heart; the first gives the segments")
    sub.add_argument("--out", type=Path, required=True, help="folder for the picture and its numbers")
    sub.add_argument("--reference", choices=REFERENCES, required=True, help="where angles start")
    sub.add_argument("--rv-anterior", nargs=2, type=float, metavar=("X", "Y"), help="insertion, indices in the file")
    sub.add_argument("--rv-inferior", nargs=2, type=float, metavar=("X", "Y"), help="insertion, indices in the file")
    sub.add_argument("--rv-class", type=int, help="class of the right ventricle, for rv_mask")
    sub.add_argument("--angle", type=float, metavar="DEGREES", help="of the anterior insertion, for fixed_angle")
    sub.add_argument("--cavity", type=int, nargs="+", default=[1], help="classes of the blood pool (1)")
    sub.add_argument("--wall", type=int, nargs="+", default=[2, 3], help="classes of the wall (2 3)")
    sub.add_argument("--scar", type=int, default=3, help="class of the scar (%(default)s)")
    sub.add_argument("--of", choices=("scar", "wall"), default="scar", help="what is measured (%(default)s)")


def _ablate_words(commands: Any) -> None:
    ablate = commands.add_parser("ablate", help="train a paper's ablation table on a synthetic cohort")
    networks = ablate.add_subparsers(title="networks", required=True, metavar="NETWORK")
    for network, what, epochs, cases in (
        ("dino_unet", "Table II: which blocks, with and without the image", 14, 16),
        ("fias", "Table 3: without the local encoder, without the fusion, without mixing attention", 8, 16),
        ("taff_unet", "with and without the atlas, the ECG and the days between, predicted and oracle prior", 12, 72),
    ):
        sub = _command(networks, network, f"ablate_{network}", what)
        sub.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
        sub.add_argument("--seeds", type=_positive, default=3, help="repetitions of each row (%(default)s)")
        sub.add_argument("--epochs", type=_positive, default=epochs, help="of each training (%(default)s)")
        sub.add_argument("--cases", type=_positive, default=cases, help="of the phantom (%(default)s)")
        if network == "taff_unet":
            sub.add_argument("--cohort", type=Path, help="cohort of your own (cases.csv) in place of the phantom")
            sub.add_argument("--jobs", type=_positive, default=1, help="trainings at a time (%(default)s)")


def _bench_words(commands: Any) -> None:
    sub = _command(commands, "bench", "bench", "time every operator and network on this machine, and write a report")
    sub.add_argument("--out", type=Path, required=True, help="folder for the report, the result files and the logs")
    sub.add_argument("--only", nargs="+", metavar="NAME", help="operators and networks to time (all)")
    sub.add_argument("--seconds", type=float, default=0.5, help="for each form of a computation (%(default)s)")


def _convert_words(commands: Any) -> None:
    convert = commands.add_parser("convert", help="bring published weights into trifuse's format")
    formats = convert.add_subparsers(title="formats", required=True, metavar="FORMAT")
    for name, what in (
        ("dinov2", "a DINOv2 checkpoint, of either publisher"),
        ("dilateformer", "a DilateFormer checkpoint"),
        ("nnunet", "a 2-D nnU-Net checkpoint, for plain_unet"),
        ("ecg", "an ECG dual-attention checkpoint, for taff_unet's autoencoder"),
    ):
        sub = _command(formats, name, f"convert_{name}", what)
        sub.add_argument("file", type=Path, help=".pth or .safetensors")
        sub.add_argument("--out", type=Path, help="folder to write (the file's name without its ending)")
        sub.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion left there")


def _positive(text: str) -> int:
    """Read the value of an option that counts something."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _command(commands: Any, name: str, run: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=EXIT_CODES)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _cohort_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cohort")
    group.add_argument("data", type=Path, help="folder of the cohort, in any of the layouts")
    for option in COHORT_OPTIONS:
        option.add_to(group)


_NNUNET = {"image_size": "256", "augment": "nnunet", "epochs": "1000", "batch_size": "12", "lr": "0.01", "seed": "42"}

# what `--help` says that a network does where nothing is said; a test compares it with the recipes
DEFAULTS = {
    "dino_unet": {
        "variant": "that of --encoder, else giant",
        "image_size": "448",
        "augment": "none",
        "epochs": "50, of which 5 warm up; of other numbers a tenth, at most 5",
        "batch_size": "32",
        "lr": "5e-05",
        "seed": "42",
    },
    "fias": {
        "variant": "that of --encoder, else tiny",
        "image_size": "256",
        "augment": "transunet",
        "epochs": "300, for ACDC 400",
        "batch_size": "2",
        "lr": "0.0001",
        "seed": "2222",
    },
    "plain_unet": _NNUNET,
    "taff_unet": _NNUNET,
}


def _training_options(parser: argparse.ArgumentParser, network: str) -> Any:
    """Add the options that all trainings have, and return the group for those of the network."""
    default = DEFAULTS[network]
    _run_options(parser)
    parser.add_argument(
        "--repeats", type=_positive, default=1, help="runs with other seeds, and a report over them (1)"
    )
    parser.add_argument(
        "--report", nargs="+", choices=("train", "val", "test"), default=["test"], help="parts to score"
    )
    group = parser.add_argument_group("cases and slices")
    group.add_argument("--split", type=Path, help='JSON file with "train", "val" and "test"')
    group.add_argument("--val-cases", nargs="+", metavar="PATTERN", help="cases that choose the best epoch")
    group.add_argument("--test-cases", nargs="+", metavar="PATTERN", help="cases that are never trained on")
    group.add_argument("--image-size", type=int, help=f"side that slices are resized to ({default['image_size']})")
    group.add_argument(
        "--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values told apart, e.g. -125 275 HU for a CT"
    )
    group.add_argument("--slices", "--keep", choices=("all", "foreground", "labelled"), help="slices to train on (all)")
    group.add_argument("--augment", choices=("none", "flip_rot", "transunet", "nnunet"), help=f"({default['augment']})")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, help=f"passes over the training slices ({default['epochs']})")
    group.add_argument("--batch-size", type=int, help=f"slices per step, over all processes ({default['batch_size']})")
    group.add_argument("--lr", type=float, help=f"highest learning rate ({default['lr']})")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward pass (fp32)")
    group.add_argument("--accumulate", type=int, help="micro-batches per step (1)")
    group.add_argument("--seed", type=int, help=f"of the order of samples and of augmentation ({default['seed']})")
    group.add_argument("--workers", type=int, help="processes that load slices (0)")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:<index> (auto)")
    group = parser.add_argument_group("network")
    if network in VARIANTS:
        group.add_argument("--variant", choices=VARIANTS[network], help=f"size of the encoder ({default['variant']})")
    return group


def _run_options(parser: argparse.ArgumentParser) -> None:
    """Add where a run goes, whether it goes on, and how any field of its recipe is set."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--force-resume", action="store_true", help="continue it although the recipe has changed")
    parser.add_argument("--overwrite", action="store_true", help="remove the run in that folder first")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files")
    parser.add_argument("--config", type=Path, help="TOML file with [data], [network] and [training]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. network.norm=group; repeat"
    )
