"""Tuning: what is chosen, when, how it is kept, what can go wrong; and that every choice computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest
import torch

from trifuse import kernels
from trifuse.kernels import BackendError, backend, warm_up
from trifuse.kernels.testing import assert_op_matches, comparing
from trifuse.kernels.testing.comparing import Case, Comparison, Pass

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
    ({"threads": 64}, {"threads": 128}, {"threads": 256}), lambda x: tuning.key_of(x, True)
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
    assert place.startswith("toy.forward | torch.float32 | 8 | True | Some GPU | triton 3.")
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


def test_form_that_does_not_suit_is_not_timed(start_over, monkeypatch):
    toy = start_over()
    monkeypatch.setattr(toy.toy, "_is_candidate", lambda choice, x: choice["threads"] <= len(x))
    assert warm_up(toy, 128) == 128
    assert toy.timed == [64, 128]


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


def test_comparisons_time_kernels_in_their_fastest_form(start_over, monkeypatch):
    toy = start_over()

    def doubled(x):
        assert toy(8) in (64, 256)
        return 2 * x

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(comparing, "measure", lambda sound, **settings: sound["doubled"]() and {})
    one = Comparison("toy", [], [], {"doubled": doubled}, doubled)
    one._measure(Case("one", lambda device: (torch.ones(2),)), Pass("forward"), 0.01)
    assert one.refused == []
    assert toy.timed == [64, 128, 256]
    assert toy.launches[-1] == 256


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
    """Two children start together, each finding choices of its own and saving after each."""
    start_over()
    script = TOY + (
        "import sys\n"
        "tuning.gpu_name, tuning.milliseconds = (lambda device: f'GPU {sys.argv[1]}'), ticks\n"
        "torch.cuda.is_current_stream_capturing = lambda: False\n"
        "sys.stdin.readline()\n"
        "for power in range(40):\n"
        "    tuning.warm_up(toy, torch.empty(2**power, device='meta'))\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(n)], stdin=subprocess.PIPE, text=True) for n in range(2)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.close()
    assert [child.wait(timeout=100) for child in children] == [0, 0]
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


def tunables(op: str) -> list[tuning.Tunable]:
    """Return the launchers with choices that an operator comes by."""
    launchers = {value.name: value for file in GPU_FILES for value in vars(file).values() if is_tunable(value)}
    return [launchers[name] for name in CHECKS[op][0]]


def is_tunable(value: object) -> bool:
    return isinstance(value, tuning.Tunable)


def check(op: str, *args, **kwargs) -> None:
    assert_op_matches(getattr(kernels, op), getattr(kernels, f"{op}_reference"), *args, **kwargs)


def check_sums() -> None:
    """A coarse map, whose rows are walked over, and a full one, which is one line of pixels."""
    check("mutation_loss", [values(1, 2, 4, 2)], torch.arange(17 * 3).view(1, 17, 3) % 2, atol=1e-5)
    check("mutation_loss", [values(1, 2, 35, 31)], torch.arange(35 * 31).view(1, 35, 31) % 2, atol=1e-5)


def check_labels() -> None:
    maps, size = [values(1, 3, 2, 3)], (2, 300)
    assert torch.equal(kernels.upsample_argmax(maps, size), kernels.upsample_argmax_reference(maps, size))


GPU_FILES = [
    import_module(f"trifuse.kernels.gpu.{path.stem}") for path in sorted(Path(tuning.__file__).parent.glob("[a-z]*.py"))
]
# For each operator the launchers that it comes by, and a comparison with the reference on more than one tile.
CHECKS = {
    "channel_gate": (
        ("gates.gate_forward",),
        lambda: check("channel_gate", values(1, 2, 33, 65), values(1, 2, seed=1), atol=2e-4),
    ),
    "depthwise_multi_kernel": (
        ("depthwise_multi_kernel.convolve", "depthwise_multi_kernel.weight_gradients"),
        lambda: check("depthwise_multi_kernel", values(1, 2, 5, 3), [values(2, 1, 3, 3, seed=1)], atol=1e-5),
    ),
    "dilated_attention": (
        ("dilated_attention.forward", "dilated_attention.backward"),
        lambda: check(
            "dilated_attention", *(values(1, 5, 14, 8, seed=i) for i in range(3)), num_heads=1, dilations=(1,)
        ),
    ),
    "monte_carlo_pool": (
        ("monte_carlo_pool.pool_forward", "monte_carlo_pool.pool_backward"),
        lambda: check("monte_carlo_pool", values(1, 2, 33, 65), scale=1, cell=0),
    ),
    "segmentation_sums": (("segmentation_sums.forward", "segmentation_sums_backward.backward"), check_sums),
    "spatial_gate": (
        ("gates.gate_forward", "gates.spatial_gate_backward"),
        lambda: check("spatial_gate", values(1, 40, 5, 13), values(1, 1, 5, 13, seed=1), atol=1e-5),
    ),
    "temporal_film_gate": (
        ("temporal_film_gate.forward",),
        lambda: check(
            "temporal_film_gate", values(1, 2, 33, 65), *(values(1, 2, seed=i) for i in range(1, 5)), atol=2e-4
        ),
    ),
    "upsample_argmax": (("upsample_argmax.forward",), check_labels),
    "weighted_block_fusion": (
        ("weighted_block_fusion.forward", "weighted_block_fusion.backward"),
        lambda: check("weighted_block_fusion", [values(1, 5, 211, seed=i) for i in (1, 2)], values(2), atol=1e-4),
    ),
}


def test_every_launcher_with_choices_is_compared():
    found = {value.name for file in GPU_FILES for value in vars(file).values() if is_tunable(value)}
    assert found == {name for names, _ in CHECKS.values() for name in names}


@interpreted
@pytest.mark.parametrize("op", CHECKS)
def test_every_choice_matches_the_reference(op, monkeypatch):
    """All launchers of an operator take their first choice, then all their second, and so on."""
    launchers = tunables(op)
    taken = {launcher.name: [] for launcher in launchers}
    for launcher in launchers:

        def record(choice, *args, launcher=launcher, launch=launcher._launcher, **kwargs):
            taken[launcher.name].append(choice)
            return launch(choice, *args, **kwargs)

        monkeypatch.setattr(launcher, "_launcher", record)
    for n in range(max(len(launcher.choices) for launcher in launchers)):
        with ExitStack() as stack:
            for launcher in launchers:
                stack.enter_context(tuning.forced(launcher, launcher.choices[n % len(launcher.choices)]))
            stack.enter_context(backend("triton"))
            CHECKS[op][1]()
    for launcher in launchers:
        assert len(launcher.choices) > 1
        assert all(choice in taken[launcher.name] for choice in launcher.choices)
