"""What an audit found, for people: a table and a chart, on a page and in a terminal, and CSV files of all numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.text import count, listed, read_text

from .audit import ALL_CLASSES, Audit, Finding, Interval
from .picture import BLUE, FAINT, INK, LARGE, NORMAL, SMALL, VERMILION, Picture, new_figure, plain_axes, save_picture
from .report import markdown_table, picture_parts, provenance_parts
from .summary import METRIC_NAMES, aligned
from .tables import number, write_csv

PAGE = "audit.md"
TITLE = "Audit of "  # begins the title of a run's audit
_CASES = "audit_cases.csv"
_INCHES_A_ROW, _INCHES_AROUND = 0.27, 1.5
_LEAST_SHOWN = 1e-5  # the left end of the chart's axis: what moves less stands there


def is_audit(page: Path) -> bool:
    """Tell whether a page, with its table beside it, is one that `write_audit` wrote for a run."""
    try:
        return read_text(page).startswith(f"# {TITLE}") and page.with_name(_CASES).is_file()
    except (OSError, ValueError):
        return False


def write_audit(
    out: Path, audit: Audit, *, title: str, facts: Mapping[str, str] | None = None, command: Sequence[str] = ()
) -> Picture:
    """Write ``audit.md``, its chart, and the CSV files of all numbers into a folder; return the chart.

    Args:
        out: the folder; made where there is none. Files of an earlier audit are replaced.
        audit: what was found.
        title: first line of the page.
        facts: how it was made.
        command: the command line that does it again.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = draw_audit(audit, out)
    cases, watched = out / _CASES, out / "audit_watched.csv"
    _write_cases(cases, audit)
    watched.unlink(missing_ok=True)  # of an earlier audit; all other files are written anew
    parts = [f"# {title}", headline(audit), *picture_parts(picture, out)]
    parts += ["## Mechanism by mechanism", _explained(audit), markdown_table(*finding_cells(audit))]
    if any(len(finding.moved) > 1 for finding in audit.findings):
        parts += ["## By class", "Share of the voxels of each class that change.", markdown_table(*_class_cells(audit))]
    if audit.spreads:
        _write_watched(watched, audit)
        parts += [
            "## What differs between images",
            "Weights that the network computes for each image: where their standard deviation over images is near "
            "zero, they are a fixed mask. Saturated are those below 0.05 or above 0.95.",
            markdown_table(*spread_cells(audit)),
        ]
    parts += ["## What was done", markdown_table(*_change_cells(audit))]
    tables = [cases, *([watched] if audit.spreads else [])]
    parts.append("Tables: " + ", ".join(f"[{table.name}]({table.name})" for table in tables))
    parts += provenance_parts(facts or {}, command)
    write_text(out / PAGE, "\n\n".join(part for part in parts if part) + "\n")
    return picture


def format_audit(audit: Audit) -> str:
    """Return an audit as text in aligned columns, for a terminal."""
    lines = [headline(audit)]
    header, cells = finding_cells(audit)
    if cells:
        lines += ["", *aligned(header, cells)]
    if audit.spreads:
        lines += ["", *aligned(*spread_cells(audit))]
    left_out: dict[str, list[str]] = {}
    for finding in audit.findings:
        if finding.unmeasured:
            left_out.setdefault(finding.unmeasured, []).append(finding.mechanism.name)
    lines += [f"\nnot measured, because {reason}: {', '.join(names)}" for reason, names in left_out.items()]
    return "\n".join(lines)


def headline(audit: Audit) -> str:
    """Return the sentence that says how many mechanisms are dead, and which."""
    measured = [finding for finding in audit.findings if finding.dead is not None]
    least = f"{100 * audit.threshold:g} %"
    if not measured:
        return "No mechanism could be measured."
    if not audit.dead:
        return f"None of {count(len(measured), 'mechanism')} measured is dead: each changes {least} of a class or more."
    names = listed((finding.mechanism.name for finding in audit.dead), most=len(audit.dead))
    verb = "are" if len(audit.dead) > 1 else "is"
    some = f"{len(audit.dead)} of {count(len(measured), 'mechanism')} measured {verb} dead"
    return f"{some}, changing less than {least} of the voxels of every class: {names}."


