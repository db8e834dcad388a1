"""Every operator compiles as a whole where it runs its Triton kernels, and nothing is warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
from gpu_arguments import ARGUMENTS, keywords, without_keywords

from trifuse import kernels
from trifuse.kernels import library

launching = pytest.importorskip("trifuse.kernels.gpu.launching", reason="these are Triton's launches")

GPU = torch.device("cuda", 63)  # asked about by no other test: the answer is kept for good


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Have CPU tensors take the backend that a GPU's would, with launches that do nothing."""

    def default_backend(device, dtype, op=""):
        return default(GPU, dtype, op)

    default = library.default_backend
    monkeypatch.setattr(library, "default_backend", default_backend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launching, "launch", lambda *arguments, **settings: None)
    torch._dynamo.reset()  # warns of a thing once
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_an_operator_compiles_for_a_gpu_without_a_warning(name, like_a_gpu):
    arguments = next(ARGUMENTS[name]("cpu", torch.float32))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend=keep)
        compiled(*without_keywords(arguments), **keywords(arguments))
    assert ("torch.ops.trifuse." in graphs[0]) == (name not in library.WITHOUT_KERNELS)


def test_a_gpu_too_old_for_the_kernels_is_known_while_compiling(like_a_gpu, monkeypatch):
    old = torch.device("cuda", 62)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reasons = []

    def function(x):
        reasons.append(library.triton_obstacle(old, x.dtype))
        return x + 1

    torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))
    assert reasons == [
        "compute capability (7, 5) of GPU 62 is below the oldest supported, (8, 0)",
    ]


def test_whether_there_is_autocast_is_known_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + library.autocast_available(x.device.type), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert not library.autocast_available("meta")
