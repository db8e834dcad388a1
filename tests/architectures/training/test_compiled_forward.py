"""Training with a compiled forward pass: on this machine's compiler, or eagerly where that fails."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file
from tiny_run import EVERYTHING, Squares, TinyNet, assert_same_run, bits, run
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from trifuse.architectures.training import compiled_forward
from trifuse.architectures.training.compiled_forward import Compilation, CompiledForward
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.signals import Interrupted
from trifuse.architectures.training.training_state import read_position
from trifuse.kernels.errors import NumericError

COMPILED = "the forward pass of TinyNet is compiled, as one graph"
EAGER = "the forward pass of TinyNet runs eagerly from step 1 on, as it could not be compiled: "
OPTIONS = {**EVERYTHING, "optimizer": "sgd"}  # Adam makes a step of the noise where a gradient is zero


class StoppingLoss(SegmentationLoss):
    """A loss that sends this process a signal when it is called for the n-th time."""

    def __init__(self, call):
        super().__init__()
        self.__dict__["left"] = call

    def __call__(self, outputs, batch, reduce):
        self.__dict__["left"] -= 1
        if self.__dict__["left"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(outputs, batch, reduce)


@pytest.fixture
def said(capsys):
    return lambda: [line for line in capsys.readouterr().out.splitlines() if "the forward pass of" in line]


@pytest.fixture
def compiled_by(monkeypatch):
    """Have graphs compiled by another backend: what inductor makes of them takes its time."""
    compile = torch.compile

    def choose(backend):
        monkeypatch.setattr(torch, "compile", lambda run, options, **rest: compile(run, backend=backend, **rest))

    return choose


@pytest.fixture
def traced_alone(compiled_by):
    """Have graphs run as they were traced."""
    compiled_by("aot_eager")


def rounding(graph, inputs):
    """A backend that rounds otherwise than eager code does."""
    return lambda *given: [out * (1 + 1e-6) for out in graph(*given)]


class Compiler:
    """A backend that, when it is called for the n-th time, fails; asked to stop by the signal that ended it, maybe."""

    __name__ = "killed"

    def __init__(self, call, number=None):
        self.left, self.number = call, number

    def __call__(self, graph, inputs):
        self.left -= 1
        if self.left == 0:
            if self.number is not None:
                os.kill(os.getpid(), self.number)
            raise RuntimeError("killed")
        return rounding(graph, inputs)


def weights_of(out):
    return {name: found for name, found in bits(out).items() if name.endswith(".safetensors")}


def test_a_compiled_run_is_the_eager_one_but_for_rounding(tmp_path, said):
    """With dropout, statistics, averages, micro-batches and clipping; stopped and resumed, it has the same bits."""
    run(tmp_path / "eager", **OPTIONS)
    assert said() == []
    run(tmp_path / "compiled", compile=True, **OPTIONS)
    assert said() == [COMPILED]
    assert_same_run(tmp_path / "eager", tmp_path / "compiled")
    assert bits(tmp_path / "eager") != bits(tmp_path / "compiled")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", compile=True, loss=StoppingLoss(8), **OPTIONS)
    run(tmp_path / "cut", compile=True, resume=True, **OPTIONS)
    assert bits(tmp_path / "cut") == bits(tmp_path / "compiled")
    plain, compiled = (load_file(tmp_path / name / "last/model.safetensors") for name in ("eager", "compiled"))
    assert {*compiled} == {*plain}


def test_each_shape_has_code_of_its_own(tmp_path, said, compiled_by):
    asked = []

    def counted(graph, inputs):
        asked.append([tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[1:] == (3, 8, 8)])
        return graph

    compiled_by(counted)
    run(tmp_path / "run", compile=True)
    assert asked == [[(4, 3, 8, 8)], [(2, 3, 8, 8)]]


def test_runs_in_one_process_do_not_count_for_each_other(tmp_path, said, traced_alone, monkeypatch):
    monkeypatch.setattr(compiled_forward, "MOST_SHAPES", 1)
    for number in range(3):
        run(tmp_path / str(number), compile=True, epochs=1, batch_size=10, width=2 + 2 * number)
    assert set(said()) == {COMPILED}


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(tmp_path, said):
    def forward(model, batch):
        torch._dynamo.graph_break()
        return model(batch["image"])

    run(tmp_path / "eager", forward=forward, **OPTIONS)
    run(tmp_path / "tried", forward=forward, compile=True, **OPTIONS)
    (line,) = said()
    assert line.startswith(f"{EAGER}Unsupported: ")
    assert weights_of(tmp_path / "tried") == weights_of(tmp_path / "eager")


def test_a_machine_without_a_compiler_trains_eagerly(tmp_path, said, compiled_by):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compiled_by(missing)
    run(tmp_path / "run", compile=True, epochs=1)
    (line,) = said()
    assert line == f"{EAGER}BackendCompilerFailed: backend='missing' raised: RuntimeError: no C++ compiler"


def test_an_error_of_the_network_is_no_fault_of_the_compiler(tmp_path, said, traced_alone):
    def forward(model, batch):
        return model(batch["imag"])

    with pytest.raises(KeyError, match="imag"):
        run(tmp_path / "run", compile=True, forward=forward)
    assert said() == []


@pytest.mark.parametrize(("call", "accumulate", "saved"), [(1, 1, 0), (2, 1, 3), (2, 2, 0)])
def test_a_signal_that_ends_the_compiler_stops_before_the_step(tmp_path, said, compiled_by, call, accumulate, saved):
    """As Ctrl-C does, which every process of a terminal gets: no eager step stands in for a compiled one.

    Where a micro-batch of the step was computed already, the run goes on from the checkpoint before.
    """
    options = {**OPTIONS, "batch_size": 3, "accumulate": accumulate, "compile": True}
    compiled_by(rounding)
    run(tmp_path / "whole", **options)
    compiled_by(Compiler(call, signal.SIGINT))
    with pytest.raises(Interrupted, match=f"stopped by SIGINT after step {saved}; resume to continue"):
        run(tmp_path / "cut", **options)
    compiled_by(rounding)
    run(tmp_path / "cut", **options, resume=True)
    assert {*said()} == {COMPILED}
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


def test_a_run_that_fell_back_stays_eager_until_it_is_forced(tmp_path, said, compiled_by):
    """A compiler that is back changes no bit; sessions tell what was said of each, and when."""
    options = {"schedule": "constant", "compile": True}
    compiled_by(Compiler(2))
    run(tmp_path / "whole", **options)
    compiled_by(Compiler(2))
    run(tmp_path / "cut", epochs=1, **options)
    compiled_by(rounding)
    run(tmp_path / "cut", **options, resume=True)
    eager = EAGER.replace("step 1", "step 3") + "BackendCompilerFailed: "
    _, first, again = (line for line in said() if line != COMPILED)
    assert first == again
    assert first.startswith(eager)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    notes = [json.loads(line) for line in (tmp_path / "cut" / "sessions.jsonl").read_text().splitlines()]
    assert [(note.get("step"), note.get("said")) for note in notes] == [
        *[(None, None), (1, COMPILED), (3, first)],
        *[(None, None), (4, first)],
    ]
    run(tmp_path / "cut", epochs=4, **options, force_resume=True)
    assert said() == [COMPILED]
    found = read_position(tmp_path / "cut" / "last").compilation
    assert ([*found.shapes.values()], found.eager_since) == ([10, 12], None)


class OfManySizes(Squares):
    """Squares of which each has another size, in the order of the epoch; a signal stops the run at the n-th sample."""

    def __init__(self, length, left=0):
        super().__init__(length)
        self.left = left

    def __getitem__(self, key):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        sample, wider = super().__getitem__(key), (0, key[2])
        padded = {name: torch.nn.functional.pad(sample[name], wider) for name in ("image", "target")}
        return sample | padded


@pytest.mark.parametrize("stopped_at", [2, 4, 6])
def test_of_too_many_shapes_those_too_many_run_eagerly(tmp_path, said, compiled_by, monkeypatch, stopped_at):
    """Whichever a resumed run meets first: those that were compiled are compiled again, and no others."""
    monkeypatch.setattr(compiled_forward, "MOST_SHAPES", 2)
    widths = []

    def counted(graph, inputs):
        compiled = rounding(graph, inputs)
        return lambda *given: widths.extend({x.shape[-1] for x in given if x.shape[1:3] == (3, 8)}) or compiled(*given)

    compiled_by(counted)
    options = {"epochs": 2, "batch_size": 1, "compile": True}
    run(tmp_path / "whole", data=OfManySizes(4), **options)
    assert len(widths) == 4  # two shapes in each epoch
    assert {*widths} == {*widths[:2]}
    surplus = "the forward pass of TinyNet runs eagerly for batches of other shapes than the first 2"
    assert said() == [COMPILED, surplus]
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", data=OfManySizes(4, left=stopped_at), **options)
    run(tmp_path / "cut", data=OfManySizes(4), **options, resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    found = read_position(tmp_path / "whole" / "last").compilation
    assert ([*found.shapes.values()], found.surplus_since) == ([1, 2], 3)
    assert all(shape.startswith("image float32[1, 3, 8, ") for shape in found.shapes)


def test_a_backward_pass_that_cannot_be_compiled_is_found_before_anything_is_computed(tmp_path, said, compiled_by):
    def backward(graph, inputs):
        raise RuntimeError("no such gradient")

    compiled_by(aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=backward))
    run(tmp_path / "tried", compile=True, **OPTIONS)
    run(tmp_path / "eager", **OPTIONS)
    (line,) = said()
    assert line.endswith("RuntimeError: no such gradient")
    assert weights_of(tmp_path / "tried") == weights_of(tmp_path / "eager")


@pytest.mark.parametrize(
    ("compilation", "words"),
    [
        (Compilation({"a": 3, "b": 1}), "compiled from step 1 on, for batches of 2 shapes"),
        (Compilation(eager_since=1, reason="no"), "all eager from step 1 on, as it could not be compiled: no"),
        (
            Compilation({"a": 1}, 2, 3, "no"),
            "compiled from step 1 on, for batches of 1 shape; batches of other shapes eager from step 2 on; "
            "all eager from step 3 on, as it could not be compiled: no",
        ),
    ],
)
def test_what_was_compiled_is_said_in_words(compilation, words):
    assert compilation.describe() == words


class Failing(CompiledForward):
    """A compiled pass that fails from its second batch on, as of another shape may."""

    error: Exception = RuntimeError("no more shapes")

    def _compile(self):
        if self.compilation.shapes:
            raise self.error
        return self._eager


def test_what_cannot_be_compiled_later_runs_eagerly_from_there_on(capsys):
    forward = Failing(lambda model, batch: model(batch), print, lambda: False)
    forward.step = 7
    assert [forward(nn.Identity(), number) for number in range(3)] == [0, 1, 2]
    name = "the forward pass of Identity"
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is compiled, as one graph",
        f"{name} runs eagerly from step 7 on, as it could not be compiled: RuntimeError: no more shapes",
    ]


def test_a_lack_of_memory_is_no_fault_of_the_compiler(capsys):
    forward = Failing(lambda model, batch: model(batch), print, lambda: False)
    forward.error = torch.OutOfMemoryError("too large")
    forward(nn.Identity(), 0)
    with pytest.raises(torch.OutOfMemoryError):
        forward(nn.Identity(), 1)
    assert "eagerly" not in capsys.readouterr().out


class Burst(nn.Module):
    def forward(self, x):
        return torch.where(x == x.max(), torch.inf, x)


def test_a_number_that_is_not_finite_is_sought_in_the_eager_pass(tmp_path, said, traced_alone):
    """What looks at the modules is no part of the code that was compiled."""
    model = TinyNet()
    model.norm = Burst()
    with pytest.raises(NumericError, match=r"first seen in the output of module 'norm' \(Burst\)"):
        run(tmp_path / "run", compile=True, model=model)
    assert said() == [COMPILED]


def test_compiling_is_no_free_choice_of_a_resumed_run(tmp_path):
    """It rounds otherwise; who wants it nevertheless forces it."""
    run(tmp_path / "run", epochs=1)
    with pytest.raises(OutputFolderError, match=r"recipe\.compile: False -> True"):
        run(tmp_path / "run", epochs=2, compile=True, resume=True)
