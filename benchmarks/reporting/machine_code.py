"""NVIDIA's machine code as text, its loops, and how many of its instructions a warp executes.

The code that ptxas makes is not run here. What is run is the PTX that it was made from (`trifuse.kernels.testing`), and
the rounds of its loops are carried over: a loop of the machine code is the loop of the PTX in the same place, and where
it was unrolled, one round of it does as many rounds of the other as it has more of what ptxas neither adds nor removes:
accesses to memory, exponentials and the like. What a branch forward may skip counts as executed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trifuse.kernels.testing.emulator.executed import Executed

# What ptxas keeps, the surest first: how it begins in PTX, and in machine code.
KEPT = (
    (r"ld\.global", r"LDG"),
    (r"st\.global", r"STG"),
    (r"ex2|lg2|sin|cos|tanh", r"MUFU\.(?:EX2|LG2|SIN|COS|TANH)"),
    (r"shfl", r"SHFL"),
    (r"bar\.sync", r"BAR\.SYNC"),
    (r"ld\.shared", r"LDS"),
    (r"st\.shared", r"STS"),
    (r"fma|mul\.f|add\.f|mul\.rn|add\.rn", r"FFMA|FMUL|FADD"),
)
ARITHMETIC = len(KEPT) - 1
TARGET = re.compile(r"\.L_x_\d+")


@dataclass
class Loop:
    """A loop.

    Args:
        first: position of its first instruction.
        last: of its last one.
        inner: the loops right inside it.
        kept: how many of its own instructions are of which kind that ptxas keeps, by the place in `KEPT`.
    """

    first: int
    last: int
    inner: list[Loop] = field(default_factory=list)
    kept: Counter[int] = field(default_factory=Counter)

    def own(self) -> Iterable[int]:
        """Yield the positions of its instructions that are in no inner loop."""
        inside = {k for loop in self.inner for k in range(loop.first, loop.last + 1)}
        return (k for k in range(self.first, self.last + 1) if k not in inside)


def instructions_of(cubin: bytes) -> tuple[list[str], dict[int, int]]:
    """Return the instructions of a kernel's machine code without padding, and where each branch among them leads."""
    from trifuse.kernels.gpu.triton_internals import NVIDIA_TOOLS

    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        command = [str(NVIDIA_TOOLS / "nvdisasm"), "-c", "-ndf", stream.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(rf"({TARGET.pattern}):", line):
            labels[label[1]] = len(found)
        elif (code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)) and opcode(code[1]) != "NOP":
            found.append(code[1])
    branches = {
        k: labels[target[0]]
        for k, code in enumerate(found)
        if opcode(code).startswith("BRA") and (target := TARGET.search(code))
    }
    return found, branches


def opcode(instruction: str) -> str:
    """Return the name of an instruction of machine code or PTX, without what it is guarded by."""
    return re.sub(r"^\{?\s*(?:@!?U?%?\w+\s+)?", "", instruction).split()[0]


def loops_of(branches: dict[int, int]) -> list[Loop]:
    """Return the loops that backward branches make, nested; a branch to itself ends a program and is none."""
    loops: dict[int, Loop] = {}
    for last, first in sorted(branches.items()):
        if first < last:
            loops[first] = Loop(first, last)  # of branches back to one place, the last one closes the loop
    outermost: list[Loop] = []
    for loop in sorted(loops.values(), key=lambda loop: (loop.first, -loop.last)):
        level = outermost
        while level and level[-1].last >= loop.last:
            level = level[-1].inner
        level.append(loop)
    return outermost


def executed_instructions(launch: Executed) -> tuple[list[str], list[float]]:
    """Return the instructions of a launch's machine code, and how often a warp executes each, on average.

    Raises:
        ValueError: the loops of the machine code are not found again in the PTX.
    """
    code, branches = instructions_of(launch.cubin)
    ptx = [instruction.text for instruction in launch.kernel.instructions]
    targets = {k: int(line.rsplit(">", 1)[1]) for k, line in enumerate(launch.kernel.code) if line.startswith("bra")}
    counts = [1.0] * len(code)
    try:
        _count(loops_of(branches), loops_of(targets), code, ptx, launch.counts, counts)
    except ValueError as error:
        raise ValueError(f"{launch.kernel.name}: {error}") from None
    return code, counts


def _count(
    loops: Sequence[Loop], models: Sequence[Loop], code: list[str], ptx: list[str], rounds: Sequence[float],
    counts: list[float],
) -> None:  # fmt: skip
    """Set how often the instructions of some loops are executed, after the loops of the PTX in the same place."""
    for loop in loops:
        loop.kept = _kept(loop, code, 1)
    for model in models:
        model.kept = _kept(model, ptx, 0)
    for model, group in zip(models, _matched(loops, models), strict=True):
        left = rounds[model.first]
        order = sorted(group, key=lambda k: -group[k])  # what was unrolled most comes first, another does the rest
        for k in order:
            times = left / group[k] if k == order[-1] else left // group[k]
            left -= times * group[k]
            for position in range(loops[k].first, loops[k].last + 1):
                counts[position] = times
            _count(loops[k].inner, model.inner, code, ptx, rounds, counts)


def _kept(loop: Loop, code: Sequence[str], side: int) -> Counter[int]:
    """Count what ptxas keeps, by its place in `KEPT`, in a loop without the loops inside it."""
    names = [opcode(code[k]) for k in loop.own()]
    counts = {kind: sum(bool(re.match(pair[side], name)) for name in names) for kind, pair in enumerate(KEPT)}
    return Counter({kind: n for kind, n in counts.items() if n})


def _matched(loops: Sequence[Loop], models: Sequence[Loop]) -> list[dict[int, int]]:
    """Return for each loop of the PTX, in order, those of the machine code that it became, and how often unrolled.

    One that became none was unrolled whole.
    """
    best: list[dict[int, int]] | None = None
    for groups in _splits(len(loops), len(models)):
        found = [{k: _unrolled(loops[k], model) for k in group} for group, model in zip(groups, models, strict=True)]
        if all(n for group in found for n in group.values()) and (best is None or _empty(found) < _empty(best)):
            best = found
    if best is None:
        raise ValueError(f"expected loops like those of the PTX, {models}, got {loops}")
    return best


def _empty(groups: Sequence[dict[int, int]]) -> int:
    return sum(not group for group in groups)


def _splits(loops: int, models: int) -> Iterable[list[range]]:
    """Yield every way to give consecutive loops to models in order."""
    if models == 0:
        if loops == 0:
            yield []
        return
    for taken in range(loops + 1):
        for rest in _splits(loops - taken, models - 1):
            yield [range(taken), *(range(r.start + taken, r.stop + taken) for r in rest)]


def _unrolled(loop: Loop, model: Loop) -> int:
    """Return how many rounds of a loop of the PTX one round of a loop of the machine code does; 0 if that is not clear.

    What ptxas moved out of a loop leaves less of a kind, or a broken part, so that the most of the kinds tells; an
    inner loop that it unrolled whole leaves more of some, so that the least tells. It writes arithmetic in its own way,
    which tells only where nothing else does.
    """
    times = {kind: divmod(loop.kept[kind], count) for kind, count in model.kept.items()}
    whole = {kind: quotient for kind, (quotient, rest) in times.items() if quotient and not rest}
    sure = [quotient for kind, quotient in whole.items() if kind != ARITHMETIC] or list(whole.values())
    if not model.kept:
        return 1
    return (min if len(loop.inner) < len(model.inner) else max)(sure, default=0)
