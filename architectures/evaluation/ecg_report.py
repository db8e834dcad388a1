"""The report of an ECG autoencoder: the error of its reconstructions, lead by lead, and its attention."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trifuse.architectures.data.ecg.beat_dataset import LeftOut, NetworkBeat
from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.best_epoch import BestEpoch
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.text import count, printable

from .charts import draw_training_curves
from .ecg_attention_figures import draw_lead_attention, draw_temporal_attention
from .ecg_reconstruction_figures import draw_reconstruction, relative_errors
from .picture import Picture
from .report import (
    REPORT,
    EarlierCommand,
    describe_environment,
    describe_network,
    format_seconds,
    markdown_table,
    picture_parts,
    provenance_parts,
)
from .tables import number, write_csv

ERRORS_FILE = "reconstruction.csv"
RECORDS_FILE = "records.csv"
MOST_DRAWN = 3
MOST_LISTED = 20
_PART_WORDS = {"train": "training", "val": "validation", "test": "test"}


@torch.no_grad()
def reconstruct(model: nn.Module, beats: Sequence[NetworkBeat], batch_size: int = 64) -> tuple[NDArray, NDArray]:
    """Return the reconstructions (N, 12, T) of beats, and their errors (N, 12) over that of predicting zero.

    Args:
        model: in evaluation mode.
        beats: what to reconstruct.
        batch_size: beats at a time.
    """
    device = next(model.parameters()).device
    ecgs, usable = torch.stack([beat.ecg for beat in beats]), torch.stack([beat.usable for beat in beats])
    drawn = torch.cat([model(part.to(device)).float().cpu() for part in ecgs.split(batch_size)]).numpy()
    return drawn, relative_errors(ecgs.double().numpy(), drawn.astype(float), usable.numpy())


def write_ecg_report(
    out: Path,
    model: nn.Module,
    parts: Mapping[Any, Sequence[NetworkBeat]],
    left_out: Mapping[Any, Sequence[LeftOut]],
    *,
    title: str,
    validated_on: str,
    shown: Sequence[str] = ("test",),
    facts: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
    earlier: Sequence[EarlierCommand] = (),
) -> Path:
    """Reconstruct all beats of a finished run and write ``report.md``, its tables and its pictures; return its path.

    Args:
        out: the run's folder, with ``log.csv``.
        model: the autoencoder with the weights to judge, in evaluation mode.
        parts: beats of the training, validation and test records.
        left_out: the records that gave no beat.
        title: of the report.
        validated_on: the part that chose the best epoch; what is shown where no part of ``shown`` has a beat.
        shown: the parts to show, the headline first.
        facts: more about how it was made.
        command, earlier: the command line that does the run again, and those that must come before it.
    """
    found = {part: reconstruct(model, beats) for part, beats in parts.items() if beats}
    _write_tables(out, parts, left_out, {part: errors for part, (_, errors) in found.items()})
    headline = next((part for part in shown if part in found), validated_on)
    drawn, errors = found[headline]
    pictures = _draw(out / "figures", model, parts[headline], drawn, errors, headline)
    log = read_log(out / "log.csv")
    best = BestEpoch.read(out / "best")
    text = [
        f"# {title}",
        _headline(errors, headline),
        *(part for picture in pictures for part in picture_parts(picture, out)),
        *picture_parts(draw_training_curves(out / "log.csv", out / "figures", best), out),
        "## Reconstruction error",
        "Mean squared error over that of predicting zero, 1.00 for a flat line, by lead; neither padding nor leads "
        "that are not usable count.",
        _error_table({part: errors for part, (_, errors) in found.items()}),
        f"Every record: [{ERRORS_FILE}]({ERRORS_FILE})",
        *_records_section(parts, left_out),
        *provenance_parts(
            {
                "Data digest": _digest(parts),
                **describe_network(model),
                "Chosen": best.words(f"the {_PART_WORDS[validated_on]} records", len(log)),
                "Training time": format_seconds(sum(row["seconds"] for row in log)),
                **(facts or {}),
                **describe_environment(next(model.parameters()).device),
            },
            command,
            earlier,
        ),
    ]
    write_text(out / REPORT, "\n\n".join(text) + "\n")
    return out / REPORT


def _headline(errors: NDArray, part: str) -> str:
    means = np.nanmean(errors, axis=1)
    records = f"{count(len(means), f'{_PART_WORDS[part]} record')}"
    spread = f", from {means.min():.3f} to {means.max():.3f}" if len(means) > 1 else ""
    warning = "" if part == "test" else ", **which it was trained on**" if part == "train" else ""
    return f"**Reconstruction error {means.mean():.3f}** of that of a flat line, over {records}{warning}{spread}."


def _error_table(errors: Mapping[str, NDArray]) -> str:
    rows = [
        [
            f"{_PART_WORDS[part]} ({len(values)})",
            f"{np.nanmean(np.nanmean(values, axis=1)):.3f}",
            *("–" if np.isnan(lead).all() else f"{np.nanmean(lead):.2f}" for lead in values.T),
        ]
        for part, values in errors.items()
    ]
    return markdown_table(["Records", "All leads", *LEADS], rows)


def _records_section(
    parts: Mapping[Any, Sequence[NetworkBeat]], left_out: Mapping[Any, Sequence[LeftOut]]
) -> list[str]:
    missed = [(part, record) for part, records in left_out.items() for record in records]
    counts = ", ".join(f"{len(beats)} {_PART_WORDS[part]}" for part, beats in parts.items())
    text = ["## Records", f"Used: {counts}. All of them, with what is odd about each: [{RECORDS_FILE}]({RECORDS_FILE})"]
    if missed:
        rows = [[record.record, _PART_WORDS[part], record.reason] for part, record in missed[:MOST_LISTED]]
        more = f", of which the first {MOST_LISTED}" if len(missed) > MOST_LISTED else ""
        text += [f"**{count(len(missed), 'record')} left out**, for no beat could be had of them{more}:"]
        text += [markdown_table(["Record", "Part", "Why"], rows)]
    return text


def _write_tables(
    out: Path,
    parts: Mapping[Any, Sequence[NetworkBeat]],
    left_out: Mapping[Any, Sequence[LeftOut]],
    errors: Mapping[str, NDArray],
) -> None:
    lines = (
        [part, beat.record, number(np.nanmean(row)), *map(number, row)]
        for part, values in errors.items()
        for beat, row in zip(parts[part], values, strict=True)
    )
    write_csv(out / ERRORS_FILE, ["part", "record", "all_leads", *LEADS], lines)
    used = [
        [part, beat.record, "used", "; ".join(_unusable(beat)), "; ".join(beat.notes)]
        for part, beats in parts.items()
        for beat in beats
    ]
    missed = [[part, r.record, "left out", "", r.reason] for part, records in left_out.items() for r in records]
    write_csv(out / RECORDS_FILE, ["part", "record", "status", "unusable_leads", "notes"], [*used, *missed])


def _draw(
    folder: Path, model: Any, beats: Sequence[NetworkBeat], drawn: NDArray, errors: NDArray, part: str
) -> list[Picture]:
    """Draw the best, the middle and the worst record of a part, and the network's attention."""
    order = np.argsort(np.nanmean(errors, axis=1))
    chosen = sorted({0, len(order) // 2, len(order) - 1})[:MOST_DRAWN]
    pictures = [
        draw_reconstruction(
            beats[index].ecg.numpy(),
            drawn[index],
            folder,
            name=f"reconstruction_{number}",
            title=f"Record {beats[index].record} ({_PART_WORDS[part]}), drawn again from its code",
            usable=beats[index].usable.numpy(),
        )
        for number, index in enumerate(order[chosen].tolist(), start=1)
    ]
    middle = beats[int(order[len(order) // 2])]
    between = np.mean([_attention(model, beat).lead[0].cpu().numpy() for beat in beats], axis=0)
    along = _attention(model, middle).temporal[0].cpu().numpy()
    mean = f"mean of {count(len(beats), f'{_PART_WORDS[part]} record')}"
    title = f"Attention along the beat of record {middle.record}"
    return [
        *pictures,
        draw_lead_attention({mean: between}, folder),
        draw_temporal_attention(middle.ecg.numpy(), along, folder, title=title),
    ]


@torch.no_grad()
def _attention(model: Any, beat: NetworkBeat) -> Any:
    return model.attention(beat.ecg[None].to(next(model.parameters()).device))


def _unusable(beat: NetworkBeat) -> list[str]:
    return [lead for lead, usable in zip(LEADS, beat.usable.tolist(), strict=True) if not usable]


def _digest(parts: Mapping[Any, Sequence[NetworkBeat]]) -> str:
    digest = hashlib.sha256()
    for part, beats in parts.items():
        for beat in beats:
            digest.update(printable(f"{part} {beat.record}\n").encode() + beat.ecg.numpy().tobytes())
    return f"`sha256:{digest.hexdigest()}` of {count(sum(map(len, parts.values())), 'beat')}"