def finding_cells(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells, a line for each mechanism that was measured, in the order of the network."""
    several = any(len(finding.moved) > 1 for finding in audit.findings)
    header = ["mechanism", "cases", "voxels changed", "95 % interval", *(["most in"] if several else [])]
    header += [word for metric in audit.metrics for word in (f"{METRIC_NAMES[metric]}, change", "95 % interval")]
    lines = []
    for finding in audit.findings:
        if not finding.moved:
            continue
        first, most = finding.moved[0], finding.most
        line = [finding.mechanism.name, str(finding.cases), percent(first.share.mean), _share_interval(first.share)]
        line += [f"{most.target}: {percent(most.share.mean)}"] if several else []
        for metric in audit.metrics:
            line += _score_words(first.scores[metric])
        lines.append([*line, finding.verdict])
    return [*header, "verdict"], lines


def spread_cells(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells, a line for everything that was watched."""
    header = ["watched", "images", "mean", "SD over images", "smallest", "largest", "saturated"]
    return header, [
        [
            *(each.name, str(each.images)),
            *(f"{value:.3f}" for value in (each.mean, each.sd, each.low, each.high)),
            percent(each.saturated),
        ]
        for each in audit.spreads
    ]


def percent(share: float) -> str:
    """Return a share of voxels in percent: two digits that count, zero only where nothing moves; ``-`` for NaN."""
    if math.isnan(share):
        return "-"
    value = 100 * share
    if value == 0 or value >= 10:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def draw_audit(audit: Audit, out: Path, *, name: str = "audit", title: str = "What each mechanism moves") -> Picture:
    """Draw the share of voxels that each mechanism moves, on a logarithmic axis, and how the DSC changes.

    Args:
        audit: what was found.
        out: folder to write into.
        name: of the files, without suffix.
        title: of the picture.
    """
    shown = [finding for finding in audit.findings if finding.moved]
    figure = new_figure(9.2, _INCHES_AROUND + _INCHES_A_ROW * max(3, len(shown)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, finding in enumerate(shown):
        _draw_row(left, right, row, finding)
    left.set_yticks(range(len(shown)), [finding.mechanism.name for finding in shown])
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xscale("log")
    left.set_xlim(_LEAST_SHOWN, 12)
    ticks = (1e-4, 1e-3, 1e-2, 1e-1, 1)
    left.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    left.minorticks_off()
    left.axvline(audit.threshold, color=FAINT, lw=1, ls="--", zorder=1)
    left.text(audit.threshold, -0.62, "dead below", ha="right", va="bottom", fontsize=SMALL, color=FAINT)
    _dress(left, "Voxels changed, in the class that changes most")
    _dress(right, "Change of the DSC")
    right.axvline(0, color=FAINT, lw=1, zorder=1)
    right.margins(x=0.15)
    right.locator_params(axis="x", nbins=4)  # whose labels do not meet, however small the numbers
    figure.suptitle(title, fontsize=LARGE, color=INK, weight="bold", x=0.01, ha="left")
    rows = [
        [finding.mechanism.name, finding.verdict, moved.target, finding.cases, *map(number, moved.share)]
        + [number(value) for metric in audit.metrics for value in moved.scores[metric]]
        for finding in shown
        for moved in finding.moved
    ]
    header = ["mechanism", "verdict", "target", "cases", "changed", "changed_low", "changed_high"]
    header += [f"{metric}_{word}" for metric in audit.metrics for word in ("change", "low", "high")]
    return save_picture(figure, out, name, title, _described(audit, shown), header, rows)


def _draw_row(left: Any, right: Any, row: int, finding: Finding) -> None:
    """Draw a mechanism: a dead one in red and hatched, its share written beside its bar."""
    colour, hatch = (VERMILION, "//") if finding.dead else (BLUE, "")
    share = finding.most.share
    value = max(_LEAST_SHOWN, share.mean if math.isfinite(share.mean) else 0.0)
    left.barh(row, value - _LEAST_SHOWN, left=_LEAST_SHOWN, height=0.62, color=colour, hatch=hatch, edgecolor="white")
    end = value
    if math.isfinite(share.low):
        left.plot([max(_LEAST_SHOWN, share.low), max(_LEAST_SHOWN, share.high)], [row, row], color=INK, lw=1.2)
        end = max(value, share.high)
    word = f"{percent(share.mean)}{', dead' if finding.dead else ''}"
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    left.text(max(end, _LEAST_SHOWN) * 1.25, row, word, va="center", fontsize=SMALL, color=INK, bbox=behind)
    score = finding.moved[0].scores["dsc"]
    if math.isfinite(score.mean):
        right.scatter([score.mean], [row], s=20, color=colour, zorder=3)
    if math.isfinite(score.low):
        right.plot([score.low, score.high], [row, row], color=INK, lw=1.2)


def _dress(axis: Any, x_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    plain_axes(axis, grid="x")


def verdict(finding: Finding) -> str:
    """Return a few words on a mechanism that was measured: what it moves of the class that it moves most."""
    most = finding.most
    of = "" if most.target == ALL_CLASSES else f" of {most.target}"
    return f"{finding.mechanism.name} {percent(most.share.mean)}{of}{', dead' if finding.dead else ''}"


def _described(audit: Audit, shown: Sequence[Finding]) -> str:
    return f"{headline(audit)} Voxels changed: {'; '.join(map(verdict, shown))}."


def _explained(audit: Audit) -> str:
    return (
        "Each case is predicted once as the network is, and once more for each mechanism. Changed are voxels with "
        "another label, as a share of those that are a target before or after, over all cases together; of a single "
        "class, those that are it before and not after, or the other way round. A mechanism that changes less than "
        f"{100 * audit.threshold:g} % of all classes and of each is dead. Scores: mean over cases of the score with "
        "the change minus that without, under the strict convention, for several classes their mean. Intervals: 95 %, "
        "bootstrapped by patient; none for fewer than two."
    )


def _class_cells(audit: Audit) -> tuple[list[str], list[list[str]]]:
    shown = [finding for finding in audit.findings if finding.moved]
    targets = [moved.target for moved in shown[0].moved]  # of all: see the caller
    return ["mechanism", *targets], [
        [finding.mechanism.name, *(percent(moved.share.mean) for moved in finding.moved)] for finding in shown
    ]


def _change_cells(audit: Audit) -> tuple[list[str], list[list[str]]]:
    return ["mechanism", "change", "not measured because"], [
        [finding.mechanism.name, finding.mechanism.change, finding.unmeasured] for finding in audit.findings
    ]


def _share_interval(share: Interval) -> str:
    return "-" if math.isnan(share.low) else f"{percent(share.low)} to {percent(share.high)}"


def _score_words(score: Interval) -> list[str]:
    if math.isnan(score.mean):
        return ["-", "-"]
    interval = "-" if math.isnan(score.low) else f"{score.low:+.3g} to {score.high:+.3g}"
    return [f"{score.mean:+.3g}", interval]


def _write_cases(path: Path, audit: Audit) -> None:
    """Write a line for each mechanism, case and target: the voxels and the changes of the scores."""
    header = ["mechanism", "case_id", "patient", "target", "voxels", "changed", *audit.metrics]
    write_csv(
        path,
        header,
        (
            [each.mechanism, each.case_id, each.patient, target, voxels, each.changed[target]]
            + [number(each.scores[target][metric]) for metric in audit.metrics]
            for each in audit.effects
            for target, voxels in each.voxels.items()
        ),
    )


def _write_watched(path: Path, audit: Audit) -> None:
    header = ["watched", "images", "mean", "sd", "smallest", "largest", "saturated"]
    write_csv(
        path,
        header,
        (
            [each.name, each.images, *map(number, (each.mean, each.sd, each.low, each.high, each.saturated))]
            for each in audit.spreads
        ),
    )
