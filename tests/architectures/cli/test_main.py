"""The command as a whole: its help, its exit codes, what loads when, and how it stops."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from children import Child
from command import run_main

from trifuse.architectures.cli import COMMANDS, doctor
from trifuse.architectures.cli.main import build_parser, main
from trifuse.architectures.runs.registry import NETWORKS, experiments
from trifuse.architectures.training.checkpoint import SaveError
from trifuse.architectures.training.loader_workers import WorkerLost
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels import CheckpointError, DataError, NumericError


def test_traceback_is_shown_on_request_alone(tmp_path, capsys):
    words = ["data", "check", str(tmp_path / "nowhere")]
    code, _, errors = run_main(words, capsys)
    assert code == 3
    assert "Traceback" not in errors
    with pytest.raises(Exception, match="nowhere"):
        main([*words, "--traceback"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutputFolderError("words"), 2),
        (DataError("words"), 3),
        (OSError(errno.ENOSPC, "words"), 3),
        (CheckpointError("words"), 4),
        (SaveError("words"), 5),
        (NumericError("words"), 5),
        (Interrupted("words"), 75),
        (WorkerLost("words"), 75),
    ],
    ids=lambda value: type(value).__name__,
)
def test_t3_t5_t6_the_exit_code_tells_what_kind_of_error_it_was(monkeypatch, capsys, error, expected):
    def fail(arguments, argv):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    code, _, said = run_main(["doctor"], capsys)
    assert code == expected
    assert "words" in said
    assert "Traceback" not in said


def test_l12_help_and_version_import_nothing_heavy():
    script = """
import sys, time
start = time.process_time()
from trifuse.architectures.cli.main import main
for words in (["--version"], ["--help"], ["train", "dino_unet", "--help"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert time.process_time() - start < 0.3, time.process_time() - start
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr


def test_l12_help_is_free_of_torch():
    script = """
import sys
from trifuse.architectures.cli.main import main
for words in (["train", "fias", "--help"], ["demo", "fias", "--help"], ["ablate", "fias", "--help"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)


def test_t18_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m trifuse.architectures.cli doctor | head -1; exit ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0
    assert "Traceback" not in child.stderr


def test_t18_a_command_without_streams_opens_no_file_in_their_place(tmp_path):
    def without_streams():
        for number, name in ((2, "stderr"), (1, "stdout"), (0, "stdin")):
            os.close(number)
            setattr(sys, name, None)
        assert main(["data", "check", str(tmp_path / "nowhere")]) == 3
        with open(tmp_path / "file", "w") as file:
            assert file.fileno() > 2

    assert Child(without_streams).wait() == 0


def test_t9_memory_that_runs_out_in_any_command_is_said(monkeypatch, capsys):
    def hungry(out, **options):
        np.empty(1 << 46, np.uint8)

    monkeypatch.setattr("trifuse.architectures.fias.demo.run_demo", hungry)
    code, _, errors = run_main(["demo", "fias"], capsys)
    assert code == 75
    assert "memory ran out (Unable to allocate 64.0 TiB" in errors
    assert "Traceback" not in errors


def test_ctrl_c_shows_no_traceback(monkeypatch, capsys):
    def stop(out, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("trifuse.architectures.fias.demo.run_demo", stop)
    stopped = (130, "", "trifuse: stopped by Ctrl-C\n")
    assert run_main(["demo", "fias"], capsys) == stopped
    monkeypatch.setattr("trifuse.architectures.cli.main.build_parser", lambda: stop(None))  # while modules are imported
    assert run_main(["demo", "fias"], capsys) == stopped


def test_every_command_has_help():
    parser = build_parser()
    assert "exit codes: 0 ok" in parser.format_help()


def test_every_network_can_be_trained_shown_and_ablated():
    for experiment in experiments():
        offered = {"train": experiment, "demo": experiment.demo, "ablate": experiment.ablation}
        for command in [command for command, offer in offered.items() if offer is not None]:
            with pytest.raises(SystemExit) as stop:
                build_parser().parse_args([command, experiment.name, "--help"])
            assert stop.value.code == 0


def test_networks_of_the_command_are_those_of_the_registry():
    further = [part.name for experiment in experiments() for part in experiment.pretrainings]
    assert choices("train") == [*NETWORKS, *further]
    (named,) = (action for action in subcommands(build_parser())["demo"]._actions if action.dest == "networks")
    assert named.choices == [experiment.name for experiment in experiments() if experiment.demo]
    assert choices("ablate") == [experiment.name for experiment in experiments() if experiment.ablation]
    assert choices("convert") == [one.name for experiment in experiments() for one in experiment.converters]
    assert choices() == [*COMMANDS]


def choices(command: str = "") -> list[str]:
    """Return the words that may follow a command, or the commands themselves."""
    parser = build_parser()
    for name in [command] if command else []:
        parser = subcommands(parser)[name]
    return [*subcommands(parser)]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices
