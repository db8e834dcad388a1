"""Runs to which things happen until they are over, and which must then be what an undisturbed run is."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from trifuse.architectures.storage.atomic_files import sha256_of
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.record import digest_of
from trifuse.architectures.storage.text import listed
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import TrifuseError

from .experiment import Experiment
from .registry import experiment, experiments
from .torture_blows import KINDS, Blow, Victim
from .torture_session import Alone, Start, accesses_in

FAILED_FOLDER = "failed"  # with a folder for each round that did not end well
_RANK_ROUND_EVERY = 5
_MOST_BLOWS = 4  # in a round
_MOST_NAMED = 4
LAST_WEIGHTS = ("last/model.safetensors", "last/training_state.safetensors", "log.csv")
_OF_THE_LOG = {"log.json", "results.json"}  # which have its digest, and it tells seconds
_OF_THE_TIME = {".lock", "sessions.jsonl", "report.md", *_OF_THE_LOG}
_PREPARED = re.compile(r"cache/\w+\.(npy|safetensors)")  # one more may be from when another case was damaged
_OF_THE_WAY = {"last.old", "best.old"}  # the checkpoint before the newest one: after a resume, another one


@dataclass(frozen=True)
class Round:
    """A run, what happened to it, and how it ended.

    Attributes:
        number: counted from 1.
        ranks: processes that trained.
        blows: in order.
        problem: what should not be; empty if the run is equal to the undisturbed one.
        seconds: that it took.
    """

    number: int
    ranks: int
    blows: tuple[Blow, ...]
    problem: str
    seconds: float


@dataclass
class Torture:
    """All that was done.

    Attributes:
        network, words: what was trained, and how: the words of its command, without files.
        seed: of chance.
        started: date and time.
        seconds: that it took.
        rounds: one after the other.
    """

    network: str
    words: Sequence[str]
    seed: int
    started: str
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def blows(self) -> list[Blow]:
        """All blows that landed."""
        return [blow for one in self.rounds for blow in one.blows if blow.landed]

    @property
    def failures(self) -> list[Round]:
        """The rounds that did not end well."""
        return [one for one in self.rounds if one.problem]


def torture(
    out: Path,
    network: str,
    *,
    kills: int = 20,
    minutes: float = 0.0,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    say: Callable[[str], None] = print,
    keep: Callable[[Torture], object] = lambda done: None,
    start: Start = Alone,
) -> Torture:
    """Torture runs of a network on a phantom until enough has happened to them and enough time has passed.

    Args:
        out: a new or empty folder.
        network: one whose `Experiment` has ``quick``.
        kills: how many blows must land, at least.
        minutes: how long it goes on, at least.
        seed: decides what happens; the machine's speed decides where it strikes.
        kinds: of blows, from `KINDS`.
        say: prints a line.
        keep: is called after each round.
        start: see `Victim`.

    Raises:
        OutputFolderError: the folder holds something.
        TrifuseError: the run fails even where nothing happens to it.
    """
    if out.exists() and any(out.iterdir()):
        raise OutputFolderError(f"{out} is not empty; choose another folder, new or empty")
    out = out.absolute()
    known = experiment(network)
    assert known.quick is not None
    done = Torture(network, known.quick.words, seed, datetime.now(UTC).isoformat(timespec="seconds"))
    began_s = time.monotonic()
    grounds = _Grounds(out, known, say, start)
    while len(done.blows) < kills or time.monotonic() - began_s < 60 * minutes:
        number = len(done.rounds) + 1
        done.rounds.append(grounds.round(number, Random(f"{seed} {number}"), kinds))
        done.seconds = round(time.monotonic() - began_s, 1)
        keep(done)
    return done


class _Grounds:
    """A cohort, undisturbed runs on it by one process and by two, and what to compare the others with."""

    def __init__(self, out: Path, known: Experiment, say: Callable[[str], None], start: Start) -> None:
        assert known.quick is not None
        self._out, self._say, self._start = out, say, start
        write = next(one.load(one.quick.cohort) for one in experiments() if one.quick and one.quick.cohort)
        self._cohort, split = write(out)
        words = known.quick.words
        self._words = ["train", known.name, str(self._cohort), "--split", str(split), *words]
        self._epochs = int(words[words.index("--epochs") + 1])
        self._undisturbed: dict[int, tuple[Victim, dict[str, str]]] = {}

    def _victim(self, name: str, seconds: float = 0.0, accesses: int = 0) -> Victim:
        folder = self._out / name
        words = [*self._words, "--out", str(folder)]
        return Victim(folder, self._cohort, words, seconds, accesses, self._epochs, [], self._start)

    def undisturbed(self, ranks: int) -> tuple[Victim, dict[str, str]]:
        """Return a run to which nothing happened, and its fingerprints."""
        if ranks not in self._undisturbed:
            self._undisturbed[ranks] = self._run_undisturbed(ranks)
        return self._undisturbed[ranks]

    def _run_undisturbed(self, ranks: int) -> tuple[Victim, dict[str, str]]:
        started_s = time.monotonic()
        with self._victim(f"undisturbed_{ranks}") as victim:
            code = _finish(victim, ranks)
        victim.seconds = time.monotonic() - started_s
        if code != 0:
            raise TrifuseError(f"a run to which nothing happened ended with {code}:\n{victim.texts[-1]}")
        victim.accesses = accesses_in(victim.texts[-1])
        who = "one process" if ranks == 1 else f"{ranks} ranks"
        self._say(f"undisturbed, {who}: {victim.seconds:.1f} s, {victim.accesses} accesses to files")
        return victim, fingerprints(victim.folder)

    def round(self, number: int, chance: Random, kinds: Sequence[str]) -> Round:
        """Start a run, strike it a few times, let it finish, and compare it."""
        began_s = time.monotonic()
        alone = [kind for kind in kinds if kind != "rank"]
        ranks = 2 if "rank" in kinds and (not alone or number % _RANK_ROUND_EVERY == 0) else 1
        model, expected = self.undisturbed(ranks)
        blows: list[Blow] = []
        with self._victim("run", model.seconds, model.accesses) as victim:
            for _ in range(1 if ranks > 1 else chance.randint(1, _MOST_BLOWS)):
                names = ["rank"] if ranks > 1 else [kind for kind in alone if kind != "flip" or blows] or ["kill"]
                blows.append(KINDS[chance.choice(names)](victim, chance))
                self._say(_line(number, blows[-1]))
                if blows[-1].problem or blows[-1].code == 0:
                    break
            problem = blows[-1].problem
            if not problem:
                problem = self._judge(victim, expected, blows[-1].code and _finish(victim, ranks))
        self._say(f"round {number:3}  {problem or 'equal to the undisturbed run'}")
        if problem:
            self._set_aside(victim, number)
        shutil.rmtree(victim.folder, ignore_errors=True)
        return Round(number, ranks, tuple(blows), problem, round(time.monotonic() - began_s, 1))

    def _judge(self, victim: Victim, expected: dict[str, str], code: int | None) -> str:
        if code != 0:
            return f"the run does not go on: code {code}, {victim.texts[-1].strip().splitlines()[-2:]}"
        found = differences(expected, victim.folder, best_was_lost=victim.best_was_lost)
        return f"differs from the undisturbed run: {listed(found, _MOST_NAMED)}" if found else ""

    def _set_aside(self, victim: Victim, number: int) -> None:
        """Keep a run that did not end well, with what its processes printed."""
        folder = self._out / FAILED_FOLDER / f"round_{number}"
        folder.mkdir(parents=True)
        if victim.folder.exists():
            os.rename(victim.folder, folder / "run")
        for position, text in enumerate(victim.texts, 1):
            (folder / f"session_{position}.txt").write_text(text)


def _finish(victim: Victim, ranks: int) -> int | None:
    """Let a run go on until it is over, and return its exit code."""
    return victim.end(victim.begin() if ranks == 1 else victim.begin_ranks())


def _line(number: int, blow: Blow) -> str:
    wrong = f"; WRONG: {blow.problem}" if blow.problem else ""
    return f"round {number:3}  {blow.kind:6}  {blow.what}: {blow.ending}{wrong}"


def fingerprints(run: Path) -> dict[str, str]:
    """Return a digest of every file of a run that must not depend on when it was interrupted, by its name."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_file() and path.name not in _OF_THE_TIME and name.parts[0] not in _OF_THE_WAY:
            found[name.as_posix()] = _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.name == "log.csv":
        return digest_of(
            [{name: repr(cell) for name, cell in row.items() if name != "seconds"} for row in read_log(path)]
        )
    if path.suffix == ".json":
        with suppress(ValueError):  # a broken one has the digest of its bytes
            return digest_of(json.loads(path.read_bytes()))
    return sha256_of(path)


def differences(expected: dict[str, str], run: Path, *, best_was_lost: bool = False) -> list[str]:
    """Return the names of the files in which a run differs from `fingerprints`, with those that only one of them has.

    Args:
        expected: of a run that nothing happened to.
        run: the folder of the other one.
        best_was_lost: a full disk kept it from saving a best epoch, which is then not called best: only the newest
            weights, their optimiser and the log must be the same.
    """
    found = fingerprints(run)
    more = {name for name in found if not _PREPARED.match(name)}
    names = LAST_WEIGHTS if best_was_lost else sorted(expected.keys() | more)
    return [name for name in names if expected.get(name) != found.get(name)]
