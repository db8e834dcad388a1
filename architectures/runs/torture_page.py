"""What a torture came to, as ``torture.json`` and ``torture.md``; no name of a file of this machine is in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trifuse.architectures.evaluation.report import format_seconds
from trifuse.architectures.storage.atomic_files import write_json, write_text
from trifuse.architectures.storage.text import count

from .torture import Torture
from .torture_session import Alone, Trap

JSON_FILE, PAGE = "torture.json", "torture.md"


def machine_of_runs() -> dict[str, Any]:
    """Return what is known of the machine, in a process such as those that are tortured."""
    session = Alone([], Trap(""), "trifuse.kernels.testing.machine")
    session.wait()
    return json.loads(session.text().splitlines()[0])


def write_torture(out: Path, done: Torture, machine: Mapping[str, Any]) -> Path:
    """Write both files, and return the path of the page."""
    values = {
        "machine": dict(machine),
        "network": done.network,
        "words": [*done.words],
        "seed": done.seed,
        "started": done.started,
        "seconds": done.seconds,
        "blows": len(done.blows),
        "failures": len(done.failures),
        "rounds": [asdict(one) for one in done.rounds],
    }
    text = json.dumps(values).replace(str(out.absolute()), "OUT")
    write_json(out / JSON_FILE, json.loads(text))
    write_text(out / PAGE, _page(done, machine).replace(str(out.absolute()), "OUT"))
    return out / PAGE


def summary(done: Torture) -> str:
    """Return a Markdown table: by kind, how many blows landed, and how the process ended."""
    lines = ["| blow | landed | how the process ended |", "| --- | ---: | --- |"]
    for kind in dict.fromkeys(blow.kind for blow in done.blows):
        ends = Counter(blow.end.partition(", the job")[0] for blow in done.blows if blow.kind == kind)
        text = ", ".join(f"{end} ({number})" for end, number in ends.most_common())
        lines.append(f"| {kind} | {sum(ends.values())} | {text} |")
    return "\n".join(lines)


def headline(done: Torture) -> str:
    """Say in a line what it came to."""
    rounds, failed = len(done.rounds), len(done.failures)
    how = "all" if not failed else f"{rounds - failed}"
    return (
        f"{count(len(done.blows), 'blow')} to {count(rounds, 'run')} in {format_seconds(done.seconds)}: {how} of "
        f"{rounds} ended bit for bit as the undisturbed run"
    )


def _page(done: Torture, machine: Mapping[str, Any]) -> str:
    facts = {"network": done.network, "options": " ".join(done.words), "seed": done.seed, "started": done.started}
    rows = [
        f"| {one.number} | {blow.kind} | {_cell(blow.what)} | {_cell(blow.ending)} |"
        for one in done.rounds
        for blow in one.blows
    ]
    failures = [f"* round {one.number}: {one.problem}" for one in done.failures]
    return "\n".join(
        [
            "# trifuse torture",
            "",
            f"{headline(done)}.",
            "",
            *(["## What went wrong", "", *failures, ""] if failures else []),
            "## Kinds of blows",
            "",
            summary(done),
            "",
            "## How it was done",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {_cell(value)} |" for name, value in {**facts, **machine}.items()),
            "",
            "## Every blow",
            "",
            "| run | blow | what and when | how the process ended |",
            "| ---: | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
