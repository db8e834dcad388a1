"""The file that keeps the choices: what can be wrong with it, and who else writes and reads it."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
from children import Child
from ready_python import run_python
from toy_launcher import TOY, interpreted, kept

from trifuse.kernels import warm_up
from trifuse.kernels.gpu import tuning

pytest.importorskip("triton", reason="its kernels are what is tuned")


BROKEN = {
    "empty": b"",
    "half": b'{"a": ',
    "no object": b"[]",
    "no choices": b'{"a": 1}',
    "no text": b"\xff\xfe",
    "too deep": b"[" * 99_999,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_k30_corrupted_file_means_one_warning_and_the_first_choice(content, start_over):
    toy = start_over()
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tuning.json cannot be read .* until warm_up is called again") as warned:
        assert [toy(8), toy(80), warm_up(toy, 8)] == [64, 64, 256]
    assert len(warned) == 1
    assert list(kept().values()) == [{"threads": 256}]


def test_k30_choice_that_does_not_exist_is_ignored(start_over):
    warm_up(start_over(), 8)
    tuning.cache_file().write_text(json.dumps({place: {"threads": 3} for place in kept()}))
    assert start_over()(8) == 64


@pytest.mark.parametrize("folder", ["/proc/trifuse", "/dev/null/trifuse"])
def test_k30_folder_that_cannot_be_written_means_one_warning(folder, start_over, monkeypatch):
    toy = start_over()
    monkeypatch.setenv("TRIFUSE_CACHE", folder)
    with pytest.warns(RuntimeWarning, match="holds for this process only") as warned:
        assert [warm_up(toy, 8), warm_up(toy, 80), toy(8), toy(80)] == [256] * 4
    assert len([w for w in warned if "written" in str(w.message)]) == 1


@interpreted
def test_k30_triton_that_cannot_time_means_one_warning(start_over, monkeypatch):
    time = tuning.milliseconds
    toy = start_over()
    monkeypatch.setattr(tuning, "milliseconds", time)
    with pytest.warns(RuntimeWarning, match="kernels cannot be timed here") as warned:
        assert warm_up(lambda: [toy(8), toy(80), toy(8)]) == [64] * 3
    assert len(warned) == 1
    assert not tuning.cache_file().exists()


def test_processes_that_write_at_once_lose_nothing(start_over):
    """Two children start together, each finding choices of its own and saving after each."""
    toy = start_over()
    waiting, go = os.pipe()

    def write(n):
        tuning.gpu_name = lambda device: f"GPU {n}"
        os.read(waiting, 1)
        for power in range(40):
            tuning.warm_up(toy.toy, torch.empty(2**power, device="meta"))

    children = [Child(partial(write, n)) for n in range(2)]
    os.write(go, b"go")
    assert [child.wait(100) for child in children] == [0, 0]
    assert list(kept().values()) == [{"threads": 256}] * 80


def test_a_child_reads_the_file_and_needs_no_triton(start_over):
    """Without triton nothing can be timed, and `warm_up` only calls the function."""
    warm_up(start_over(), 8)
    before = tuning.cache_file().read_text()
    script = (
        "import sys\nsys.modules['triton'] = None\n"
        f"from trifuse.kernels import warm_up\nassert warm_up(max, 1, 2) == 2\n{TOY}\n"
        "tuning.gpu_name = lambda device: 'Some GPU'\nprint(toy(torch.empty(7)), toy(torch.empty(9)), timed)"
    )
    child = run_python("-c", script)
    assert (child.returncode, child.stdout) == (0, "256 64 []\n"), child.stderr
    assert tuning.cache_file().read_text() == before
