"""How long a GPU takes at least to issue the instructions of the networks' operators: a part of `make kernels`.

    python -m trifuse.benchmarks.reporting.issue_time --out FOLDER

traces a training step of each network, compiles every call of an operator in it for a GPU of compute capability 9.0,
counts the instructions of its machine code that are executed, and writes ``issue_time.json``, with everything, and
``issue_time.md``, the tables of the documentation. The forms in which the networks launch the kernels are compiled for
all other targets, too; it fails where one spills registers or uses atomics, and where a goal is missed.

What was written last is the budget of every call and form: where one costs more, nothing is written, and it fails;
``--accept`` makes the new figures the budget.

Nothing in it is a measurement on a GPU. Issue time and the floor that bytes set are lower bounds, and a kernel can be
no faster than the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trifuse import kernels
from trifuse.architectures.storage.atomic_files import write_text
from trifuse.kernels.testing.emulator.executed import Executed, launches_counted

from .ahead_of_time import TARGETS, compile_source
from .issue_goals import goal_lines, goal_rows
from .machine_code import executed_instructions, opcode
from .network_calls import STEPS, Call, Dense, Recorder, dense_in, trace
from .static_report import BYTES_PER_SECOND, LABEL, RESULTS, kernel_hash, stamp

WARP_INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.7e9  # of an H100 or H200: multiprocessors, schedulers of each, clock
DRAWN_SCALE, DRAWN_CELL = 2, 1  # of Monte Carlo attention, whose draw a trace does not know
WARP_SIZE = 32
LONGER = 1.02  # of a call's microseconds as last written: what may be more without being asked for
GRANULE = 8  # registers, as they are given to a lane
POOL = "monte_carlo_pool"
ACCESS = re.compile(r"(?P<kind>LDG|STG)\.E(?:\.\w+)*?(?:\.(?:(?P<bits>64|128|256)|[US](?P<small>8|16)))?(?:\.|$)")
Source = tuple[Any, ...]


def arguments_of(call: Call) -> list[Any]:
    """Return arguments of a call as it was traced: tensors of zeros, and a draw where there is one."""
    values = [_real(argument) for argument in call.arguments]
    if is_drawn(call):
        scales, cells, permutation = (k for k, argument in enumerate(call.arguments) if _is_whole(argument))
        values[scales].fill_(DRAWN_SCALE)
        values[cells].fill_(DRAWN_CELL)
        values[permutation] = torch.arange(values[permutation].numel()).expand(values[permutation].shape)
    return values


def is_drawn(call: Call) -> bool:
    """Tell whether a call pools a cell that was drawn on the device, or is its gradient."""
    return call.operator.startswith(POOL) and any(_is_whole(argument) for argument in call.arguments)


def _real(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return [_real(each) for each in argument]
    return argument.zeros() if isinstance(argument, Dense) else argument


def _map_bytes(argument: Any) -> int:
    return sum(dense.nbytes for dense in dense_in(argument) if dense.dtype.is_floating_point)


def _is_whole(value: object) -> bool:
    return isinstance(value, Dense) and value.dtype is torch.int64


def launches_of(call: Call) -> list[Executed]:
    """Compile and run what a call launches."""
    with launches_counted() as found, torch.no_grad():
        getattr(torch.ops.trifuse, call.operator)(*arguments_of(call))
    return found


def launch_row(launch: Executed) -> dict[str, Any]:
    """Return what is counted of a launch: per warp, with accesses to global memory by their width in bits."""
    code, counts = executed_instructions(launch)
    accesses: Counter[tuple[str, int]] = Counter()
    for instruction, times in zip(code, counts, strict=True):
        if match := ACCESS.match(opcode(instruction)):
            accesses[match["kind"], int(match["bits"] or match["small"] or 32)] += times
    return {
        "kernel": launch.kernel.name,
        "programs": launch.programs,
        "warps": launch.warps,
        "executed": round(sum(counts), 1),
        **{
            name: {str(bits): round(n, 1) for (of, bits), n in sorted(accesses.items(), reverse=True) if of == kind}
            for name, kind in (("loads", "LDG"), ("stores", "STG"))
        },
    }


def issue_us(launch: dict[str, Any]) -> float:
    """Return the microseconds in which a GPU can issue a launch's instructions."""
    return 1e6 * launch["programs"] * launch["warps"] * launch["executed"] / WARP_INSTRUCTIONS_PER_SECOND


