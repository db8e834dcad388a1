"""``trifuse demo``: which networks, in which folders, what is refused beforehand, and what is said at the end."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from children import Child
from command import run_main

from trifuse.architectures.cli import demo
from trifuse.architectures.cli.main import build_parser
from trifuse.architectures.runs.registry import experiment, experiments
from trifuse.architectures.training.run_folder import lock_folder

ALL = [each.name for each in experiments() if each.demo]


@dataclass
class Ended:
    """A demo that has ended, as `run_side_by_side` returns it."""

    code: int
    errors: str = ""
    how_it_ended: str = "failed"
    exit_code: int = 0


@pytest.fixture
def asked(monkeypatch) -> dict[str, list[str]]:
    """Take the words of demos, by name, and write reports in place of running several; fias fails."""
    words: dict[str, list[str]] = {}

    def run_side_by_side(commands, outputs):
        for name, command in commands.items():
            words[name] = command[command.index("demo") :]
            run = outputs[name].parent / "run"
            run.mkdir(parents=True)
            (run / "report.md").write_text(f"# {name}\n\n**DSC 0.9** of {name}\n\n## Scores\n")
        failed = Ended(5, "a loss\nis not finite\n", "failed with exit code 5", 5)
        return {name: failed if name == "fias" else Ended(0) for name in commands}

    monkeypatch.setattr("trifuse.architectures.runs.side_by_side.run_side_by_side", run_side_by_side)
    for name in ALL:
        alone = partial(words.__setitem__, name)
        monkeypatch.setattr(f"trifuse.architectures.{name}.demo.run_demo", lambda out, alone=alone, **_: alone([]))
    return words


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Let the default folder lie in a new one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_name_all_run_side_by_side(asked, capsys):
    run_main(["demo", "--overwrite", "--seed", "3"], capsys)
    assert asked == {name: ["demo", name, "--out", f"demo/{name}", "--seed", "3", "--overwrite"] for name in ALL}


def test_those_that_are_named_run_below_one_folder(asked, capsys):
    run_main(["demo", "taff_unet", "dino_unet", "--phantom", "ambiguous", "--out", "x", "--traceback"], capsys)
    further = {"taff_unet": ["--phantom", "ambiguous"], "dino_unet": []}
    assert asked == {
        name: ["demo", name, "--out", f"x/{name}", "--seed", "0", *words, "--traceback"]
        for name, words in further.items()
    }
    for words in asked.values():
        assert build_parser().parse_args(words).networks == words[1:2]


def test_the_last_lines_say_what_was_reached_and_what_to_open_first(asked, capsys):
    code, said, errors = run_main(["demo", "dino_unet", "taff_unet"], capsys)
    assert (code, errors) == (0, "")
    assert said.splitlines()[-7:] == [
        "dino_unet: DSC 0.9 of dino_unet",
        "  open demo/dino_unet/run/report.md",
        "",
        "taff_unet: DSC 0.9 of taff_unet",
        "  open demo/taff_unet/run/report.md",
        "",
        "open first: demo/dino_unet/run/report.md",
    ]


def test_a_demo_that_fails_is_told_whole_beside_what_the_others_reached(asked, capsys):
    code, said, errors = run_main(["demo"], capsys)
    assert code == 5
    assert errors == "\ntrifuse demo fias failed with exit code 5:\na loss\nis not finite\n"
    assert "fias/run/report.md" not in said
    assert said.endswith("open first: demo/dino_unet/run/report.md\n")
    code, said, _ = run_main(["demo", "fias", "taff_unet", "--out", "another"], capsys)
    assert code == 5
    assert said.endswith("open first: another/taff_unet/run/report.md\n")


def test_one_alone_runs_in_this_process(monkeypatch, capsys):
    calls = []

    def run_demo(out, **options):
        calls.append((out, options["command"]))
        return out / "run" / "report.md"

    monkeypatch.setattr("trifuse.architectures.fias.demo.run_demo", run_demo)
    for words, out in (["demo", "fias"], "demo/fias"), (["demo", "fias", "--out", "x"], "x"):
        code, said, _ = run_main(words, capsys)
        assert code == 0
        assert said.endswith(f"open first: {out}/run/report.md\n")
        assert calls.pop() == (Path(out), ["trifuse", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fais"], "invalid choice: 'fais' (choose from"),
        (["fais"], "did you mean fias?"),
        (["plain_unet"], "invalid choice: 'plain_unet'"),
        (["fias", "taff_unet", "fias"], "fias is named more than once"),
        (["fias", "--phantom", "easy"], "--phantom is for taff_unet, which is not among the networks; name it, too"),
    ],
)
def test_l2_what_makes_no_sense_is_refused(words, told, asked, here, capsys):
    code, _, errors = run_main(["demo", *words], capsys)
    assert code == 2
    assert told in errors
    assert not asked
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        (["h5py"], "trifuse demo needs h5py, which is not installed; run: pip install 'trifuse[h5]'"),
        (["matplotlib", "h5py"], "needs matplotlib, which is not installed; run: pip install 'trifuse[med,h5]'"),
    ],
)
def test_l6_a_package_that_is_missing_is_told_with_its_pip_line_before_work_starts(
    absent, command, asked, here, monkeypatch, capsys
):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name in absent else name)
    code, _, errors = run_main(["demo"], capsys)
    assert code == 2
    assert command in errors
    assert not asked
    assert not any(here.iterdir())


def test_a_package_that_only_another_network_needs_may_be_missing(asked, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "h5py" else name)
    assert run_main(["demo", "dino_unet", "taff_unet"], capsys)[0] == 0


def test_l4_folders_that_may_not_be_written_are_refused_before_work_starts(asked, here, capsys):
    """Whichever demo's they are: those of the others stay as they are, too."""
    earlier = here / "demo" / "dino_unet" / "run"
    (earlier / "first_pass").mkdir(parents=True)
    (earlier / "first_pass" / "x").write_text("prepared")
    (earlier / "recipe.json").write_text("{}")
    code, _, errors = run_main(["demo"], capsys)
    assert code == 2
    assert "dino_unet/run holds what a run had prepared" in errors
    assert "pass --overwrite to replace it, or choose another folder" in errors
    for folder in experiment("taff_unet").demo.folders:
        notes = here / "demo" / "taff_unet" / folder / "notes.txt"
        notes.parent.mkdir(parents=True)
        notes.write_text("mine")
        code, _, errors = run_main(["demo", "--overwrite"], capsys)
        assert code == 2
        assert f"taff_unet/{folder} is not empty" in errors
        notes.unlink()
    assert not asked
    assert (earlier / "first_pass" / "x").exists()
    assert not (here / "demo" / "fias").exists()


def test_l4_a_folder_that_is_a_file_or_lies_below_one_is_refused(asked, here, capsys):
    (here / "demo").write_text("a file")
    assert run_main(["demo"], capsys)[::2] == (2, f"trifuse: {here / 'demo'} is a file; choose a folder\n")
    (here / "x").mkdir()
    (here / "x" / "run").write_text("a file")
    assert "x/run is a file; choose a folder" in run_main(["demo", "fias", "--out", "x"], capsys)[2]


def test_t17_a_folder_that_another_process_writes_to_is_refused_before_work_starts(asked, here, capsys):
    def hold() -> None:
        with lock_folder(here / "demo" / "taff_unet" / "ecg"):
            (here / "held").touch()
            time.sleep(60)

    child = Child(hold)
    while not (here / "held").exists():
        time.sleep(0.01)
    code, _, errors = run_main(["demo", "--overwrite"], capsys)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert code == 2
    assert f"taff_unet/ecg is in use by process {child.pid}" in errors
    assert not asked
