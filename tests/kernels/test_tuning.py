"""Tuning: what is chosen, when, how it is kept, what can go wrong; and that every choice computes the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

from trifuse import kernels
from trifuse.kernels import BackendError, backend, warm_up
from trifuse.kernels.testing import assert_op_matches

pytest.importorskip("triton", reason="its kernels are what is tuned")

from trifuse.kernels.gpu import tuning

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests on a machine without a GPU")

# A launcher of three forms, and a clock that goes by their number of threads. Children run the same lines.
TOY = """
import torch
from trifuse.kernels.gpu import tuning

def forward(choice, x):
    launches.append(choice["threads"])
    return choice["threads"]

def ticks(run, device):
    timed.append(run.args[0]["threads"])
    run()
    return clock[launches[-1]]

forward.__module__ = "toy"
launches, timed, clock = [], [], {64: 3.0, 128: 2.0, 256: 1.0}
toy = tuning.tunable(
    ({"threads": 64}, {"threads": 128}, {"threads": 256}), lambda x: tuning.key_of(x, x.numel())
)(forward)
"""


class Toy:
    def __init__(self):
        self.__dict__ |= {key: value for key, value in _executed(TOY).items() if not key.startswith("__")}

    def __call__(self, size):
        return self.toy(torch.empty(size))


def _executed(source):
    namespace = {}
    exec(source, namespace)
    return namespace


@pytest.fixture
def start_over(monkeypatch, tmp_path):
    """Return what a new process would begin with, with a folder of its own; a later call is a later process."""
    monkeypatch.setattr(tuning, "TUNABLES", {})
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path / "cache"))

    def start():
        for name, value in {"_remembered": None, "_found": {}, "_warned": set()}.items():
            monkeypatch.setattr(tuning, name, value)
        toy = Toy()
        monkeypatch.setattr(tuning, "gpu_name", lambda device: "Some GPU")
        monkeypatch.setattr(tuning, "milliseconds", toy.ticks)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return toy

    return start


def kept() -> dict:
    return json.loads(tuning.cache_file().read_text())


def test_nothing_is_timed_unless_asked_for(start_over):
    toy = start_over()
    assert toy(8) == 64
    assert toy.timed == []
    assert not tuning.cache_file().exists()


def test_fastest_choice_is_found_kept_and_read_by_a_later_process(start_over):
    toy = start_over()
    assert toy(8) == 64
    assert warm_up(toy, 8) == 256
    assert toy.timed == [64, 128, 256]
    assert toy(8) == 256
    ((place, choice),) = kept().items()
    assert place.startswith("toy.forward | torch.float32 | 8 | Some GPU | triton 3.")
    assert choice == {"threads": 256}
    later = start_over()
    assert later(8) == 256
    assert later.timed == []


def test_what_is_known_is_not_timed_again(start_over):
    warm_up(start_over(), 8)
    later = start_over()
    later.clock[64] = 0.1
    assert warm_up(later, 8) == 256
    assert later.timed == []


def test_choices_are_for_sizes_up_to_a_power_of_two(start_over):
    toy = start_over()
    warm_up(toy, 6)
    assert [toy(size) for size in (4, 5, 8, 9)] == [64, 256, 256, 64]


@pytest.mark.parametrize("change", ["gpu_name", "_versions"])
def test_choices_are_for_one_gpu_and_one_version(change, start_over, monkeypatch):
    warm_up(start_over(), 8)
    later = start_over()
    monkeypatch.setattr(tuning, change, lambda *_: "another")
    assert later(8) == 64


def test_versions_follow_the_sources(monkeypatch, tmp_path):
    tuning._versions.cache_clear()
    before = tuning._versions()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    (tmp_path / "gates.py").write_text("TILE = 1")
    tuning._versions.cache_clear()
    changed = tuning._versions()
    monkeypatch.undo()
    tuning._versions.cache_clear()
    assert before != changed
    assert (
        before.rpartition(" | ")[0] == changed.rpartition(" | ")[0] == f"triton {import_module('triton').__version__}"
    )


def test_noise_does_not_change_the_choice(start_over):
    toy = start_over()
    toy.clock |= {64: 1.0, 128: 0.98, 256: 0.99}
    assert warm_up(toy, 8) == 64


def test_form_too_large_for_the_gpu_is_left_out(start_over, monkeypatch):
    toy = start_over()
    ticks = tuning.milliseconds

    def out_of_shared_memory(run, device):
        if run.args[0]["threads"] == 256:
            raise BackendError("needs more shared memory than there is")
        return ticks(run, device)

    monkeypatch.setattr(tuning, "milliseconds", out_of_shared_memory)
    assert warm_up(toy, 8) == 128


def test_warm_up_returns_and_raises_what_the_function_does_and_ends(start_over):
    toy = start_over()

    def fails():
        toy(8)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warm_up(fails)
    assert list(kept().values()) == [{"threads": 256}]
    toy(1000)
    assert len(toy.timed) == 3


def test_nothing_is_timed_while_a_graph_is_captured(start_over, monkeypatch):
    toy = start_over()
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert warm_up(toy, 8) == 64
    assert toy.timed == []
    assert not tuning.cache_file().exists()
    assert warm_up(toy, 8) == 256


@interpreted
def test_nothing_is_timed_in_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "milliseconds", None)
    with backend("triton"):
        warm_up(kernels.upsample_argmax, [torch.ones(1, 2, 2, 2)], (4, 4))
    assert list(tmp_path.iterdir()) == []


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
    toy = start_over()

    def find(gpu):
        tuning.gpu_name = lambda device: gpu
        for power in range(20):
            warm_up(toy, 2**power)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=find, args=(f"GPU {n}",)) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
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
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert output.stdout == "256 64 []\n"
    assert tuning.cache_file().read_text() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choices_are_timed_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", None)
    maps = [torch.randn(2, 64, 128, device="cuda", requires_grad=True) for _ in range(3)]
    logits = torch.zeros(3, device="cuda", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up(lambda: kernels.weighted_block_fusion(maps, logits).sum().backward())
    assert {place.partition(" ")[0] for place in kept()} == {
        "weighted_block_fusion.forward", "weighted_block_fusion.backward"
    }  # fmt: skip


# ------------------------------------------------------------------------------------- every choice is the same


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_every_launcher_with_choices_is_tested_and_is_called_under_its_own_name():
    assert tunables() == set(CHECKS)


def tunables() -> set[str]:
    folder = Path(tuning.__file__).parent
    modules = [import_module(f"trifuse.kernels.gpu.{path.stem}") for path in sorted(folder.glob("[a-z]*.py"))]
    return {value.name for module in modules for value in vars(module).values() if isinstance(value, tuning.Tunable)}


def check_fusion():
    # more elements than a tile of the larger form
    op, reference = kernels.weighted_block_fusion, kernels.weighted_block_fusion_reference
    assert_op_matches(op, reference, [values(1, 5, 211, seed=i) for i in range(2)], values(2), atol=2e-5)


# The operator that each launcher is part of, on a shape of more than one tile.
CHECKS = {
    "weighted_block_fusion.forward": check_fusion,
    "weighted_block_fusion.backward": check_fusion,
}


@interpreted
@pytest.mark.parametrize("name", CHECKS)
def test_every_choice_matches_the_reference(name, monkeypatch):
    module, _, function = name.partition(".")
    launcher = getattr(import_module(f"trifuse.kernels.gpu.{module}"), function)
    assert len(launcher.choices) > 1
    launch, taken = launcher._launcher, []

    def record(choice, *args):
        taken.append(choice)
        return launch(choice, *args)

    monkeypatch.setattr(launcher, "_launcher", record)
    for choice in launcher.choices:
        with tuning.forced(launcher, choice), backend("triton"):
            CHECKS[name]()
        assert taken
        assert all(c is choice for c in taken)
        taken.clear()
