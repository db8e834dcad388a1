"""Commands side by side: a line of each at a time, all that they print in files, errors whole, nothing left."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from threading import Timer

import pytest

from trifuse.architectures.runs import side_by_side
from trifuse.architectures.runs.side_by_side import run_side_by_side
from trifuse.architectures.training.signals import Interrupted

EPOCH = "epoch 3, step 54, lr_decoder 0.0037832, loss -0.50197, gradient_norm 1.0446, val_dice 0.5, seconds 6.001"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs programs in Python by name, and returns them ended; they are looked at often."""
    monkeypatch.setattr(side_by_side, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(side_by_side, "_LINE_EVERY_S", 0.0)

    def run(**programs: str) -> dict[str, side_by_side.Command]:
        commands = {name: [sys.executable, "-S", "-c", program] for name, program in programs.items()}
        return run_side_by_side(commands, {name: tmp_path / name / "output.txt" for name in programs})

    return run


def says(*lines: str, pause_s: float = 0.15) -> str:
    """Return a program that prints lines, with pauses between."""
    return f"import time\nfor line in {lines!r}: print(line, flush=True); time.sleep({pause_s})"


def test_a_log_has_whole_lines_of_one_command_each(run, capsys):
    run(a=says("writing", EPOCH, pause_s=0.5), longer=says("writing, too", "before training: val_dice 0"))
    lines = [
        re.fullmatch(r" +\d+:\d\d  (a     |longer)  (\S.*)", line) for line in capsys.readouterr().out.splitlines()
    ]
    assert all(lines)
    of_a, of_longer = ([line[2] for line in lines if line[1].strip() == name] for name in ("a", "longer"))
    assert {*of_a[:-1]} <= {"starting", "writing", "writing; epoch 3, val_dice 0.5"}
    assert "writing; epoch 3, val_dice 0.5" in of_a
    assert {*of_longer[:-1]} <= {"starting", "writing, too"}
    assert all(re.fullmatch(r"done after \d:\d\d", said[-1]) for said in (of_a, of_longer))


def test_a_line_is_said_now_and_then_and_at_the_end(run, capsys, monkeypatch):
    monkeypatch.setattr(side_by_side, "_LINE_EVERY_S", 60.0)
    run(a=says("one", "two", "three", pause_s=0.3))
    _, last = capsys.readouterr().out.splitlines()
    assert "  done after " in last


def test_a_terminal_sees_each_line_in_its_place(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    run(a=says("a" * 100), b=says("short"))
    first, *frames = terminal.getvalue().split("\x1b[2A")
    assert frames
    for frame in (first, *frames):
        drawn = frame.split("\n")
        assert [line.startswith("\r\x1b[2K") for line in drawn] == [True, True, False]
        assert all(len(line.removeprefix("\r\x1b[2K")) <= 29 for line in drawn)
    assert "a  done after" in frames[-1]
    assert "b  done after" in frames[-1]


def test_a_terminal_that_cannot_redraw_is_a_log(run, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(a=says("one"))
    assert "\x1b" not in capsys.readouterr().out


def test_what_one_does_wrong_is_kept_whole_and_the_others_go_on(run, tmp_path):
    fails = "import sys\nprint('begun', flush=True)\nprint('first\\n  second', file=sys.stderr)\nsys.exit(3)"
    ended = run(bad=fails, good=says("one", "two"))
    assert (ended["bad"].code, ended["bad"].exit_code, ended["good"].code) == (3, 3, 0)
    assert ended["bad"].errors == "first\n  second\n"
    assert ended["bad"].how_it_ended == "failed with exit code 3"
    lines = (tmp_path / "bad" / "output.txt").read_text().splitlines()  # of two streams, each in its order
    assert [line for line in lines if line != "begun"] == ["first", "  second"]
    assert len(lines) == 3
    assert (tmp_path / "good" / "output.txt").read_text() == "one\ntwo\n"


def test_one_that_was_killed_is_interrupted(run):
    ended = run(bad="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert ended["bad"].exit_code == 75
    assert ended["bad"].how_it_ended == "was ended by SIGKILL (if memory ran out, run one at a time)"


def test_each_computes_on_one_thread(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run(a="import os\nprint(os.environ['OMP_NUM_THREADS'])")
    assert (tmp_path / "a" / "output.txt").read_text() == "1\n"


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_nothing_is_left_of_commands_that_are_stopped(run, tmp_path, number, error):
    """Nor of what they have started themselves."""
    starts = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    handler = signal.getsignal(number)

    def stop_once_begun() -> None:
        while not (tmp_path / "a" / "output.txt").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    Timer(0.05, stop_once_begun).start()
    with pytest.raises(error):
        run(a=starts)
    assert signal.getsignal(number) == handler
    end_s = time.monotonic() + 10
    pid = int((tmp_path / "a" / "output.txt").read_text())
    while is_running(pid) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may wait for its parent to ask."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
