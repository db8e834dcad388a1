"""`trifuse torture`: that it strikes, and that it sees what a run must not become."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from trifuse.architectures.cli.main import main
from trifuse.architectures.runs import torture as torture_module
from trifuse.architectures.runs import torture_blows, torture_page
from trifuse.architectures.runs.registry import experiment
from trifuse.architectures.runs.torture import Round, Torture, differences, fingerprints, torture
from trifuse.architectures.runs.torture_blows import (
    Blow,
    Victim,
    fill_the_disk,
    flip_a_bit,
    kill_at_any_time,
    lose_a_rank,
    send_a_signal,
)
from trifuse.architectures.runs.torture_session import COUNTED, Alone, Trap, handles

LOG = "epoch,loss,seconds\n1,{loss},{seconds}\n"


class Played:
    """A process that has already ended: with a code, after printing something."""

    pid = 2**22 + 1  # no process has that number

    def __init__(self, code: int | None = 0, text: str = "") -> None:
        self._code, self._text = code, text

    def wait(self, longest_s: float = 0.0) -> int | None:
        return self._code

    def kill(self) -> None:
        pass

    def text(self) -> str:
        return self._text


def write_run(folder: Path, weights: bytes = b"weights", loss: float = 0.5, seconds: float = 1.0) -> None:
    for name in ("last", "best", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "1.npy").write_bytes(b"entry")
    for name in ("last", "best"):
        (folder / name / "model.safetensors").write_bytes(weights)
    (folder / "last" / "training_state.safetensors").write_bytes(b"state")
    for name in ("last/log.json", "results.json"):
        (folder / name).write_text(f'{{"log": "{loss} {seconds}"}}')
    (folder / "run.json").write_text("{}")
    (folder / "log.csv").write_text(LOG.format(loss=loss, seconds=seconds))


def victim_of(tmp_path: Path, *sessions: Played) -> Victim:
    waiting = list(sessions)
    (tmp_path / "cohort").mkdir(exist_ok=True)
    start = lambda words, trap: waiting.pop(0)  # noqa: E731
    return Victim(tmp_path / "run", tmp_path / "cohort", ["train"], 0.0, 10, 1, [], start)


# ------------------------------------------------------------------------------------------------- real processes


def test_t1_t2_t3_t5_runs_that_are_struck_end_as_if_nothing_had_been(tmp_path, monkeypatch):
    """Real runs are killed, in a write too, meet full disks, signals and damaged files, and end with the same bits."""
    known = experiment("plain_unet")
    words = ("--report", "val", *("2" if word == "8" else word for word in known.quick.words))
    quick = replace(known, quick=replace(known.quick, words=words))
    monkeypatch.setattr(torture_module, "experiment", lambda name: quick)
    said: list[str] = []
    kinds = ("kill", "write", "disk", "signal", "flip")
    done = torture(tmp_path / "out", "plain_unet", kills=3, seed=832, kinds=kinds, say=said.append)
    assert not done.failures, said
    assert len(done.blows) >= 3
    assert done.blows[0].kind == "write", said


@pytest.mark.slow
def test_t10_a_run_that_loses_a_rank_ends_as_if_nothing_had_been(tmp_path):
    done = torture(tmp_path / "out", "plain_unet", kills=1, kinds=("rank",))
    assert not done.failures
    assert done.blows[-1].end.startswith("exit code 1, the job")


@pytest.mark.parametrize(
    ("trap", "code", "written"),
    [
        (Trap("", 0), 0, b'{\n    "a": 1\n}\n'),
        (Trap("", 2, "kill"), -signal.SIGKILL, None),
        (Trap("", 2, "cut", 5), -signal.SIGXFSZ, b"{\n   "),
        (Trap("", 2, "full", 5), 1, b"{\n   "),
    ],
    ids=lambda value: value.does if isinstance(value, Trap) else "",
)
def test_t2_t3_a_trap_goes_off_at_its_access(tmp_path, trap, code, written):
    """Python's own JSON tool opens one file to read and another to write."""
    (tmp_path / "in").write_text('{"a": 1}')
    trap = Trap(str(tmp_path), trap.access, trap.does, trap.largest_bytes)
    session = Alone([str(tmp_path / "in"), str(tmp_path / "out")], trap, "json.tool")
    assert session.wait(60) == code, session.text()
    assert (tmp_path / "out").exists() == (written is not None)
    if written is not None:
        assert (tmp_path / "out").read_bytes() == written
    if code == 0:
        assert f"{COUNTED}2" in session.text()


# --------------------------------------------------------------------------------------------- what is seen


def tortured(tmp_path, monkeypatch, later: bytes) -> Torture:
    """Torture a run that writes other weights each time but the first."""
    monkeypatch.setattr(torture_module, "experiment", lambda name: experiment("plain_unet"))
    folders: list[Path] = []

    def start(words, trap):
        write_run(Path(trap.folder), later if folders else b"weights", seconds=len(folders))
        folders.append(Path(trap.folder))
        return Played(text=f"{COUNTED}7\n")

    monkeypatch.setitem(
        torture_module.KINDS, "kill", lambda victim, chance: Blow("kill", "now", -9, "ended by SIGKILL")
    )
    return torture(tmp_path / "out", "plain_unet", kills=1, kinds=("kill",), say=lambda line: None, start=start)


