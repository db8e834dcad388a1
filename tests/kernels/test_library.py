"""Which backend a tensor gets."""

from __future__ import annotations

import torch

from trifuse.kernels import library

CPU = torch.device("cpu")


def test_cpu_tensors_choose_the_kernels_only_where_a_driver_runs_them_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def chosen(dtype):
        return library.default_backend(CPU, dtype)[0], library.triton_obstacle(CPU, dtype) == ""

    assert chosen(torch.float32) == ("torch", False)
    with library.compiled_on_cpu():
        assert chosen(torch.float32) == ("triton", True)
        assert chosen(torch.float64) == ("torch", False)
    assert chosen(torch.float32) == ("torch", False)
