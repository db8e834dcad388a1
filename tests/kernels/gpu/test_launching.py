"""What happens when a Triton kernel cannot be launched: whose fault it is, what is said, and what runs instead."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from trifuse import kernels
from trifuse.kernels import BackendError, backend, library
from trifuse.kernels.errors import UnusableKernel

triton = pytest.importorskip("triton", reason="these are Triton's launches")

from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from trifuse.kernels.gpu import launching  # noqa: E402

GPU_FILES = sorted(Path(launching.__file__).parent.glob("*.py"))
UNKNOWN_GPU = PTXASError("Value 'sm_999' is not defined for option 'gpu-name'")


def ones(*shape):
    return torch.ones(shape, requires_grad=True)


# One call of each operator that has kernels of its own.
CALLS = {
    "batch_norm_activation": lambda: kernels.batch_norm_activation(ones(1, 2, 2, 2), None, None, ones(2), ones(2)),
    "channel_gate": lambda: kernels.channel_gate(ones(1, 2, 2, 2), ones(1, 2)),
    "depthwise_multi_kernel": lambda: kernels.depthwise_multi_kernel(ones(1, 2, 2, 2), [ones(2, 1, 3, 3)]),
    "dilated_attention": lambda: kernels.dilated_attention(*(ones(1, 2, 2, 24) for _ in range(3)), num_heads=3),
    "instance_norm_leaky_relu": lambda: kernels.instance_norm_leaky_relu(ones(1, 2, 2, 2), ones(2), ones(2)),
    "monte_carlo_pool": lambda: kernels.monte_carlo_pool(ones(1, 2, 2, 2), scale=1, cell=0),
    "residual_layer_norm": lambda: kernels.residual_layer_norm(ones(1, 2, 4), ones(1, 2, 4))[1],
    "segment_film_gate": lambda: kernels.segment_film_gate(
        ones(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.uint8), ones(1, 2), ones(1, 3), ones(2), *ones(3, 1, 2)
    ),
    "segmentation_sums": lambda: kernels.dice_ce_loss(ones(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64)),
    "spatial_gate": lambda: kernels.spatial_gate(ones(1, 2, 2, 2), ones(1, 1, 2, 2)),
    "temporal_film_gate": lambda: kernels.temporal_film_gate(
        ones(1, 2, 2, 2), ones(1, 2), ones(1, 2), ones(1, 2), ones(1, 2)
    ),
    "upsample_argmax": lambda: kernels.upsample_argmax([ones(1, 2, 2, 2)], (4, 4)),
    "weighted_block_fusion": lambda: kernels.weighted_block_fusion([ones(1, 2, 4), ones(1, 2, 4)], ones(2)),
}


class Kernel:
    """Stands for a compiled kernel whose launch fails."""

    def __init__(self, error):
        self.error, self.fn = error, type(self)

    def run(self, *arguments, grid, warmup, **settings):
        raise self.error


@pytest.fixture
def unknown_gpu(like_a_gpu, monkeypatch):
    """Pretend that no kernel can be built on a GPU; count the attempts."""
    attempts = []

    def refuse(kernel, *arguments, **settings):
        attempts.append(kernel.fn.__name__)
        raise UNKNOWN_GPU

    monkeypatch.setattr(InterpretedFunction, "run", refuse)
    return attempts


def test_every_launch_goes_through_the_one_place():
    """Elsewhere a kernel is launched as ``kernel[grid](...)``, the call of a subscript, or by its ``run``."""
    launches = {
        path.stem
        for path in GPU_FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (isinstance(node.func, ast.Subscript) or getattr(node.func, "attr", "") == "run")
    }
    assert launches == {"launching"}
    for name in kernels.OPERATORS:
        getattr(kernels, name)  # registers it
    assert set(CALLS) == library._registered


def test_k32_what_a_kernel_needs_too_much_of_is_said():
    maps = (torch.ones(2, 3), torch.ones(5, 7))
    with pytest.raises(BackendError, match="needs 300000 of shared memory where the device has 232448") as caught:
        launching.launch(Kernel(OutOfResources(300000, 232448, "shared memory")), (1,), maps, torch.ones(4), 8)
    assert not isinstance(caught.value, UnusableKernel)
    for words in ("Kernel", "shapes (2, 3), (5, 7), (4,)", "smaller", "backend('torch')"):
        assert words in str(caught.value)


def test_k32_the_operator_is_named(monkeypatch):
    def too_large(*arguments, **settings):
        raise OutOfResources(9, 8, "threads")

    monkeypatch.setattr(InterpretedFunction, "run", too_large)
    with backend("triton"), pytest.raises(BackendError, match="upsample_argmax: _upsample_argmax_kernel needs 9"):
        CALLS["upsample_argmax"]()


def test_k32_out_of_memory_stays_torch_s_own_error_and_says_where(monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr("trifuse.kernels.gpu.upsample_argmax.forward", no_memory)
    with backend("triton"), pytest.raises(torch.OutOfMemoryError, match="2 GiB") as caught:
        CALLS["upsample_argmax"]()
    assert caught.value.__notes__ == [
        "upsample_argmax asked for the memory of its result, for tensors of the shapes (1, 2, 2, 2)"
    ]


@pytest.mark.parametrize(
    "error",
    [
        UNKNOWN_GPU,
        CompilationError("x = 1", None, "no such instruction"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        RuntimeError("PassManager::run failed"),
        RuntimeError("0 active drivers ([]). There should only be one."),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "Permission denied", "/cache"),
    ],
    ids=str,
)
def test_kernel_that_never_ran_is_unusable(error):
    with pytest.raises(UnusableKernel, match="Kernel cannot be built: ") as caught:
        launching.launch(Kernel(error), (1,))
    assert caught.value.__cause__ is error
    assert " ".join(str(error).split())[:60] in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ..."),
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        InterpreterError("IndexError"),
        TypeError("missing a required argument"),
    ],
    ids=str,
)
def test_other_errors_pass_untouched(error):
    with pytest.raises(type(error)) as caught:
        launching.launch(Kernel(error), (1,))
    assert caught.value is error


@pytest.mark.parametrize("op", CALLS)
def test_k31_plain_pytorch_takes_over_with_one_warning(op, unknown_gpu):
    with backend("torch"):
        expected = CALLS[op]()
    with pytest.warns(RuntimeWarning) as warned:
        result = CALLS[op]()
    (warning,) = warned
    for words in ("plain PyTorch takes over", f"{op} on cpu", f"{unknown_gpu[0]} cannot be built", "sm_999"):
        assert words in str(warning.message)
    assert_close(result, expected)
    if result.requires_grad:
        result.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(CALLS[op](), expected)
    assert len(unknown_gpu) == 1
    chosen, reason = library.default_backend(torch.device("cpu"), torch.float32, op)
    assert chosen == "torch"
    assert "sm_999" in reason


def test_k31_triton_that_does_not_load_is_a_reason_too(unknown_gpu, monkeypatch):
    monkeypatch.delattr("trifuse.kernels.gpu.upsample_argmax")
    monkeypatch.setitem(sys.modules, "trifuse.kernels.gpu.upsample_argmax", None)
    with pytest.warns(RuntimeWarning, match="plain PyTorch takes over: upsample_argmax on cpu: .*upsample_argmax"):
        CALLS["upsample_argmax"]()
    assert unknown_gpu == []


def test_k31_a_forced_backend_does_not_fall_back(unknown_gpu):
    for _ in range(2):
        with backend("triton"), pytest.raises(BackendError, match=r"weighted_block_fusion on cpu: .*sm_999.*'torch'"):
            CALLS["weighted_block_fusion"]()
    assert len(unknown_gpu) == 2


def test_k31_backward_says_what_to_do_and_the_next_step_runs(unknown_gpu, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(launching, "launch", lambda *arguments, **settings: None)
        result = CALLS["weighted_block_fusion"]()
    with pytest.raises(BackendError, match=r"_fusion on cpu: .*sm_999.*repeat the step, .*backend.'torch'"):
        result.sum().backward()
    CALLS["weighted_block_fusion"]().sum().backward()
    assert len(unknown_gpu) == 1


def test_k31_where_kernels_are_forced_a_step_repeated_is_no_remedy(unknown_gpu, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(launching, "launch", lambda *arguments, **settings: None)
        result = CALLS["weighted_block_fusion"]()
    with backend("triton"), pytest.raises(BackendError, match=r"sm_999.*; run it inside: .*backend.'torch'") as caught:
        result.sum().backward()
    assert "repeat" not in str(caught.value)


def test_k31_compiled_code_says_what_to_do_and_runs_when_called_again(unknown_gpu):
    compiled = torch.compile(lambda maps, logits: kernels.weighted_block_fusion(maps, logits), backend="eager")
    maps, logits = [torch.randn(1, 2, 4) for _ in range(2)], torch.zeros(2)
    with pytest.raises(BackendError, match=r"sm_999.*backend.'torch'"):
        compiled(maps, logits)
    assert_close(compiled(maps, logits), (maps[0] + maps[1]) / 2)
    assert len(unknown_gpu) == 1
