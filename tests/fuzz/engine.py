"""Files are damaged, and read: whoever reads must return, or say in an error of its own which file is at fault.

A reader runs in a forked process, which may die; it has a limit of time and of memory for every input.
"""

from __future__ import annotations

import mmap
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from mutators import damaged

from trifuse.kernels.errors import TrifuseError

LONGEST_S = 10.0  # of processor time for one input
WAITS = 5  # so much longer it may take on a machine with other work
MOST_MEMORY = 400 << 20  # bytes that one small file may cost
_PREFIX = "trifuse-fuzz-"
_GIVEN_UP_S = 60.0  # the process hangs outside of Python


@dataclass(frozen=True)
class Target:
    """A reader, and the file that it reads.

    Attributes:
        name: of the target.
        form: what the file is, see `mutators.FORMS`.
        file: where it lies below the target's folder.
        prepare: makes the folder around it, and returns sound contents.
        read: is given the file's path.
        is_command: whether `read` returns a command's exit code.
    """

    name: str
    form: str
    file: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    is_command: bool = False


@dataclass
class Find:
    """What a reader did that it must not do.

    Attributes:
        what: the kind of fault and where it is raised; finds of the same kind have the same.
        content: the shortest file that did it.
        count: of the inputs that did.
    """

    what: str
    content: bytes
    count: int = 1


@dataclass
class Result:
    """What came of some inputs: how many there were, how many were refused, and the finds."""

    inputs: int = 0
    refused: int = 0
    finds: dict[str, Find] = field(default_factory=dict)


class TooLong(BaseException):
    """An input has taken longer than it may."""


def verdict(target: Target, path: Path) -> tuple[str | None, str]:
    """Read a file; return what is wrong with how it is taken, if anything, and the words that it was refused with."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        with _limited_time():
            code = target.read(path)
        if target.is_command and code not in (None, 0, 2, 3, 4, 5, 75):
            return f"exit code {code}", said
    except SystemExit as stop:
        return None if stop.code in (0, 2) else f"exit code {stop.code}", "usage"
    except TrifuseError as error:
        said = f"{type(error).__name__}: {error}"
        if target.is_command:
            return f"uncaught {_place(error)}", said
        if path.name not in said and not any(part in said for part in path.parts if part.startswith(_PREFIX)):
            return f"names no file, {_place(error)}", said
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
        if target.is_command or error.filename is None:
            return _place(error), said
    except TooLong as error:
        return f"too long, {_place(error)}", said
    except Exception as error:
        return _place(error), said
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return (f"memory: {grown >> 20} MiB"[:9] if grown > MOST_MEMORY else None), said


def fuzz(target: Target, inputs: int, seed: int, seconds: float = float("inf")) -> Result:
    """Read that many damaged files, or as many as the time allows; the same ones for the same seed and code."""
    result, begun_s = Result(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_quick_disk()) as folder:
        while result.inputs < inputs and time.monotonic() - begun_s < seconds:
            left_s = seconds - (time.monotonic() - begun_s)
            _in_a_process(target, Path(folder), result, inputs, seed, left_s)
    return result


def replay(target: Target, content: bytes) -> str | None:
    """Return what is wrong with how one file is taken."""
    return with_file(target, lambda path: path.write_bytes(content))


def with_file(target: Target, make: Callable[[Path], object]) -> str | None:
    """Return what is wrong with how something is taken that ``make`` puts where the file should be."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_quick_disk()) as folder:
        path = _place_of(target, Path(folder))[0]
        make(path)
        with _quiet():
            return verdict(target, path)[0]


