"""``trifuse train`` in processes of its own: signals, and several ranks under torchrun."""

from __future__ import annotations

import csv
import ctypes
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from children import Child
from command import ABDOMEN_TRAINING, ATRIA_TRAINING, with_options
from ready_python import run_python

from trifuse.architectures.cli.main import main
from trifuse.architectures.training.step import TrainingStep

_NO_NAMESPACES = 77


def make_read_only(folder):
    """Let this process, whoever's it is, see an empty file system there that cannot be written to."""
    system = ctypes.CDLL(None)
    new_user, new_mounts, read_only = 0x10000000, 0x00020000, 1
    if system.unshare(new_user | new_mounts) or system.mount(b"none", os.fsencode(folder), b"tmpfs", read_only, None):
        os._exit(_NO_NAMESPACES)


@pytest.mark.parametrize("out", ["run", "."])
def test_c20_a_read_only_file_system_is_named_before_the_first_step(atria, tmp_path, monkeypatch, capfd, out):
    out = tmp_path / out
    words = ["train", "dino_unet", str(atria), "--out", str(out), "--split", str(atria / "split.json"), *ATRIA_TRAINING]
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, micro_batches, number: os._exit(9))

    def command():
        make_read_only(tmp_path)
        os._exit(main(words))

    code = Child(command).wait()
    if code == _NO_NAMESPACES:
        pytest.skip("this machine gives a process no file systems of its own")
    assert code == 3
    said = capfd.readouterr().err
    assert said.startswith(f"trifuse: {out}")
    assert said.endswith("Read-only file system\n")


def test_t5_sigterm_while_training_exits_with_75_and_leaves_a_checkpoint_of_that_step(atria, tmp_path):
    out = tmp_path / "run"
    words = ["train", "dino_unet", str(atria), "--out", str(out), "--split", str(atria / "split.json")]
    words += with_options(ATRIA_TRAINING, epochs=500)
    ends, said = os.pipe()

    def command():
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    child = Child(command)
    os.close(said)
    with os.fdopen(ends) as lines:
        for line in lines:
            if line.startswith("epoch 2"):
                os.kill(child.pid, signal.SIGTERM)
                break
        rest = lines.read()
    assert child.wait(60) == 75, rest
    stopped = re.search(r"stopped by SIGTERM after step (\d+); resume to continue", rest)
    assert stopped, rest
    position = json.loads((out / "last" / "training_state.json").read_text())["position"]
    assert position["step"] == int(stopped[1])


def test_t8_a_killed_loader_exits_with_75_and_the_run_resumes(atria, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    words = ["train", "dino_unet", str(atria), "--out", str(out), "--split", str(atria / "split.json"), *ATRIA_TRAINING]
    words += ["--workers", "1"]
    step, others = TrainingStep.__call__, set(multiprocessing.active_children())

    def killing(self, micro_batches, number):
        if number == 2:
            os.kill((set(multiprocessing.active_children()) - others).pop().pid, signal.SIGKILL)
            time.sleep(10)  # PyTorch says so here, in the middle of a step
        return step(self, micro_batches, number)

    monkeypatch.setattr(TrainingStep, "__call__", killing)
    assert main(words) == 75
    said = capfd.readouterr().err
    assert "was killed by SIGKILL, at sample" in said
    assert f"{out / 'last'} holds step" in said
    assert "--resume goes on from there" in said
    assert "Traceback" not in said
    assert not set(multiprocessing.active_children()) - others, "no worker is left behind"
    monkeypatch.undo()
    assert main([*words, "--resume"]) == 0


def test_two_processes_take_the_steps_of_one(atria, tmp_path):
    options = [
        str(atria),
        "--split",
        str(atria / "split.json"),
        *ATRIA_TRAINING,
        "--set",
        "network.norm=group",
        "--cache-features",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "trifuse.architectures.cli", "train", "dino_unet", *options]
    child = run_python(*command, "--out", tmp_path / "two", OMP_NUM_THREADS="1")
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("report: ") == 1
    assert main(["train", "dino_unet", *options, "--out", str(tmp_path / "one")]) == 0
    one, two = (list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two"))
    for name in ("loss", "gradient_norm", "val_dice", "weight_block_3"):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], rel=1e-4), name


@pytest.mark.slow
def test_the_module_is_the_command_and_runs_under_torchrun(abdomen, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(abdomen), "--out", str(tmp_path / "two"), *ABDOMEN_TRAINING, "--repeats", "2"]
    command = [sys.executable, *launch, "-m", "trifuse.architectures.cli", "train", "fias", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("report: ") == 1
    for k in (1, 2):
        assert len(list(csv.DictReader((tmp_path / "two" / f"run_{k}" / "log.csv").open()))) == 1
    assert "over 2 runs" in (tmp_path / "two" / "report.md").read_text()