def test_t1_other_weights_than_the_undisturbed_run_s_are_a_failure(tmp_path, monkeypatch):
    (failed,) = tortured(tmp_path, monkeypatch, b"weighty").failures
    assert failed.problem == "differs from the undisturbed run: best/model.safetensors, last/model.safetensors"
    kept = tmp_path / "out" / "failed" / "round_1"
    assert (kept / "run" / "last" / "model.safetensors").read_bytes() == b"weighty"
    assert (kept / "session_1.txt").read_text().startswith(COUNTED)


def test_the_same_weights_are_none(tmp_path, monkeypatch):
    done = tortured(tmp_path, monkeypatch, b"weights")
    assert (len(done.rounds), done.failures) == (1, [])
    assert not (tmp_path / "out" / "failed").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: write_run(run, seconds=2.0), []),
        (lambda run: write_run(run, loss=0.25), ["log.csv"]),
        (lambda run: write_run(run, b"weighty"), ["best/model.safetensors", "last/model.safetensors"]),
        (lambda run: (run / "best" / ".trifuse-1.png").write_bytes(b""), ["best/.trifuse-1.png"]),
        (lambda run: (run / "cache" / "1.npy").write_bytes(b"other"), ["cache/1.npy"]),
        (lambda run: (run / "cache" / "1.npy").unlink(), ["cache/1.npy"]),
        (lambda run: (run / "cache" / "2.npy").write_bytes(b"more"), []),
        (lambda run: (run / "cache" / ".trifuse-1.npy").write_bytes(b"half"), ["cache/.trifuse-1.npy"]),
        (lambda run: (run / "run.json").unlink(), ["run.json"]),
        (lambda run: (run / "run.json").write_text("{ }"), []),
        (lambda run: (run / "run.json").write_text("{"), ["run.json"]),
        (lambda run: (run / "report.md").write_text("yesterday"), []),
    ],
    ids=[
        *("seconds", "loss", "weights", "leftover"),
        *("other entry", "no entry", "more entries", "half an entry"),
        "missing",
        "spaces",
        "broken",
        "report",
    ],
)
def test_all_but_the_time_is_compared(tmp_path, change, found):
    write_run(tmp_path)
    expected = fingerprints(tmp_path)
    change(tmp_path)
    assert differences(expected, tmp_path) == found


def test_t3_a_best_epoch_that_a_full_disk_cost_is_not_compared(tmp_path):
    write_run(tmp_path)
    expected = fingerprints(tmp_path)
    (tmp_path / "best" / "model.safetensors").write_bytes(b"others")
    assert differences(expected, tmp_path, best_was_lost=True) == []
    (tmp_path / "last" / "model.safetensors").write_bytes(b"others")
    assert differences(expected, tmp_path, best_was_lost=True) == ["last/model.safetensors"]


@pytest.mark.parametrize(
    ("code", "landed", "problem"),
    [
        (-signal.SIGKILL, True, ""),
        (0, False, ""),
        (1, True, "exit code 1: Oh: no"),
        (75, True, "exit code 75: Oh: no"),
        (None, True, "hung: Oh: no"),
    ],
)
def test_t1_what_a_kill_may_come_to(tmp_path, code, landed, problem):
    blow = kill_at_any_time(victim_of(tmp_path, Played(code, "Oh: no\n")), Random(0))
    assert (blow.landed, blow.problem) == (landed, problem)


@pytest.mark.parametrize(
    ("trains", "code", "problem"),
    [
        (True, 75, ""),
        (True, 0, ""),
        (True, -signal.SIGUSR1, "ended by SIGUSR1: at last"),
        (True, 5, "exit code 5: at last"),
        (False, -signal.SIGUSR1, ""),
        (False, 75, "exit code 75: at last"),
    ],
)
def test_t5_a_signal_while_a_run_trains_ends_it_with_75(tmp_path, monkeypatch, trains, code, problem):
    chance = Random(1)
    monkeypatch.setattr(chance, "choice", lambda of: of[-1] if signal.SIGTERM in of else of[0])  # SIGUSR1, once
    monkeypatch.setattr(torture_blows, "handles", lambda pid, number: trains)
    blow = send_a_signal(victim_of(tmp_path, Played(code, "at last")), chance)
    assert (blow.what.partition(" after")[0], blow.problem) == ("SIGUSR1", problem)