def minimised(target: Target, find: Find, tries: int = 400) -> bytes:
    """Return a shorter file with the same verdict, by leaving out pieces."""
    content = find.content
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_quick_disk()) as folder:
        path = _place_of(target, Path(folder))[0]
        size, at = max(len(content) // 2, 1), 0
        while size and tries:
            shorter, tries = content[:at] + content[at + size :], tries - 1
            path.write_bytes(shorter)
            with _quiet():
                same = at < len(content) and verdict(target, path)[0] == find.what
            content, at = (shorter, at) if same else (content, at + size)
            if at >= len(content):
                size, at = size // 2, 0
    return content


def _in_a_process(target: Target, folder: Path, result: Result, inputs: int, seed: int, seconds: float) -> None:
    """Go on where a result stands, in a process that may die, and add to it."""
    position = mmap.mmap(-1, 8)  # shared with the child
    position[:] = result.inputs.to_bytes(8, "little")
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receiving)
            found = _read_all(target, folder, position, result.inputs, inputs, seed, seconds)
            with os.fdopen(sending, "wb") as pipe:
                pickle.dump(found, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(sending)
    killed = _wait(child, position, receiving, result)
    if killed is not None:  # what it had found before is lost, and found again by whoever repeats it
        done = int.from_bytes(position[:], "little")
        path = folder / target.file
        result.finds[killed] = Find(killed, path.read_bytes() if path.is_file() else b"")
        result.inputs = done + 1


def _wait(child: int, position: mmap.mmap, receiving: int, result: Result) -> str | None:
    """Wait for a child and take over what it sends; return how it died, None if it did not."""
    before, since_s = position[:], time.monotonic()
    with os.fdopen(receiving, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        sent = b""
        while True:
            sent += pipe.read() or b""
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                sent += pipe.read() or b""
                break
            if position[:] != before:
                before, since_s = position[:], time.monotonic()
            elif time.monotonic() - since_s > _GIVEN_UP_S:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code:
        sys.exit("the fuzzer itself failed, see above")
    found: Result = pickle.loads(sent)
    result.inputs, result.refused = found.inputs, result.refused + found.refused
    for what, find in found.finds.items():
        result.finds.setdefault(what, find)
    return None


def _read_all(
    target: Target, folder: Path, position: mmap.mmap, done: int, inputs: int, seed: int, seconds: float
) -> Result:
    """Damage and read: a file that is refused in words that are new joins those that are damaged further."""
    path, pool = _place_of(target, folder)
    seeds, heard, result, end_s = list(pool), set[str](), Result(done), time.monotonic() + seconds
    with _quiet():
        for content in seeds:
            path.write_bytes(content)
            target.read(path)  # what is sound is taken, and what is read first is imported
        draw = Random(f"{target.name} {seed} {done}")
        while result.inputs < inputs and time.monotonic() < end_s:
            content = damaged(draw.choice(seeds if draw.random() < 0.5 else pool), target.form, draw, seeds)
            position[:] = result.inputs.to_bytes(8, "little")
            path.write_bytes(content)
            what, said = verdict(target, path)
            result.inputs += 1
            result.refused += bool(said)
            if what is not None:
                find = result.finds.setdefault(what, Find(what, content, 0))
                find.count += 1
                find.content = min(find.content, content, key=len)
            words = re.sub(r"[0-9]+|'[^']*'|\"[^\"]*\"|/\S+", "", said)[:120]
            if words not in heard and len(pool) < 300 and len(content) < 4 * len(seeds[0]) + 4096:
                heard.add(words)
                pool.append(content)
    return result


def _place_of(target: Target, folder: Path) -> tuple[Path, list[bytes]]:
    """Prepare a folder; return where the damaged file is to lie, and sound contents for it."""
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "pipe").exists():  # what a name in a file may lead to
        os.mkfifo(folder / "pipe")
        os.symlink("loop", folder / "loop")
    return path, target.prepare(folder)


def _place(error: BaseException) -> str:
    """Name an error by its type and the line of the library that it came through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "trifuse" in frame.filename]
    frames = [frame for frame in frames if f"{os.sep}fuzz{os.sep}engine" not in frame.filename]
    at = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(at.filename).name}, {at.name}"


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S * WAITS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing be printed or warned of."""
    out, err = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


def _quick_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
