"""Blocks of the virtual GPU: what they refuse, in words that help, and that they leave nothing behind."""

from __future__ import annotations

import json

import pytest
from ready_python import SUPPORT, run_with_compiler

pytest.importorskip("triton", reason="the virtual GPU runs what triton compiles")

FINE = (
    "without_a_launch_but_expected",
    "launches_of_an_inner_block",
    "faults_in_either_order",
    "grid_of_nothing",
    "resized_storage",
)
REFUSED = {
    "without_a_launch": ("NoKernelRan", "expected a Triton kernel to be launched in the block"),
    "operator_without_a_kernel": ("BackendError", "upsample_argmax: the Triton backend was forced"),
    "build_that_fails": ("UnusableKernel", "upsample_argmax on cpu"),
    "a_second_thread": ("BackendError", "run the blocks one after the other"),
    "the_same_object_within_itself": ("BackendError", "write virtual_gpu() for the inner block, too"),
    "decorator": ("TypeError", "it is no decorator"),
    "decorator_with_settings": ("TypeError", "it is no decorator"),
    "forgotten_parentheses": ("TypeError", "write `with virtual_gpu():`"),
    "orders_of_a_float": ("TypeError", "orders: expected an int of at least 1, got 1.5"),
    "grid_y": ("BackendError", "expected a grid of 0 to 65535 programs along y"),
    "grid_z": ("BackendError", "expected a grid of 0 to 65535 programs along z"),
    "grid_x": ("BackendError", "expected a grid of 0 to 2147483647 programs along x"),
    "grid_negative": ("BackendError", "got (-1, 1, 1)"),
    "grid_many": ("BackendError", "expected at most 16777216 programs"),
    "fake_tensor": ("UnsupportedInstruction", "copy_kernel: expected x to be a CPU tensor with memory"),
    "endless": ("KernelFaults", "endless: endless_kernel"),
    "interrupted": ("RuntimeError", "interrupted"),
    "device_print": ("UnsupportedInstruction", "virtual_gpu_blocks.py:225; leave tl.device_print out there"),
    "device_assert": ("UnsupportedInstruction", "leave tl.device_assert out there"),
    "noinline": ("UnsupportedInstruction", "it calls a function: noinline=True or tl.device_assert"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict:
    child = run_with_compiler(SUPPORT / "virtual_gpu_blocks.py")
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_every_block_is_looked_at(outcomes):
    assert outcomes.keys() == {*FINE, *REFUSED}


@pytest.mark.parametrize("name", FINE)
def test_a_block_that_is_fine(outcomes, name):
    assert outcomes[name] == "fine"


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_is_refused_in_words_that_help(outcomes, name):
    kind, words = REFUSED[name]
    assert outcomes[name].startswith(f"{kind}: ")
    assert words in " ".join(outcomes[name].split())


FIXTURE = """
import pytest

@pytest.mark.parametrize("what", ["fails", "is skipped", "launches nothing"])
def test(virtual_gpu, what):
    assert what != "fails"
    if what == "is skipped":
        pytest.skip()
"""


def test_the_fixture_asks_for_launches_only_of_a_test_that_passes(tmp_path):
    (tmp_path / "test_it.py").write_text(FIXTURE, encoding="utf-8")
    child = run_with_compiler("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py", folder=tmp_path)
    assert "1 failed, 1 passed, 1 skipped, 1 error" in child.stdout, child.stdout
    assert "NoKernelRan" in child.stdout


def test_a_cache_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    script = SUPPORT / "virtual_gpu_blocks.py"
    child = run_with_compiler(script, "without_a_launch", TRITON_CACHE_DIR=str(tmp_path / "file"))
    assert "expected a folder for Triton's cache that can be written to" in child.stdout, child.stderr


DAMAGE = """
import os, sys
from pathlib import Path
from trifuse.kernels.testing.emulator import machine

def builds():
    machine.library.cache_clear()
    file = Path(machine.library()._name)
    return len(built), file

content, built = Path(machine.library()._name).read_bytes(), []
machine._built = lambda: built.append(1) or content  # quicker than a compiler
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
assert builds()[0] == 1
number, file = builds()
assert number == 1
file.unlink()
file.write_bytes(content[: len(content) // 2])
assert builds()[0] == 2
assert builds()[0] == 2
"""


def test_a_damaged_machine_in_the_cache_is_built_again(tmp_path):
    child = run_with_compiler("-c", DAMAGE, tmp_path)
    assert child.returncode == 0, child.stderr
    said = [line for line in child.stderr.splitlines() if line.startswith("trifuse builds the virtual GPU")]
    assert len(said) == 2, child.stderr
    assert all(f"into {tmp_path}" in line for line in said)
