"""Read the PTX that Triton makes of a kernel into instructions that the machine runs.

Only what Triton writes is read: one kernel per text, with no memory of its own but shared memory, what each thread has
in `.local`, and tables of constants. An instruction that calls a function, or uses another variable, is refused like
any that the machine does not have.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .findings import UnsupportedInstruction

REGISTER_BYTES = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
REGISTER_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "us" for bits in (8, 16, 32, 64)}
SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
# What tells caches and the order of memory, of which the machine has none: it runs one program after the other.
CACHING = re.compile(r"\.(?:nc|ca|cg|cs|lu|cv|wb|wt|L1::\w+|L2::\w+|weak)(?=\.|$)")
ORDERING = re.compile(r"\.(?:relaxed|acquire|release|acq_rel|gpu|cta|sys|cluster|noftz)(?=\.|$)")
TRITON = "/triton/language/"  # in the paths of Triton's own library
# Whom a kernel calls, and what stands for it in the source.
CALLED = {"vprintf": "tl.device_print", "__assertfail": "tl.device_assert"}
LONGEST_TEXT = 80  # characters of an instruction in a message
TABLE = re.compile(r"^\.global\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([\d, ]+)\};", re.M)
TABLES = (1 << 12) - 1 << 44  # where the constants in global memory lie, see memory.h
CALL = re.compile(r"(?:@!?[%\w$]+\s+)?call\b")
ENDS_OF_A_STORE = ("ld", "st", "atom", "red.", "bar", "bra", "ret", "exit")
WITHOUT_EFFECT = ("createpolicy.", "bar.warp.sync", "membar", "fence.", "griddepcontrol", "prefetch")


@dataclass(frozen=True)
class Place:
    """A line of a kernel's source.

    Args:
        file: path of the source file, as Triton found it.
        line: number of the line; 0 if it is not known.
        inlined: the lines that this one was inlined at, the nearest first.
        inside: the lines of Triton's own library that were inlined here, the innermost first.
    """

    file: str = ""
    line: int = 0
    inlined: str = ""
    inside: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else "an unknown line"
        notes = [f"{word} {lines}" for word, lines in (("inside", self.inside), ("inlined at", self.inlined)) if lines]
        return f"{place} ({'; '.join(notes)})" if notes else place


@dataclass(frozen=True)
class Instruction:
    """One instruction as it stands in the text, and the lines of its source: the innermost first, then its callers."""

    text: str
    frames: tuple[tuple[str, int], ...]


@dataclass
class Kernel:
    """A kernel's code.

    Args:
        name: of the kernel.
        parameters: the size in bytes of each, and where it begins among them.
        widths: bytes of every register.
        local_bytes: of the memory that each thread has for itself.
        tables: the constants in global memory, one after the other.
        code: one line for every instruction, in the form that ``loader.h`` describes.
        instructions: the same as they stand in the text.
        files: the source files by their number.
    """

    name: str
    parameters: list[tuple[int, int]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    local_bytes: int = 0
    tables: bytes = b""
    code: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)

    def place(self, position: int) -> Place:
        """Return where the source of an instruction stands: the innermost line that is not Triton's own."""
        frames = self.instructions[position].frames
        own = next((k for k, (file, _) in enumerate(frames) if TRITON not in file), len(frames) - 1)
        if own < 0:
            return Place()
        inside, inlined = (
            ", ".join(f"{Path(file).name}:{line}" for file, line in some) for some in (frames[:own], frames[own + 1 :])
        )
        return Place(*frames[own], inlined, inside)

    def refusal(self, position: int) -> UnsupportedInstruction:
        """Return the error that refuses one of the instructions."""
        text = " ".join(self.instructions[position].text.split())
        advice = _advice(text)
        text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
        return UnsupportedInstruction(
            f"{self.name}: the virtual GPU does not run `{text}`, at {self.place(position)}; {advice}what it runs and "
            "what not is listed in docs/virtual_gpu.md"
        )


