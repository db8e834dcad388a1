"""report.md: the results of a run, how they were measured, and how to reproduce them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from trifuse.architectures.data.layouts.cohort import Cohort
from trifuse.architectures.storage.atomic_files import sha256_of, write_text
from trifuse.architectures.storage.text import count, listed, printable, read_text
from trifuse.kernels.errors import require

from .bland_altman import agreement_cells
from .intervals import summarise_with_intervals
from .picture import Picture
from .protocols import Protocol, changed_scores, differing_rules
from .readouts import DENSITY_G_PER_ML, Readout, readouts_of, write_readouts
from .scoring import Row
from .statistics import Comparison, comparison_cells, dependence_notes
from .summary import (
    LEVEL,
    METRIC_NAMES,
    OWN_PATIENTS,
    PUBLISHED,
    Scored,
    are_own_patients,
    case_by_class_cells,
    failures,
    format_score,
    headline_scores,
    headline_words,
    interval_notes,
    plain,
    side_by_side_cells,
    summary_cells,
    undefined_scores,
)
from .tables import write_case_table, write_summary_table

REPORT = "report.md"
MOST_CLASSES = 3  # of which the table of cases shows all scores
_ABSOLUTE_PATH = re.compile(r"""(?:(?<=[\s='"(:,])|^)(?:~?/|[A-Za-z]:[\\/])(?=\w)[^\s'",;)]*""")


@dataclass(frozen=True)
class Evaluation:
    """Scored cases. ``name`` becomes part of file names, ``title`` a heading.

    ``beside`` holds the scores of the same predictions under other conventions, one sequence of rows each; where it is
    a publication's, ``protocol`` says what is known of that. ``level`` is that of the intervals of means, ``readouts``
    are further ones than those that come from the rows.
    """

    name: str
    title: str
    rows: Sequence[Row]
    beside: Sequence[Sequence[Row]] = ()
    protocol: Protocol | None = None
    level: float = LEVEL
    readouts: Sequence[Readout] = ()


@dataclass(frozen=True)
class PaperTable:
    """Numbers transcribed from a publication, never measured here."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class ComparisonSection:
    """Two runs compared; A is the other run, B this one, by name."""

    name_a: str
    name_b: str
    rows: Sequence[Comparison]


class EarlierCommand(NamedTuple):
    """A command line that trained a run, and a shell's comment on when it went on otherwise, and how."""

    command: Sequence[str]
    note: str


def write_report(
    out: Path,
    *,
    title: str,
    evaluations: Sequence[Evaluation],
    pictures: Sequence[Picture] = (),
    facts: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
    earlier: Sequence[EarlierCommand] = (),
    decisions: Sequence[str] = (),
    comparisons: Sequence[ComparisonSection] = (),
    paper_tables: Sequence[PaperTable] = (),
    paper: str = "",
) -> Path:
    """Write ``report.md`` and the CSV tables it rests on into a run's folder, and return its path.

    The first evaluation gives the headline. Absolute paths in ``facts`` and ``command`` are cut down to their last
    part: a report can be given away.

    Args:
        out: the run's folder.
        title: first line of the report.
        evaluations: the same predictions scored in one or several ways; each is written as ``<name>_cases.csv``
            (``<name>_<convention>_cases.csv`` for those beside it), ``<name>_summary.csv`` and, where volumes are
            known, ``<name>_readouts.csv``.
        pictures: what to show, in this order; they lie in ``out`` or below.
        facts: how it was made: data, network, time, versions; see `describe_data`, `describe_network` and
            `describe_environment`.
        command, earlier: the command line that does the run again, and those that must come before it.
        decisions: the section on what the run had to settle, see `trifuse.architectures.runs.decisions`.
        comparisons: this run against others.
        paper_tables: what the publication reports, kept apart from everything measured.
        paper: how to cite that publication.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", _headline(evaluations[0])]
    parts += [part for picture in pictures for part in picture_parts(picture, out)]
    parts.append("## Scores")
    for evaluation in evaluations:
        parts += _evaluation(evaluation, out)
    if comparisons:
        parts.append("## Compared with another run")
        parts += [part for comparison in comparisons for part in _comparison(comparison)]
    parts += [*provenance_parts(facts or {}, command, earlier), *decisions, *paper_parts(paper_tables, paper)]
    path = out / REPORT
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def headline_of(report: Path) -> str:
    """Return the headline of a report without its marks, for a terminal."""
    _, headline, *_ = read_text(report).split("\n\n")
    return plain(headline)


def add_picture(report: Path, picture: Picture) -> None:
    """Show one more picture in a report, before its scores; it lies in the report's folder or below."""
    text = read_text(report)
    shown = "\n\n".join(picture_parts(picture, report.parent))
    write_text(report, text.replace("\n## Scores\n", f"\n{shown}\n\n## Scores\n", 1))


def check_extras() -> None:
    """Raise MissingExtra before training starts if scoring or drawing would fail for lack of a package.

    Raises:
        MissingExtra: scipy or matplotlib is not installed; the message is the command that installs it.
    """
    for package, purpose in (("scipy", "evaluation of HD95"), ("matplotlib", "drawing a figure")):
        require(package, "med", purpose)


def describe_data(cohort: Cohort, splits: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the facts about data: a digest of all used files, the classes, the sizes of the splits."""
    used = sorted({case_id for case_ids in splits.values() for case_id in case_ids})
    digest = hashlib.sha256()
    for case_id in used:
        case = cohort.case(case_id)
        files = [sha256_of(path) for path in case.files]
        digest.update(printable(f"{case_id} {' '.join(files)}\n").encode())
    cases = ", ".join(f"{name} {count(len(case_ids), 'case')}" for name, case_ids in splits.items())
    patients = {case_id: cohort.case(case_id).patient for case_id in used}
    of = f"{count(len({*patients.values()}), 'patient')} in all"
    return {
        "Data digest": f"`sha256:{digest.hexdigest()}` of {count(len(used), 'case')}",
        "Layout": cohort.layout,
        "Classes": ", ".join(f"{k} {name}" for k, name in enumerate(cohort.class_names)),
        "Split": f"{cases}; {OWN_PATIENTS if are_own_patients(patients.items()) else of}",
        **({} if cohort.has_spacing else {"Spacing": "unknown to the files: distances and volumes are in voxels"}),
    }


def describe_network(model: nn.Module) -> dict[str, str]:
    """Return the facts about a network: its class and its number of parameters."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"Network": type(model).__name__, "Parameters": f"{total:,}, of which {trained:,} are trained"}


def describe_environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return the facts about the machine that explain a number, and none that identify it."""
    device = torch.device(device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {count(torch.get_num_threads(), 'thread')}"
    )
    return {
        "Device": name,
        "Versions": f"trifuse {version('trifuse')}, torch {torch.__version__}, Python {platform.python_version()}",
        "Platform": f"{platform.system()} {platform.machine()}",
    }


def format_seconds(seconds: float) -> str:
    """Return a duration in common units: ``4.2 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _headline(evaluation: Evaluation) -> str:
    dsc, of_what = headline_words(evaluation.rows)
    lines = [f"**{dsc}** {of_what}"]
    failed = failures(evaluation.rows)
    cases = len({row.case_id for row in evaluation.rows})
    if failed:
        lines.append(f"**{len(failed)} of {cases} predictions failed and score 0:** {_escape(', '.join(failed))}.")
    elif cases > 1:
        means = _dsc_of_cases(evaluation.rows)
        worst, best = min(means, key=lambda c: means[c]), max(means, key=lambda c: means[c])
        lines.append(f"Best case {_escape(best)} {means[best]:.3f}, worst {_escape(worst)} {means[worst]:.3f}.")
    return " ".join(lines)


def _dsc_of_cases(rows: Sequence[Row]) -> dict[str, float]:
    """DSC of each case that has one, see `headline_scores`; of one case, NaN, if none has."""
    defined = {case_id: dsc for case_id, dsc in headline_scores(rows, "dsc").items() if not math.isnan(dsc)}
    return defined or {rows[0].case_id: math.nan}


def picture_parts(picture: Picture, out: Path) -> list[str]:
    """Return the lines that show a picture in a report in the folder ``out``."""
    png, numbers = (os.path.relpath(path, out).replace(os.sep, "/") for path in (picture.png, picture.csv))
    return [f"## {picture.title}", f"![{_escape(picture.alt)}]({png})", f"Numbers: [{numbers}]({numbers})"]


def provenance_parts(
    facts: Mapping[str, str], command: Sequence[str], earlier: Sequence[EarlierCommand] = ()
) -> list[str]:
    """Return the section on how a report's numbers were made and how to reproduce them, without absolute paths."""
    parts = ["## How it was made", markdown_table(["", ""], [[k, _without_folders(v)] for k, v in facts.items()])]
    if command:
        why = ", in this order, as its recipe changed on the way" if earlier else ""
        lines = [line for one in earlier for line in (_words(one.command) or "# of which there is no record", one.note)]
        words = "\n".join([*map(_without_folders, lines), _words(command)])
        parts += [f"To do it again{why} (folders are shortened to their names):", f"```sh\n{words}\n```"]
    return parts


def _words(command: Sequence[str]) -> str:
    return shlex.join(_shorten(word) for word in command)


def paper_parts(tables: Sequence[PaperTable], paper: str) -> list[str]:
    """Return a publication's own numbers, marked as not measured here."""
    if not tables:
        return []
    warning = (
        f"Transcribed from {paper or 'the publication'}, **not measured here**: other cases, and a protocol that "
        "is not stated in full. They say what to expect, and are no target."
    )
    return ["## What the paper reports", warning, *(part for table in tables for part in _paper_table(table))]


def _evaluation(evaluation: Evaluation, out: Path) -> list[str]:
    every = [evaluation.rows, *evaluation.beside]
    words = ["", *(f"_{rows[0].conventions.empty_masks}" for rows in evaluation.beside)]
    tables = [*(f"{evaluation.name}{word}_cases.csv" for word in words), f"{evaluation.name}_summary.csv"]
    for rows, table in zip(every, tables, strict=False):
        write_case_table(out / table, rows)
    metrics = PUBLISHED if evaluation.protocol is None else evaluation.protocol.metrics
    scored = [Scored(rows[0].conventions, summarise_with_intervals(rows, evaluation.level), metrics) for rows in every]
    write_summary_table(out / tables[-1], scored)
    shown = _under_one_convention(evaluation.rows, scored[0])
    if evaluation.beside:
        shown += _two_protocols(evaluation, scored)
    links = "Tables: " + ", ".join(f"[{table}]({table})" for table in tables)
    return [f"### {evaluation.title}", *shown, links, *_readouts(evaluation, out)]


def _under_one_convention(rows: Sequence[Row], scored: Scored) -> list[str]:
    """Show all scores of all classes, then of all cases; of many classes the cases' DSC and HD95 alone."""
    parts = [scored.conventions.describe(), markdown_table(*summary_cells(scored.summaries))]
    parts += [*interval_notes(scored.summaries), *map(_escape, undefined_scores(scored.summaries))]
    if scored.conventions.aggregation == "slice":
        return parts
    few = len({row.class_name for row in rows}) <= MOST_CLASSES
    parts.append(_case_table(rows) if few else markdown_table(*case_by_class_cells(rows)))
    return [*parts, *_agreement(rows)]


def _agreement(rows: Sequence[Row]) -> list[str]:
    """Show how far predicted volumes lie from the true ones, where all slices were scored and volumes are known."""
    header, lines = agreement_cells(rows)
    if not lines or rows[0].conventions.slices != "all":
        return []
    note = "Bias and 95 % limits of agreement of volumes (Bland and Altman), in brackets the 95 % interval of each:"
    return [note, markdown_table(header, lines)]


def _two_protocols(evaluation: Evaluation, scored: Sequence[Scored]) -> list[str]:
    """Show the scores that the publication reports under both, which rules differ, and what that changes here."""
    parts = ["#### Two protocols", markdown_table(*side_by_side_cells(scored))]
    if evaluation.protocol is not None:
        parts.insert(1, evaluation.protocol.source)
    for rows, under_one in zip(evaluation.beside, scored[1:], strict=True):
        rules = differing_rules(scored[0].conventions, under_one.conventions, under_one.metrics)
        parts.append("\n".join(f"* {rule}" for rule in rules))
        parts.append(changed_scores(evaluation.rows, rows, under_one.metrics))
        parts += [under_one.conventions.describe(), *map(_escape, undefined_scores(under_one.published))]
        if under_one.conventions.aggregation == "volume":
            parts.append(markdown_table(*case_by_class_cells(rows)))
    return parts


def _readouts(evaluation: Evaluation, out: Path) -> list[str]:
    """Write what can be read off each case, where whole volumes were scored and are known."""
    readouts = [*readouts_of(evaluation.rows), *evaluation.readouts]
    if not readouts or evaluation.rows[0].conventions.slices != "all":
        return []
    table = f"{evaluation.name}_readouts.csv"
    write_readouts(out / table, readouts)
    units = {"volume": "volumes in mL", "mass": f"masses in g, at {DENSITY_G_PER_ML:g} g/mL", "burden": "burden in %"}
    said = listed(units[quantity] for quantity in dict.fromkeys(each.quantity for each in readouts))
    return [f"Read-outs of each case, in truth and by the prediction ({said}): [{table}]({table})"]


def _case_table(rows: Sequence[Row]) -> str:
    metrics = rows[0].conventions.metrics
    several = len({row.class_name for row in rows}) > 1
    header = ["Case", *(["Class"] if several else []), *(METRIC_NAMES[metric] for metric in metrics), "Status"]
    lines = [
        [row.case_id, *([row.class_name] if several else [])]
        + [format_score(row.scores[metric], metric) for metric in metrics]
        + [row.status]
        for row in rows
    ]
    return markdown_table(header, lines)


def _comparison(section: ComparisonSection) -> list[str]:
    header, cells = comparison_cells(section.rows)
    note = (
        f"A is {_escape(section.name_a)}, B is {_escape(section.name_b)}. Two-sided paired tests over cases, Holm over "
        "the rows of this table; the interval of the mean difference is bootstrapped by patient; d is mean over SD."
    )
    note = " ".join([note, *(f"{dependence}." for dependence in dependence_notes(section.rows))])
    return [note, section.rows[0].conventions.describe(), markdown_table(header, cells)]


def _paper_table(table: PaperTable) -> list[str]:
    return [f"### {table.title}", markdown_table(table.header, table.rows), table.note]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, aligned: bool = False) -> str:
    """Return a table of escaped cells; ``aligned`` makes those of a column equally wide, for a terminal."""
    head, *cells = [[_escape(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) if aligned else 3 for column in zip(head, *cells, strict=True)]
    lines = [head, ["-" * width for width in widths], *cells]
    if aligned:
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape(text: str) -> str:
    return re.sub(r"([|<\[\]])", r"\\\1", " ".join(text.split()))


def _shorten(word: str) -> str:
    """Cut a word of a command line, an absolute path or an option set to one, down to the path's last part."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if re.match(r"~|[\\/]|[A-Za-z]:[\\/]", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return option + equals + value


def _without_folders(text: str) -> str:
    """Cut absolute paths down to their last part."""
    return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[\\/]", match.group().rstrip("\\/"))[-1], text)
