"""A bar on a terminal, lines elsewhere, silence where nobody should speak or listens."""

from __future__ import annotations

import itertools
import os
import pty
import sys
import termios
import time

from children import Child
from tiny_run import bits, run

from trifuse.architectures.training import progress
from trifuse.architectures.training.progress import Progress


def test_lines_at_intervals_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", -1.0)
    shown = Progress(True)
    shown.start("epoch 1 of 2", 10, 3)
    shown.advance(4, "loss 0.5000")
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 60.0)
    shown.advance(5, "loss 0.4000")
    shown.end()
    shown.say("done")
    assert capsys.readouterr().out == "epoch 1 of 2: 4 of 10 loss 0.5000\ndone\n"


def test_silent_on_other_ranks(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", -1.0)
    silent = Progress(False)
    silent.start("epoch", 2)
    silent.advance(1)
    silent.end()
    silent.say("done")
    assert capsys.readouterr() == ("", "")


def test_t18_a_bar_on_a_terminal(tmp_path):
    def slowly(model, batch):
        time.sleep(0.15)
        return model(batch["image"])

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))

    def on_a_terminal():
        os.dup2(end, 2)
        sys.stderr = os.fdopen(2, "w")
        run(tmp_path, epochs=1, forward=slowly)

    child = Child(on_a_terminal)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the child has closed its end
            break
        shown += part
    os.close(terminal)
    assert child.wait() == 0
    assert b"epoch 1 of 1:" in shown
    assert b"2/3" in shown
    assert b"loss 0." in shown


def test_t18_streams_that_are_closed_one_by_one_do_not_end_a_run(tmp_path):
    def without_streams():
        for number, name in ((2, "stderr"), (1, "stdout"), (0, "stdin")):
            os.close(number)
            setattr(sys, name, None)
            run(tmp_path / name, epochs=1)

    assert Child(without_streams).wait() == 0
    for name in ("stderr", "stdout", "stdin"):
        assert len((tmp_path / name / "log.csv").read_text().splitlines()) == 2


def test_t18_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    read, write = os.pipe()

    def piped():
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        run(tmp_path, epochs=2)

    os.close(read)
    assert Child(piped).wait() == 0
    os.close(write)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_t18_a_read_only_home_and_clocks_that_jump_change_nothing(tmp_path, monkeypatch):
    run(tmp_path / "calm", epochs=2)
    monkeypatch.setenv("HOME", "/proc")
    times = itertools.cycle((4e9, 0.0, 1e9))  # years ahead, back to 1970, back again
    monkeypatch.setattr("time.time", lambda: next(times))
    run(tmp_path / "jumpy", epochs=2)
    assert bits(tmp_path / "jumpy") == bits(tmp_path / "calm")
