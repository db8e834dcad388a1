"""Training with a compiled forward pass: on this machine's compiler, or eagerly where that fails."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import EVERYTHING, TinyNet, assert_same_run, bits, run
from torch import nn

from trifuse.architectures.training.compiled_forward import CompiledForward
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.architectures.training.signals import Interrupted
from trifuse.kernels.errors import NumericError

COMPILED = "the forward pass of TinyNet is compiled, as one graph"
EAGER = "the forward pass of TinyNet runs eagerly, as it cannot be compiled: "
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
def traced_alone(monkeypatch):
    """Have graphs run as they were traced: what inductor makes of them takes its time."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, options, **rest: compile(run, backend="aot_eager", **rest))


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


def test_each_shape_has_code_of_its_own(tmp_path, said, monkeypatch):
    asked = []
    compile = torch.compile

    def counted(graph, inputs):
        asked.append([tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[1:] == (3, 8, 8)])
        return graph

    monkeypatch.setattr(torch, "compile", lambda run, options, **rest: compile(run, backend=counted, **rest))
    run(tmp_path / "run", compile=True)
    assert asked == [[(4, 3, 8, 8)], [(2, 3, 8, 8)]]


def test_runs_in_one_process_do_not_count_for_each_other(tmp_path, said, traced_alone):
    for number in range(torch._dynamo.config.recompile_limit + 1):
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
    assert bits(tmp_path / "tried") == bits(tmp_path / "eager")


def test_a_machine_without_a_compiler_trains_eagerly(tmp_path, said, monkeypatch):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, options, **rest: compile(run, backend=missing, **rest))
    run(tmp_path / "run", compile=True, epochs=1)
    (line,) = said()
    assert line == f"{EAGER}BackendCompilerFailed: backend='missing' raised: RuntimeError: no C++ compiler"


def test_an_error_of_the_network_is_no_fault_of_the_compiler(tmp_path, said, traced_alone):
    def forward(model, batch):
        return model(batch["imag"])

    with pytest.raises(KeyError, match="imag"):
        run(tmp_path / "run", compile=True, forward=forward)
    assert said() == []


class Failing(CompiledForward):
    """A compiled pass that fails from its second batch on, as of another shape may."""

    error: Exception = RuntimeError("no more shapes")

    def _compile(self):
        if self._is_compiled:
            raise self.error
        return self._eager


def test_what_cannot_be_compiled_later_runs_eagerly_from_there_on(capsys):
    forward = Failing(lambda model, batch: model(batch), print)
    assert [forward(nn.Identity(), number) for number in range(3)] == [0, 1, 2]
    name = "the forward pass of Identity"
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is compiled, as one graph",
        f"{name} runs eagerly from here on, as it cannot be compiled: RuntimeError: no more shapes",
    ]


def test_a_lack_of_memory_is_no_fault_of_the_compiler(capsys):
    forward = Failing(lambda model, batch: model(batch), print)
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
