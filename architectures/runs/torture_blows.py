"""What can happen to a run, and how it may end then.

Each kind of blow is a function of a `Victim` and a source of chance that starts the run, or lets it go on, does
something to it, waits for its end, and says what it was.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Self

from .torture_session import Alone, Ranks, Session, Start, Trap, accesses_in, handles, left_after

INTERRUPTED = 75
REFUSALS = (2, 3, 4, 5)  # the documented codes of an error
_FULL_DISK = (3, 4, 5)
_JOB_ENDS_S = 60.0
_TRACEBACK = "Traceback (most recent call last)"
_SAVE_FAILED = "could not be saved"
_BEST_LOST = f"best {_SAVE_FAILED}"


@dataclass
class Victim:
    """A run to which things happen.

    Attributes:
        folder: of the run, absolute.
        cohort: what it trains on.
        words: of its command, after ``trifuse``.
        seconds: how long it takes where nothing happens.
        accesses: to its files meanwhile.
        epochs: that it trains.
        texts: what its processes have printed, one by one.
        start: starts the run alone; that of `Alone`, unless a test puts something else there.
        running: the process that was started last.
    """

    folder: Path
    cohort: Path
    words: Sequence[str]
    seconds: float
    accesses: int
    epochs: int
    texts: list[str]
    start: Start = Alone
    running: Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.running is not None:
            self.running.kill()

    def begin(self, trap: Trap | None = None) -> Session:
        """Start the run, or let it go on where there is one."""
        self.running = self.start(self._words(), trap or Trap(str(self.folder)))
        return self.running

    def begin_ranks(self) -> Ranks:
        """Do so as two ranks."""
        self.running = ranks = Ranks(self._words())
        return ranks

    def _words(self) -> list[str]:
        return [*self.words, "--resume"] if self.texts else [*self.words]

    def end(self, session: Session, longest_s: float | None = None) -> int | None:
        """Wait for a process, keep what it printed, and return its exit code; None if it hung."""
        code = session.wait() if longest_s is None else session.wait(longest_s)
        self.texts.append(session.text())
        return code

    def left(self) -> float:
        """Return about which share of the run is still to be done."""
        log = self.folder / "log.csv"
        done = max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0
        return 1 - 0.8 * done / self.epochs

    @property
    def best_was_lost(self) -> bool:
        """Whether a full disk kept the run from saving a best epoch."""
        return any(_BEST_LOST in text for text in self.texts)


@dataclass(frozen=True)
class Blow:
    """What happened to a run.

    Attributes:
        kind: the name in `KINDS`.
        what: it was, and when.
        code: with which the process ended, minus the signal; None if it hung.
        end: how it ended, in words.
        landed: whether anything happened before the run was over.
        problem: what should not be; empty where all is as documented.
    """

    kind: str
    what: str
    code: int | None
    end: str
    landed: bool = True
    problem: str = ""

    @property
    def ending(self) -> str:
        """How the process ended, and whether that was before anything happened to it."""
        return self.end if self.landed else f"{self.end} before that"


def kill_at_any_time(victim: Victim, chance: Random) -> Blow:
    """Kill the process at any moment."""
    after_s = chance.uniform(0, victim.seconds * victim.left())
    session = victim.begin()
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.kill(session.pid, signal.SIGKILL)
    return _blow("kill", f"SIGKILL after {after_s:.2f} s", victim.end(session), victim, {-signal.SIGKILL})


def kill_in_a_write(victim: Victim, chance: Random) -> Blow:
    """Kill the process between two accesses to its files, or in the middle of writing one."""
    access = chance.randint(1, max(1, int(victim.accesses * victim.left())))
    if chance.random() < 0.5:
        session = victim.begin(Trap(str(victim.folder), access))
        return _blow("write", f"SIGKILL before access {access}", victim.end(session), victim, {-signal.SIGKILL})
    size = _size(chance)
    session = victim.begin(Trap(str(victim.folder), access, "cut", size))
    what = f"killed at byte {size} of a file, from access {access} on"
    return _blow("write", what, victim.end(session), victim, {-signal.SIGXFSZ})


def fill_the_disk(victim: Victim, chance: Random) -> Blow:
    """Let files not grow any more, for a while or until the process ends."""
    access = chance.randint(1, max(1, int(victim.accesses * victim.left())))
    size, lasts = _size(chance), chance.choice((0, 0, 10, 40))
    session = victim.begin(Trap(str(victim.folder), access, "full", size, lasts))
    until = f"for {lasts} accesses" if lasts else "for good"
    what = f"no file beyond {size} bytes from access {access} on, {until}"
    return _blow("disk", what, victim.end(session), victim, set(_FULL_DISK), quiet=True)


def _size(chance: Random) -> int:
    """Draw how large a file may become: configurations have hundreds of bytes, weights ten thousands."""
    return int(10 ** chance.uniform(1.5, 4.8))


def send_a_signal(victim: Victim, chance: Random) -> Blow:
    """Ask the process to stop, once or twice."""
    number = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    times = chance.choice((1, 1, 2))
    after_s = chance.uniform(0, victim.seconds * victim.left())
    session = victim.begin()
    time.sleep(after_s)
    trains = handles(session.pid, signal.SIGUSR1)  # only training does
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.kill(session.pid, number)
        time.sleep(0.02)
    code = victim.end(session)
    at_once = {-number}
    if number == signal.SIGINT:  # with 1, Python itself ends: before the command begins, and at a second one
        began = accesses_in(victim.texts[-1]) > 0
        at_once = {130} if began and times == 1 else {130, 1}
    allowed = {INTERRUPTED} if trains else at_once
    if times == 2 or victim.left() < 0.21:  # the second one ends it at once; training may have ended meanwhile
        allowed |= {-number, INTERRUPTED} | at_once
    doing = "while it trains" if trains else "before or after it trains"
    what = f"{number.name}{' twice' if times == 2 else ''} after {after_s:.2f} s, {doing}"
    return _blow("signal", what, code, victim, allowed, quiet=number != signal.SIGINT)


def flip_a_bit(victim: Victim, chance: Random) -> Blow:
    """Flip one bit of a file while the run is at rest; a file that is refused is restored afterwards."""
    group, path = _file_to_damage(victim, chance)
    name = path.relative_to(victim.cohort if group == "data" else victim.folder).as_posix()
    whole = path.read_bytes()
    place, bit = chance.randrange(len(whole)), chance.randrange(8)
    damaged = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
    path.write_bytes(damaged)
    what = f"bit {bit} of byte {place} of {name}"
    try:
        code = victim.end(victim.begin())
        text = victim.texts[-1]
        named = path.name in text or (group == "checkpoint" and f"{path.parent.name}/" in text)
        untouched = path.exists() and path.read_bytes() == damaged
        if code == 0:
            if untouched:
                path.write_bytes(whole)
            end = "never read" if untouched else "made good"
            return Blow("flip", what, code, f"named, and {end}" if named else end)
        if code not in REFUSALS or _TRACEBACK in text:
            return Blow("flip", what, code, _ended(code), problem=f"{_ended(code)}: {_last_line(text)}")
        if not named:
            return Blow("flip", what, code, _ended(code), problem=f"the file is not named: {_last_line(text)}")
        if not untouched:
            return Blow(
                "flip", what, code, _ended(code), problem="the damaged file was changed by a run that refused it"
            )
        path.write_bytes(whole)
        return Blow("flip", what, code, f"refused with code {code}, and restored")
    finally:
        if group == "data":
            path.write_bytes(whole)


def _file_to_damage(victim: Victim, chance: Random) -> tuple[str, Path]:
    groups: Mapping[str, Sequence[Path]] = {
        "checkpoint": [path for name in ("last", "best") for path in (victim.folder / name).glob("*")],
        "record": [*victim.folder.glob("*.json")],
        "cache": [*victim.folder.glob("cache/[!.]*")],
        "data": [path for path in victim.cohort.rglob("*.nii.gz") if "scar" not in path.name],
    }
    names = [name for name, paths in groups.items() if paths]
    group = chance.choice(["checkpoint", *names] if "checkpoint" in names else names)
    return group, chance.choice(sorted(path for path in groups[group] if path.stat().st_size))


def lose_a_rank(victim: Victim, chance: Random) -> Blow:
    """Kill one of two ranks: the whole job must end within a minute, and leave no process behind."""
    after_s, which = chance.uniform(0.3, 1) * victim.seconds, chance.randrange(2)
    session = victim.begin_ranks()
    time.sleep(after_s)
    ranks = session.ranks()
    lost = ranks[which : which + 1]
    for process in lost:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    started_s = time.monotonic()
    code = victim.end(session, _JOB_ENDS_S if lost else None)
    what = f"rank {which} killed after {after_s:.2f} s"
    if code == 0 or not lost:
        return Blow("rank", what, code, _ended(code), landed=False, problem="" if code == 0 else _ended(code))
    took = f"{_ended(code)}, the job {time.monotonic() - started_s:.0f} s later"
    problem = f"it did not end within {_JOB_ENDS_S:.0f} s" if code is None else ""
    if left := left_after(ranks):
        problem = f"processes are left behind: {len(left)}"
    return Blow("rank", what, code, took, problem=problem)


KINDS: dict[str, Callable[[Victim, Random], Blow]] = {
    "kill": kill_at_any_time,
    "write": kill_in_a_write,
    "disk": fill_the_disk,
    "signal": send_a_signal,
    "flip": flip_a_bit,
    "rank": lose_a_rank,
}


def _blow(kind: str, what: str, code: int | None, victim: Victim, allowed: set[int], *, quiet: bool = False) -> Blow:
    """Judge the end of a process: one of the codes that are allowed, or that of a run that was over before."""
    text = victim.texts[-1]
    problem = "" if code == 0 or code in allowed else f"{_ended(code)}: {_last_line(text)}"
    if quiet and not problem and _TRACEBACK in text:
        problem = f"a traceback: {_last_line(text)}"
    if code == 0 and _SAVE_FAILED in text:
        return Blow(kind, what, code, "finished, after a save that failed")
    return Blow(kind, what, code, _ended(code), landed=code != 0, problem=problem)


def _ended(code: int | None) -> str:
    if code is None:
        return "hung"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return "finished" if code == 0 else f"exit code {code}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")[:300]
