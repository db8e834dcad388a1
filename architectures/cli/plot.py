"""``trifuse plot``: a run's training curves, and pictures of an ECG and of the left ventricle's segments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.options import positive

from .arguments import REPORTING, UsageError, add_command, add_commands, refuse_replacing

REFERENCES = ("landmarks", "rv_mask", "orientation", "fixed_angle")


def add_parser(commands: Any) -> None:
    """Add the command and its pictures."""
    help = "draw training curves, an ECG, or a bull's-eye of the left ventricle"
    pictures = add_commands(commands, "plot", help, "pictures", "PICTURE")
    curves = add_command(
        pictures, "curves", run, "losses, scores and learning rate over epochs, from a run's log alone", ("matplotlib",)
    )
    curves.set_defaults(draw=_draw_curves)
    curves.add_argument("log", type=Path, metavar="run", help="folder of a run, also of one that trains, or a log.csv")
    curves.add_argument("--out", type=Path, required=True, help="folder for the picture and its numbers")
    ecg = add_command(pictures, "ecg", run, "the twelve leads of a record's median beat on ECG paper", ("matplotlib",))
    ecg.set_defaults(draw=_draw_ecg)
    ecg.add_argument("file", type=Path, help="WFDB record, .npy, .npz or .csv")
    ecg.add_argument("--rate", type=float, metavar="HZ", help="samples per second, where the file does not say")
    ecg.add_argument("--min-beats", type=positive, default=3, help="that make a median beat (%(default)s)")
    ecg.add_argument("--out", type=Path, required=True, help="folder for the picture and its numbers")
    bullseye = add_command(pictures, "bullseye", run, "volume of scar or wall in each of the 17 segments", REPORTING)
    bullseye.set_defaults(draw=_draw_bullseye)
    point: dict[str, Any] = {"nargs": 2, "type": float, "metavar": ("X", "Y"), "help": "insertion, indices in the file"}
    bullseye.add_argument("labels", type=Path, nargs="+", help="label maps of one heart; the first gives the segments")
    bullseye.add_argument("--out", type=Path, required=True, help="folder for the picture and its numbers")
    bullseye.add_argument("--reference", choices=REFERENCES, required=True, help="where angles start")
    bullseye.add_argument("--rv-anterior", **point)
    bullseye.add_argument("--rv-inferior", **point)
    bullseye.add_argument("--rv-class", type=int, help="class of the right ventricle, for rv_mask")
    help = "of the anterior insertion, for fixed_angle"
    bullseye.add_argument("--angle", type=float, metavar="DEGREES", help=help)
    bullseye.add_argument("--cavity", type=int, nargs="+", default=[1], help="classes of the blood pool (1)")
    bullseye.add_argument("--wall", type=int, nargs="+", default=[2, 3], help="classes of the wall (2 3)")
    bullseye.add_argument("--scar", type=int, default=3, help="class of the scar (%(default)s)")
    help = "what is measured (%(default)s)"
    bullseye.add_argument("--of", choices=("scar", "wall"), default="scar", help=help)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Draw a picture, and print where it lies and what was odd."""
    picture, notes = arguments.draw(arguments)
    for note in notes:
        print(f"note: {note}")
    print(f"picture: {picture.png}")


def _draw_curves(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from trifuse.architectures.evaluation.charts import draw_training_curves
    from trifuse.architectures.runs.folder import BEST_FOLDER, LOG_FILE, validates
    from trifuse.architectures.storage.best_epoch import SCORE_FILE, BestEpoch

    log = arguments.log / LOG_FILE if arguments.log.is_dir() else arguments.log
    refuse_replacing(arguments.out, "curves", [log])
    best = log.parent / BEST_FOLDER
    kept = BestEpoch.read(best) if (best / SCORE_FILE).exists() else None
    return draw_training_curves(log, arguments.out, kept, trained_on=not validates(log.parent)), ()


def _draw_ecg(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from trifuse.architectures.data.ecg.median_beat import load_beat
    from trifuse.architectures.evaluation.ecg_figures import draw_ecg

    refuse_replacing(arguments.out, arguments.file.stem, [arguments.file])
    beat = load_beat(arguments.file, rate_hz=arguments.rate, min_beats=arguments.min_beats)
    return draw_ecg(beat, arguments.out, name=arguments.file.stem), beat.notes


def _draw_bullseye(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from trifuse.architectures.taff_unet.bullseye import plot_scar_bullseyes

    if both := sorted({*arguments.cavity} & {*arguments.wall}):
        raise UsageError(f"--cavity and --wall: expected classes of their own, got {', '.join(map(str, both))} in both")
    refuse_replacing(arguments.out, "bullseye", arguments.labels)
    options = {} if arguments.angle is None else {"angle_deg": arguments.angle}
    return plot_scar_bullseyes(
        arguments.labels,
        arguments.out,
        reference=arguments.reference,
        rv_anterior=arguments.rv_anterior,
        rv_inferior=arguments.rv_inferior,
        rv_class=arguments.rv_class,
        cavity=arguments.cavity,
        wall=arguments.wall,
        scar=arguments.scar,
        of=arguments.of,
        **options,
    )