def read_ptx(text: str, source: str = "") -> Kernel:
    """Read the one kernel of a PTX text.

    Args:
        text: the PTX.
        source: path of the file that the kernel was defined in. The PTX may name another one, if Triton's cache has the
            same lines from there.
    """
    entry = re.search(r"\.entry\s+([\w$.]+)\s*\((.*?)\)(.*?)\n\{\n(.*?)\n\}", text, flags=re.DOTALL)
    if entry is None:
        raise ValueError("the PTX holds no kernel: no .entry was found")
    name, parameters, _, body = entry.groups()
    kernel = Kernel(name)
    named = {int(number): path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    first = re.search(r"\.loc\s+(\d+)", body)  # it names the kernel's own file, under whatever name it was compiled
    own = named.get(int(first[1])) if first and source else None
    kernel.files = {number: source if path == own else path for number, path in named.items()}
    paths = {Path(path).name: kernel.files[number] for number, path in named.items()}
    tables = {}
    for align, table, size, values in re.findall(TABLE, text):
        start = -(-len(kernel.tables) // int(align)) * int(align)
        tables[table] = TABLES + start
        content = bytes(map(int, values.split(",")))
        kernel.tables = kernel.tables.ljust(start, b"\0") + content.ljust(int(size), b"\0")
    return _Reader(kernel, parameters, body, tables, paths).read()


class _Reader:
    """Reads the body of a kernel: registers get numbers, labels the positions that they stand for."""

    def __init__(
        self, kernel: Kernel, parameters: str, body: str, tables: dict[str, int], paths: dict[str, str]
    ) -> None:
        self.kernel = kernel
        self.paths = paths  # by the names that comments have
        self.body = body
        self.registers: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.parameters: dict[str, int] = {}
        self.places: dict[tuple[str, ...], tuple[tuple[str, int], ...]] = {}  # by file, line and column
        self.variables = tables  # and where they lie
        self.locations: list[str] = []  # file, line and column of each instruction, and where it was inlined
        self._read_parameters(parameters)

    def read(self) -> Kernel:
        statements = list(self._statements())
        call = next((k for k, statement in enumerate(statements) if CALL.match(statement)), None)
        if call is not None:  # what passes its arguments stands before it, and says less
            raise self.kernel.refusal(call)
        stores = self._stores(statements)
        for position, statement in enumerate(statements):
            store = f" ={stores[position]}" if position in stores else ""
            self.kernel.code.append(self._assembled(statement) + store)
        return self.kernel

    def _stores(self, statements: list[str]) -> dict[int, int]:
        """Return the first position of the instructions that one store of the source became, where it became several.

        They have one line and column, and none between them branches or does anything else to memory.
        """
        runs: list[list[int]] = []
        location = None
        targets = set(self.labels.values())
        for position, statement in enumerate(statements):
            name = statement.split(maxsplit=1)[-1] if statement.startswith("@") else statement
            if name.startswith("st.global"):
                if position in targets or self.locations[position] != location:
                    runs.append([])
                location = self.locations[position]
                runs[-1].append(position)
            elif position in targets or (name.startswith(ENDS_OF_A_STORE) and not name.startswith("ld.param")):
                location = None
        return {position: run[0] for run in runs if len(run) > 1 for position in run}

    def _read_parameters(self, text: str) -> None:
        end = 0
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", " ".join(text.split())):
            size = REGISTER_BYTES[kind]
            start = -(-end // size) * size
            self.parameters[name] = start
            self.kernel.parameters.append((size, start))
            end = start + size

    def _statements(self) -> Iterator[str]:
        """Yield the text of each instruction; take note of places, registers and labels on the way."""
        frames: tuple[tuple[str, int], ...] = ()
        pending, location, inside_asm = "", "", False
        for raw in self.body.split("\n"):
            code, _, comment = raw.partition("//")
            code = code.strip()
            inside_asm = (inside_asm or "begin inline asm" in comment) and "end inline asm" not in comment
            if re.match(r"\.loc\s", code):
                # Line 0 says nothing, and LLVM counts the lines of inline assembly as if they stood in the source: such
                # code belongs to what stands before it.
                if not inside_asm and (latter := self._frames(code, comment))[0][1]:
                    frames, location = latter, raw.strip()
                continue
            pending = f"{pending} {code}".strip()
            *complete, pending = pending.split(";")
            for part in complete:
                if statement := self._after_declarations(part):
                    self.kernel.instructions.append(Instruction(statement, frames))
                    self.locations.append(location)
                    yield statement
            pending = self._after_declarations(pending)

    def _frames(self, code: str, comment: str) -> tuple[tuple[str, int], ...]:
        """Return the line that a .loc names, and those that it was inlined at.

        An older LLVM names the latter in a comment, "@[ a.py:3:4 @[ b.py:5:6 ] ]"; a newer one names the nearest, and a
        .loc before tells where that was inlined.
        """
        file, line, column, *inlined_at = re.findall(r"(?<![\w$])\d+", code)
        own = (self.kernel.files.get(int(file), "?"), int(line))
        callers = [(self.paths.get(name, name), int(line)) for name, line in re.findall(r"@\[ ([^:]+):(\d+)", comment)]
        if inlined_at:
            number, outer, _ = map(int, inlined_at)
            nearest = (self.kernel.files.get(number, "?"), outer)
            callers = list(self.places.get(tuple(inlined_at), (nearest,)))
        frames = self.places[file, line, column] = (own, *callers)
        return frames

    def _after_declarations(self, text: str) -> str:
        """Return what is left of a text after its labels, the braces of scopes, and its declared registers."""
        while True:
            text = text.strip()
            if text[:1] in ("{", "}"):
                text = text[1:]
            elif found := re.match(r"([\w$]+):(?!:)", text):
                self.labels[found[1]] = len(self.kernel.instructions)
                text = text[found.end() :]
            elif found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
                self._declare(found[1], found[2])
                return ""
            elif found := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text):
                start = -(-self.kernel.local_bytes // int(found[1])) * int(found[1])
                self.variables[found[2]] = start
                self.kernel.local_bytes = start + int(found[3])
                return ""
            elif text.startswith((".pragma", ".param")) or re.match(r"\.loc\s", text):
                return ""
            else:
                return text

    def _declare(self, kind: str, names: str) -> None:
        if kind not in REGISTER_BYTES:
            raise UnsupportedInstruction(f"{self.kernel.name}: the virtual GPU has no registers of type .{kind}")
        for name in names.split(","):
            found = re.fullmatch(r"\s*([%\w$]+)\s*(?:<(\d+)>)?\s*", name)
            assert found, name
            every = [f"{found[1]}{k}" for k in range(int(found[2]))] if found[2] else [found[1]]
            for register in every:
                self.registers[register] = len(self.kernel.widths)
                self.kernel.widths.append(REGISTER_BYTES[kind])

    def _assembled(self, statement: str) -> str:
        position = len(self.kernel.code)
        found = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement, flags=re.DOTALL)
        if found is None:
            raise self.kernel.refusal(position)
        negated, predicate, name, rest = found.groups()
        guard = f"{negated}{self.registers[predicate]}" if predicate else "-"
        try:
            name, outputs, inputs = self._normal_form(name, _split(rest))
        except (KeyError, ValueError, IndexError) as error:
            raise self.kernel.refusal(position) from error
        return " ".join([name, guard, *outputs, "<", *inputs])

    def _normal_form(self, name: str, operands: list[str]) -> tuple[str, list[str], list[str]]:
        """Return an instruction's name without what has no effect here, its outputs and its inputs."""
        first = name.split(".")[0]
        if name.startswith(WITHOUT_EFFECT):
            return "nop", [], []
        if first in ("bra", "ret", "exit"):
            return ("bra", [], [f">{self.labels[operands[0]]}"]) if first == "bra" else ("ret", [], [])
        if name in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
            if operands != ["0"]:  # others are for some of the warps
                raise ValueError(operands)
            return "bar.sync", [], []
        if first in ("ld", "st", "ldmatrix", "stmatrix", "atom", "red"):
            return self._memory_form(name, operands)
        if name.startswith(("cvta.local", "cvta.to.local", "cvta.global", "cvta.to.global")):  # the same addresses here
            return "mov.b64", self._all(operands[:1]), self._all(operands[1:])
        if first == "mov":
            return self._move_form(name, operands)
        if first == "shfl":
            value, _, inside = operands[0].partition("|")
            return name, [self._operand(value), self._operand(inside or "_")], self._all(operands[1:])
        return name, self._all(operands[:1]), self._all(operands[1:])

    def _memory_form(self, name: str, operands: list[str]) -> tuple[str, list[str], list[str]]:
        hinted = "L2::cache_hint" in name
        name = CACHING.sub("", name).replace("shared::cta", "shared")
        first = name.split(".")[0]
        of_program = []
        if first in ("atom", "red"):
            of_program = ["~"] if {"cta", "cluster"} & set(name.split(".")) else []
            name = ORDERING.sub("", name)
        if hinted:
            operands = operands[:-1]
        outputs = [] if first in ("st", "stmatrix", "red") else _elements(operands.pop(0))
        address = self._address(operands[0])
        values = [value for operand in operands[1:] for value in _elements(operand)]
        return name, self._all(outputs), [*address, *self._all(values), *of_program]

    def _move_form(self, name: str, operands: list[str]) -> tuple[str, list[str], list[str]]:
        target, source = operands
        bits = f"b{re.sub(r'[^0-9]', '', name)}"
        if source.startswith("{"):
            parts = _elements(source)
            return f"pack.{len(parts)}.{bits}", self._all([target]), self._all(parts)
        if target.startswith("{"):
            parts = _elements(target)
            return f"unpack.{len(parts)}.{bits}", self._all(parts), self._all([source])
        if SPECIAL.fullmatch(source):
            return f"special.{source}", self._all([target]), []
        return name, self._all([target]), self._all([source])

    def _address(self, text: str) -> list[str]:
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if found is None:
            raise ValueError(text)
        base, offset = found[1], int(found[2] or 0)
        return [self._operand(base), f"@{offset}"]

    def _all(self, operands: list[str]) -> list[str]:
        return [self._operand(operand) for operand in operands]

    def _operand(self, text: str) -> str:
        if text == "_":
            return "_"
        if text in self.registers:
            return str(self.registers[text])
        if text.startswith(("0f", "0d")):  # the bits of a float
            return f"#{text[2:]}"
        if found := re.fullmatch(r"global_smem(?:\+(\d+))?", text):  # all of shared memory, which begins at 0
            return f"#{int(found[1] or 0):x}"
        if text in self.variables:
            return f"#{self.variables[text]:x}"
        if text in self.parameters:  # its place among them, from which `ld.param` reads
            return f"#{self.parameters[text]:x}"
        value = {"true": 1, "false": 0}.get(text)
        number = int(text.removesuffix("U"), 0) if value is None else value
        return f"#{struct.unpack('<Q', struct.pack('<q' if number < 0 else '<Q', number))[0]:x}"


def _advice(text: str) -> str:
    """Return what to do about a refused call; nothing for other instructions."""
    if not CALL.match(text):
        return ""
    name = next((name for called, name in CALLED.items() if called in text), None)
    if name:
        return f"leave {name} out there; "
    return (
        "it calls a function: noinline=True or tl.device_assert; let functions be inlined, without noinline=True, and "
        "leave tl.device_assert out there; "
    )


def _split(text: str) -> list[str]:
    """Split operands at the commas that stand outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def _elements(operand: str) -> list[str]:
    """Return the registers of a vector, or the operand itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