@pytest.mark.parametrize(
    ("code", "accesses", "problem"),
    [(130, 5, ""), (130, 0, ""), (1, 0, ""), (1, 5, "exit code 1: accesses to the run's folder: 5")],
)
def test_t5_ctrl_c_is_pythons_own_only_before_the_command_begins(tmp_path, monkeypatch, code, accesses, problem):
    chance = Random(1)
    monkeypatch.setattr(chance, "choice", lambda of: signal.SIGINT if signal.SIGTERM in of else of[0])  # once
    monkeypatch.setattr(torture_blows, "handles", lambda pid, number: False)
    blow = send_a_signal(victim_of(tmp_path, Played(code, f"{COUNTED}{accesses}\n")), chance)
    assert blow.problem == problem


@pytest.mark.parametrize(
    ("code", "left", "problem"),
    [
        (1, [], ""),
        (None, [], "it did not end within 60 s"),
        (1, [7], "processes are left behind: 1"),
    ],
)
def test_t10_a_job_that_lost_a_rank_ends_and_leaves_nobody_behind(tmp_path, monkeypatch, code, left, problem):
    job = Played(code)
    job.ranks = lambda: [Played.pid, Played.pid]
    monkeypatch.setattr(torture_blows, "Ranks", lambda words: job)
    monkeypatch.setattr(torture_blows, "left_after", lambda processes: left)
    blow = lose_a_rank(victim_of(tmp_path), Random(0))
    assert (blow.landed, blow.problem) == (True, problem)


def test_t3_a_full_disk_never_ends_in_a_traceback(tmp_path):
    assert fill_the_disk(victim_of(tmp_path, Played(5, "make room and resume")), Random(0)).problem == ""
    text = "Traceback (most recent call last):\nOSError: full\n"
    assert fill_the_disk(victim_of(tmp_path, Played(5, text)), Random(0)).problem == "a traceback: OSError: full"
    assert fill_the_disk(victim_of(tmp_path, Played(1, "no")), Random(0)).problem == "exit code 1: no"
    warned = fill_the_disk(victim_of(tmp_path, Played(0, "warning: last could not be saved")), Random(0))
    assert (warned.landed, warned.end) == (True, "finished, after a save that failed")


@pytest.mark.parametrize(
    ("code", "text", "end", "problem"),
    [
        (4, "OUT/run.json: damaged", "refused with code 4, and restored", ""),
        (0, "", "never read", ""),
        (0, "run.json was damaged", "named, and never read", ""),
        (4, "something is damaged", "exit code 4", "the file is not named: something is damaged"),
        (1, "KeyError", "exit code 1", "exit code 1: KeyError"),
        (None, "", "hung", "hung: nothing was printed"),
    ],
)
def test_a_flipped_bit_is_named_or_made_good(tmp_path, code, text, end, problem):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "run.json"
    file.write_text('{"a": 1}')
    blow = flip_a_bit(victim_of(tmp_path, Played(code, text)), Random(0))
    assert (blow.end, blow.problem) == (end, problem)
    assert (file.read_text() == '{"a": 1}') == (code == 0 or end.endswith("restored"))


def test_it_ends_with_5_where_a_run_was_lost(tmp_path, monkeypatch, capsys):
    blow = Blow("kill", "SIGKILL after 1.00 s", -9, "ended by SIGKILL")

    def play(out, network, *, keep, **options):
        out.mkdir(exist_ok=True)
        problem = "differs from the undisturbed run: last/model.safetensors" if options["seed"] else ""
        done = Torture(network, ("--epochs", "1"), options["seed"], "today", 60.0, [Round(1, 1, (blow,), problem, 2.0)])
        keep(done)
        return done

    monkeypatch.setattr(torture_module, "torture", play)
    monkeypatch.setattr(torture_page, "machine_of_runs", lambda: {"device": "a processor", "commit": "abc"})
    out = tmp_path / "out"
    assert main(["torture", "--out", str(out), "--seed", "0"]) == 0
    assert "1 blow to 1 run in 1 min 00 s: all of 1 ended bit for bit" in capsys.readouterr().out
    assert main(["torture", "--out", str(out), "--seed", "1"]) == 5
    assert "0 of 1 ended bit for bit" in capsys.readouterr().out
    written = json.loads((out / "torture.json").read_text())
    assert (written["blows"], written["failures"], written["machine"]["commit"]) == (1, 1, "abc")
    page = (out / "torture.md").read_text()
    assert "* round 1: differs from the undisturbed run: last/model.safetensors" in page
    assert "| 1 | kill | SIGKILL after 1.00 s | ended by SIGKILL |" in page


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert main(["torture", "--out", str(tmp_path)]) == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err


def test_a_handler_is_told_by_its_signal():
    """A blow that comes before the run has a handler would end it: it waits for this."""
    numbers = (signal.SIGUSR1, signal.SIGSEGV, signal.SIGUSR2)  # 10, 11 and 12
    before = [handles(os.getpid(), number) for number in numbers]
    old = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert [handles(os.getpid(), number) for number in numbers] == [*before[:2], True]
    finally:
        signal.signal(signal.SIGUSR2, old)
    assert not before[2]
    assert not handles(2**22 + 1, signal.SIGTERM)  # there is no such process
