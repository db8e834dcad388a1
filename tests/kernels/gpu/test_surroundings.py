"""What surrounds the kernels fails: no C compiler, no folder to write to, a fork after CUDA was used."""

from __future__ import annotations

import os

import pytest
import torch
from children import Child
from operator_calls import OPERATORS, calls_of
from torch.testing import assert_close

from trifuse.kernels import backend, library

triton = pytest.importorskip("triton", reason="these are Triton's files")

from triton.runtime import build  # noqa: E402
from triton.runtime.build import compile_module_from_src  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches the interpreter")
FORKED = "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, use 'spawn'"


def step(op):
    """Return the result of a call and its gradients."""
    call = calls_of(op, (1, 2, 2, 3))[0]
    result = call()
    leaves = call.leaves()
    return [result.detach(), *(torch.autograd.grad(result.square().sum(), leaves) if leaves else ())]


def first_do(monkeypatch, work):
    """Have something done before each launch, as Triton does it when a kernel was not built yet."""
    run = InterpretedFunction.run

    def working(kernel, *arguments, **settings):
        work()
        return run(kernel, *arguments, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", working)


@pytest.mark.parametrize("op", ["upsample_argmax", "channel_gate"])
def test_k31_no_c_compiler(op, like_a_gpu, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    first_do(monkeypatch, lambda: compile_module_from_src("int launcher;", "launcher"))
    with pytest.warns(RuntimeWarning, match=rf"plain PyTorch takes over: {op} on cpu: .*Failed to find C compiler"):
        found = step(op)
    with backend("torch"):
        assert_close(found, step(op))


def test_k31_a_c_compiler_that_is_not_there(like_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    if hasattr(build, "_find_compiler"):  # of Triton 3.8, which remembers the first one that it is told
        monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    first_do(monkeypatch, lambda: compile_module_from_src("int launcher;", "launcher"))
    with pytest.warns(RuntimeWarning, match=r"upsample_argmax on cpu: .*needs a C compiler \(CC names it\)"):
        step("upsample_argmax")


def test_k30_triton_s_cache_folder_that_cannot_be_written(like_a_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a folder cannot be made here, whoever asks")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    first_do(monkeypatch, lambda: get_cache_manager("c0de").put("code", "kernel.ptx"))
    with pytest.warns(RuntimeWarning, match="spatial_gate on cpu: .*a folder to write to .TRITON_CACHE_DIR") as warned:
        found = step("spatial_gate")
    assert len(warned) == 1
    with backend("torch"):
        assert_close(found, step("spatial_gate"))


def test_k30_triton_s_cache_folder_that_is_missing_is_made(like_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "made" / "cache"))
    first_do(monkeypatch, lambda: get_cache_manager("c0de").put("code", "kernel.ptx"))
    step("spatial_gate")
    assert list((tmp_path / "made" / "cache").rglob("kernel.ptx"))
    assert library.fallbacks() == {}


@pytest.mark.parametrize("op", ["upsample_argmax", "dilated_attention"])
def test_a_fork_after_cuda_was_used_gets_torch_s_own_error_and_no_fallback(op, like_a_gpu, monkeypatch):
    def refuse():
        raise RuntimeError(FORKED)

    first_do(monkeypatch, refuse)
    with pytest.raises(RuntimeError, match="forked subprocess") as caught:
        step(op)
    assert type(caught.value) is RuntimeError
    assert library.fallbacks() == {}


def test_operators_on_cpu_tensors_work_in_a_fork_after_cuda_was_used(monkeypatch):
    def refuse(*_):
        raise RuntimeError(FORKED)

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)

    def work():
        for op in OPERATORS:
            step(op)
        with backend("triton"):
            step("spatial_gate")

    assert Child(work, TRITON_INTERPRET=os.environ["TRITON_INTERPRET"]).wait(limit_s=250) == 0