def floor_us(call: Call) -> float:
    """Return the microseconds in which a GPU can read a call's arguments and write its results, once each.

    Of the map that Monte Carlo attention pools, that is the drawn cell.
    """
    nbytes = call.nbytes
    if call.operator == POOL and is_drawn(call):
        nbytes -= round(call.arguments[0].nbytes * (1 - 1 / DRAWN_SCALE**2))
    return 1e6 * nbytes / BYTES_PER_SECOND


def call_row(call: Call, times: int, launches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is computed of a call."""
    return {
        "operator": call.operator,
        "arguments": described(call.arguments),
        "map": described([max(call.arguments, key=_map_bytes)])[0],
        "times": times,
        "floor_us": round(floor_us(call), 2),
        "issue_us": round(sum(map(issue_us, launches)), 2),
        "launches": list(launches),
    }


def described(arguments: Sequence[Any]) -> list[str]:
    """Return the arguments of a call in words: of tensors shape, type and layout."""
    words: list[str] = []
    for argument in arguments:
        each = argument if isinstance(argument, tuple) else (argument,)
        texts = [_dense_words(part) if isinstance(part, Dense) else str(part) for part in each]
        alike = len(texts) > 1 and len(set(texts)) == 1
        words.append(f"{len(texts)} x {texts[0]}" if alike else " + ".join(texts))
    return words


def _dense_words(dense: Dense) -> str:
    place = torch.empty_strided(dense.shape, dense.stride, device="meta")
    last = place.ndim == 4 and place.is_contiguous(memory_format=torch.channels_last) and not place.is_contiguous()
    layout = "" if place.is_contiguous() else " channels last" if last else f" strides {dense.stride}"
    return f"{dense.shape} {str(dense.dtype).removeprefix('torch.')}{layout}"


def network_rows(name: str, sources: dict[str, Source]) -> dict[str, Any]:
    """Return what is computed of a network's step; adds the forms that it launches to ``sources``."""
    rows = []
    step = trace(name)
    for call, times in sorted(step.calls.items(), key=lambda item: (item[0].operator, -item[0].nbytes)):
        launches = launches_of(call)
        for launch in launches:
            form = json.dumps(form_of(launch), default=str)
            sources.setdefault(form, (launch.source, launch.warps * WARP_SIZE))
        rows.append(call_row(call, times, [launch_row(launch) for launch in launches]))
    return {"network": name, "batch": STEPS[name].batch, "gigabytes": gigabytes_of(step), "calls": rows}


def gigabytes_of(step: Recorder) -> float:
    """Return what all operations of a step read and write, the operators' and PyTorch's."""
    return round(sum(step.nbytes.values()) / 1e9, 2)


def form_of(launch: Executed) -> dict[str, Any]:
    """Return the form in which a kernel is launched: types, constants, and what is a multiple of 16, by name."""
    source = launch.source
    names = source.fn.arg_names
    aligned = [_name_of(path, names) for path, attributes in sorted(source.attrs.items()) if attributes]
    return {
        "kernel": launch.kernel.name,
        "types": {name: _flat_type(kind) for name, kind in source.signature.items() if kind != "constexpr"},
        "constants": {_name_of(path, names): value for path, value in sorted(source.constants.items())},
        "aligned": aligned,
        "threads": launch.warps * WARP_SIZE,
    }


def _name_of(path: tuple[int, ...], names: Sequence[str]) -> str:
    return names[path[0]] + "".join(f"[{k}]" for k in path[1:])


def _flat_type(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"({', '.join(map(_flat_type, kind))})"


def form_rows(sources: dict[str, Source]) -> list[dict[str, Any]]:
    """Compile every form for every target, on all cores."""
    _forms.update(sources)
    jobs = [(form, target) for form in sources for target in TARGETS]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        costs = dict(zip(jobs, pool.map(_form_cost, jobs), strict=True))
    return [
        {**json.loads(form), "source": kernel_hash(source.fn), "costs": {each: costs[form, each] for each in TARGETS}}
        for form, (source, _) in sources.items()
    ]


_forms: dict[str, Source] = {}


def _form_cost(job: tuple[str, str]) -> dict[str, Any]:
    form, target = job
    source, threads = _forms[form]
    facts = {"signature": source.signature, "constexprs": source.constants, "attrs": source.attrs}
    return asdict(compile_source(source.fn, facts, threads, target))


def faults_of(record: dict[str, Any]) -> list[str]:
    """Name each form that spills registers or uses atomics, and where, and each goal that is missed."""
    forms = [
        f"{row['kernel']} on {target}: {rule}: {cost[rule]}, at most 0, where {row['constants']}"
        for row in record["forms"]
        for target, cost in row["costs"].items()
        for rule in ("spills", "atomics")
        if cost[rule]
    ]
    goals = [row for row in record["goals"] if row["found"] > row["most"]]
    return forms + [f"{row['what']}: {row['found']} {row['unit']}, at most {row['most']}" for row in goals]


def dearer(record: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Name what costs more than in the record written last: calls by time and launches, forms by registers."""
    found = []
    calls, forms = dict(_calls(last)), dict(_forms_of(last))
    for key, row in _calls(record):
        if (before := calls.get(key)) is None:
            continue
        took, takes = before["issue_us"], row["issue_us"]
        if takes > LONGER * took:
            found.append(f"{key}: {takes} us to issue, {took} before")
        if len(row["launches"]) > len(before["launches"]):
            found.append(f"{key}: {len(row['launches'])} launches, {len(before['launches'])} before")
    for key, form in _forms_of(record):
        for target, cost in form["costs"].items():
            had = forms[key]["costs"][target]["registers"] if key in forms else cost["registers"]
            if -(-cost["registers"] // GRANULE) > -(-had // GRANULE):
                found.append(f"{key} on {target}: {cost['registers']} registers, {had} before")
    return found


def _calls(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for network in record["networks"]:
        for row in network["calls"]:
            yield f"{network['network']}: {row['operator']}({', '.join(row['arguments'])})", row


def _forms_of(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for form in record["forms"]:
        facts = {name: form[name] for name in ("types", "constants", "aligned", "threads")}
        yield f"{form['kernel']} where {json.dumps(facts)}", form


def markdown(record: dict[str, Any]) -> str:
    """Return the report as the documentation shows it."""
    stamp = record["stamp"]
    lines = [
        f"Machine code of triton {stamp['triton']} for sm_90, torch {stamp['torch']}, commit {stamp['commit']}; "
        f"{record['label']}. A call's microseconds: to move its bytes once at {BYTES_PER_SECOND / 1e12:g} TB/s, and to "
        f"issue its instructions at {WARP_INSTRUCTIONS_PER_SECOND / 1e9:.0f} per nanosecond.",
        "",
        *goal_lines(record["goals"]),
    ]
    for network in record["networks"]:
        step = f"**{network['network']}**, batch of {network['batch']}; all operations: {network['gigabytes']} GB"
        lines += ["", step, "", *_network_lines(network["calls"])]
    return "\n".join([*lines, ""])


def _network_lines(calls: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "| operator | its map | times | launches | bytes, us | issue, us | binds |"
    yield "|---|---|---:|---:|---:|---:|---|"
    total: Counter[str] = Counter()
    for row in calls:
        numbers = {"times": 1, "launches": len(row["launches"]), "floor": row["floor_us"], "issue": row["issue_us"]}
        total.update({name: number * row["times"] for name, number in numbers.items()})
        binds = "issue" if row["issue_us"] > row["floor_us"] else "bytes"
        yield _line(f"`{row['operator']}`", row["map"], {**numbers, "times": row["times"]}, binds)
    yield _line("all", "", total, "")


def _line(operator: str, of: str, numbers: Mapping[str, float], binds: str) -> str:
    times = f"{numbers['floor']:.1f} | {numbers['issue']:.1f}"
    return f"| {operator} | {of} | {numbers['times']} | {numbers['launches']} | {times} | {binds} |"


def kept(record: dict[str, Any], path: Path, accept: bool) -> list[str]:
    """Write a record and its tables, unless something costs more than in the one that is there; return what does."""
    more = dearer(record, json.loads(path.read_text(encoding="utf-8"))) if path.exists() and not accept else []
    if more:
        return [*more, f"{path} is left as it was; to write the new figures, add --accept"]
    write_text(path, json.dumps(record, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(record))
    return []


def main(arguments: list[str] | None = None) -> int:
    """Compile, count, print the tables, and write them; returns 1 where a form breaks a rule or its budget."""
    parser = argparse.ArgumentParser(description="how long the networks' operators take at least to issue")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for issue_time.json and issue_time.md")
    parser.add_argument("--accept", action="store_true", help="write them also where something costs more than before")
    options = parser.parse_args(arguments)
    for name in kernels.OPERATORS:
        getattr(kernels, name)  # which registers it
    sources: dict[str, Source] = {}
    networks = [network_rows(name, sources) for name in STEPS]
    record = {
        "label": LABEL,
        "stamp": stamp(),
        "goals": goal_rows(networks),
        "networks": networks,
        "forms": form_rows(sources),
    }
    print(markdown(record))
    options.out.mkdir(parents=True, exist_ok=True)
    faults = faults_of(record) + kept(record, options.out / "issue_time.json", options.accept)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
