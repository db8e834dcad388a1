"""The stand-in GPU does what a GPU does, as far as it says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


def test_places_go_with_storages():
    x = torch.arange(6.0, device="cuda")
    assert x.is_cuda
    assert x.get_device() == 0
    for other in (x[1:], x.view(2, 3).T, x + 1, x.float(), x.double(), torch.zeros_like(x), x.new_ones(2), x.detach()):
        assert other.device == torch.device("cuda", 0)
    assert {torch.ones(2).device.type, x.cpu().device.type, x.to("cpu").device.type} == {"cpu"}
    assert torch.zeros_like(x, device="cpu").device.type == "cpu"
    assert torch.tensor([1, 2], device="cuda").is_cuda
    assert torch.as_tensor(x.cpu(), device="cuda").is_cuda
    assert copy.deepcopy(x).is_cuda
    assert x.to("cuda") is x
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda
        assert torch.tensor(1.0).is_cuda


def test_two_places_do_not_mix():
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: torch.where(x > 0, y, x), lambda: y @ x):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    assert (x + torch.tensor(1.0)).is_cuda
    assert x[torch.tensor([0, 2])].is_cuda
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="cuda:1")


def test_gradients_return_to_where_they_come_from():
    weight = torch.ones(3, requires_grad=True)
    (weight.to("cuda", torch.bfloat16) * torch.ones(3, device="cuda")).sum().backward()
    assert weight.grad.device.type == "cpu"
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 4, 2)).to("cuda")
    nn.functional.cross_entropy(
        network(torch.ones(2, 1, 4, 4, device="cuda")), torch.ones(2, device="cuda").long()
    ).backward()
    assert all(parameter.grad.is_cuda for parameter in network.parameters())


def test_each_place_has_its_generators():
    torch.manual_seed(0)
    host = torch.rand(4)
    torch.manual_seed(0)
    device = torch.rand(4, device="cuda")
    assert torch.equal(torch.rand(4), host)  # which the draw on the GPU left alone
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), device)
    generator = torch.Generator("cuda").manual_seed(0)
    assert generator.device.type == "cuda"
    assert torch.rand(4, generator=generator, device="cuda").is_cuda
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(4, generator=generator)
    with torch.random.fork_rng([0]):
        torch.rand(4, device="cuda")
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), device)


def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.ones(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    y = x + 1
    del x, y
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 8000


def test_a_graph_changes_nothing_while_it_is_recorded_and_draws_anew_as_an_eager_step():
    total, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()

    def step():
        total.add_(torch.rand(4, device="cuda")).add_(torch.empty_like(total).bernoulli_(0.5))

    with torch.cuda.graph(graph):
        step()
    assert total.tolist() == [0, 0, 0, 0]
    sums = []
    for run in (step, graph.replay):
        total.zero_()
        torch.cuda.manual_seed(3)
        run()
        run()
        sums.append(total.tolist())
    assert sums[0] == sums[1]


def test_a_graph_repeats_the_operations_and_not_the_python():
    x, calls = torch.ones(3, device="cuda"), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        calls.append("once")
        y = (x * 2).add_(1)
    assert not torch.cuda.is_current_stream_capturing()
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [11.0] * 3
    assert calls == ["once"]


@pytest.mark.parametrize("act", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: torch.cuda.synchronize()])
def test_a_graph_refuses_to_wait(act):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        act(x)


def test_autocast_for_gpus_computes_in_its_type():
    x = torch.ones(2, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (x @ x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cuda")
