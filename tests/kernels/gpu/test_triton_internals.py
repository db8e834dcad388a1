"""Every name of Triton that its documentation does not promise does what is relied on, in every supported version."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="these are Triton's names")

import triton.language as tl  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from trifuse.kernels.gpu import triton_internals  # noqa: E402
from trifuse.kernels.testing.emulator.driver import VirtualDriver  # noqa: E402

# Compiles a kernel for a GPU that is not here, and says what came of it.
COMPILING = """
import json, sys
from trifuse.kernels.gpu.triton_internals import *
from trifuse.kernels.gpu.triton_internals import get_cache_manager
sys.path.insert(0, sys.argv[1])
from costly_kernels import copy_kernel as kernel

signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}

def compiled(line, aligned=(0, 1), disable_line_info=True):
    kernel.starting_line_number = line
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 1024}, attrs=attributes)
    with compilation.scope():
        compilation.disable_line_info, compilation.store_binary_only = disable_line_info, True
        return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

wide, narrow = compiled(0), compiled(0, aligned=())
kept = get_cache_manager("0" * 64)
before = kept.get_file("cost.json")
path = kept.put("3", "cost.json", binary=False)
print(json.dumps({
    "asm": [stage in wide.asm for stage in ("cubin", "ptx")],
    "shared": wide.metadata.shared, "is_elf": wide.asm["cubin"][:4] == b"\\x7fELF",
    "alignment_matters": wide.asm["cubin"] != narrow.asm["cubin"],
    "line_matters": wide.asm["cubin"] != compiled(5).asm["cubin"],
    "line_information_matters": wide.asm["cubin"] != compiled(5, disable_line_info=False).asm["cubin"],
    "scope_ends": [compilation.disable_line_info, compilation.store_binary_only],
    "cache": [before, open(path).read(), kept.get_file("cost.json") == path],
    "tools": [(NVIDIA_TOOLS / name).is_file() for name in ("cuobjdump", "nvdisasm")],
}))
"""


def doubling(x, out, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out + offset, 2 * tl.load(x + offset))


doubling_kernel = triton.jit(doubling)


def test_errors_tell_a_failed_build_from_a_failed_launch():
    assert issubclass(CompilationError, triton_internals.TritonError)
    assert issubclass(PTXASError, triton_internals.TritonError)
    assert issubclass(triton_internals.InterpreterError, triton_internals.TritonError)
    error = triton_internals.OutOfResources(300, 200, "shared memory")
    assert (error.required, error.limit, error.name) == (300, 200, "shared memory")
    assert isinstance(error, triton_internals.TritonError)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="launches on CPU tensors")
def test_run_launches_in_the_interpreter():
    x, out = torch.arange(4.0), torch.zeros(4)
    doubling_kernel.run(x, out, grid=(1,), warmup=False, N=4)
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_an_index_is_run_for_compiled_kernels(monkeypatch):
    """What `kernel[grid](...)` passes to `run` is what our launches pass to it."""
    given = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **settings: given.append((args, settings)))
    JITFunction(doubling)[(3,)](1, 2, N=4, num_warps=8)
    assert given == [((1, 2), {"grid": (3,), "warmup": False, "N": 4, "num_warps": 8})]


def test_interpreted_numbers_take_no_more_memory_than_their_type():
    """Here as in Triton's own interpreter, of which the tests run a quicker form."""
    handle = pytest.importorskip("triton.runtime.interpreter").TensorHandle
    for _ in range(2):
        handle(np.zeros(1, np.float32), tl.float32)
        with pytest.raises(ValueError, match="exceeds"):
            handle(np.zeros(1, np.float64), tl.float32)


def test_interpreted_numbers_are_rounded_to_the_nearest_bfloat16_as_on_a_gpu():
    """Triton's own interpreter cuts the digits off that go; here all of them are tried, and numbers of other kinds."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def rounded(bits):
        handle = interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        return interpreter.interpreter_builder.create_fp_trunc(handle, tl.bfloat16).data

    digits = np.arange(1 << 16, dtype=np.uint32)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40], np.float32).view(np.uint32)
    for bits in (digits | 0x3F800000, digits | 0xBF810000, odd, odd[:0], np.array(0x3F80FFFF, np.uint32)):
        to_nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # of two as near, the even one
        assert rounded(bits).shape == bits.shape
        assert rounded(bits).tolist() == to_nearest.tolist()
    assert rounded(np.array(0x7F800001, np.uint32)).item() & 0x7FFF > 0x7F80, "NaN stays NaN"


@pytest.mark.parametrize("kernel", [doubling_kernel, JITFunction(doubling)], ids=["as defined", "compiled"])
def test_a_kernel_knows_its_function_and_arguments(kernel):
    assert kernel.fn is doubling
    assert list(kernel.arg_names) == ["x", "out", "N"]


def test_kernels_are_compiled_for_gpus_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    support = Path(__file__).parents[2] / "support"
    child = subprocess.run(
        [sys.executable, "-c", COMPILING, str(support)], capture_output=True, text=True, env=environment
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {
        "asm": [True, False],  # binaries alone
        "shared": 0,
        "is_elf": True,
        "alignment_matters": True,
        "line_matters": False,
        "line_information_matters": True,
        "scope_ends": [False, False],
        "cache": [None, "3", True],
        "tools": [True, True],
    }


def test_building_a_kernel_launches_nothing_and_loads_what_was_compiled():
    launched, loaded = [], []
    kernel = triton.jit(lambda: launched.append(True))
    if hasattr(kernel, "rewriter"):  # interpreted
        assert kernel.run(grid=(1,), warmup=True) is None
    compiled = object.__new__(CompiledKernel)
    compiled._init_handles = lambda: loaded.append(True)
    compiled[(1,)]
    assert (launched, loaded) == ([], [True])


def test_a_shared_library_is_built_from_cpp(tmp_path):
    source = tmp_path / "answer.cpp"
    source.write_text('#include <vector>\nextern "C" int answer() { return std::vector<int>{42}.back(); }\n')
    built = triton_internals.build_shared_library("answer", str(source), str(tmp_path), [], [], ["stdc++"], ["-O1"])
    assert ctypes.CDLL(built).answer() == 42


def test_launches_go_through_a_driver_inside_a_block():
    hook = triton.knobs.runtime.kernel_load_start_hook
    driver, heard = VirtualDriver(run=lambda *launch: None), []

    def before_loading(*arguments):
        heard.append(arguments)

    former = triton.runtime.driver._active
    with triton_internals.launching_through(driver, before_loading):
        assert triton_internals.active_driver() is driver
        hook("module", "function", "name", {"kernel.ptx": "path"}, "key")
    hook("module", "function", "name", {}, "key")
    assert triton.runtime.driver._active is former
    assert heard == [("module", "function", "name", {"kernel.ptx": "path"}, "key")]
