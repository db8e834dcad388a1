"""What importing costs: nothing heavy before it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trifuse import kernels

LAZY = {"triton", "xformers", "scipy", "matplotlib", "nibabel", "wfdb", "h5py"}


def output_of(code: str) -> str:
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return child.stdout


def modules_loaded_by(code: str) -> set[str]:
    printed = output_of(f"{code}\nimport sys\nprint('LOADED', *sys.modules)")
    return {name.split(".")[0] for name in printed.rpartition("LOADED ")[2].split()}


def test_importing_kernels_loads_nothing_heavy():
    assert modules_loaded_by("from trifuse.kernels import *") & LAZY == set()


CPU_CALLS = {
    "batch_norm_activation": "torch.randn(1, 3, 4, 4, requires_grad=True), *torch.ones(4, 3)",
    "channel_gate": "torch.ones(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 3)",
    "depthwise_multi_kernel": "torch.ones(1, 3, 8, 8, requires_grad=True), torch.ones(2, 3, 1, 5, 5).unbind()",
    "dice_ce_loss": "torch.zeros(1, 3, 4, 4, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.int64)",
    "dilated_attention": "*torch.ones(3, 1, 4, 4, 24, requires_grad=True), num_heads=3",
    "dilated_attention_weights": "*torch.ones(2, 1, 4, 4, 24, requires_grad=True), num_heads=3",
    "instance_norm_leaky_relu": "torch.randn(1, 3, 4, 4, requires_grad=True), torch.ones(3), torch.zeros(3)",
    "memory_efficient_attention": "*torch.ones(3, 1, 4, 2, 8, requires_grad=True)",
    "monte_carlo_pool": "torch.ones(1, 3, 4, 4, requires_grad=True), scale=2, cell=1",
    "mutation_loss": "[torch.zeros(1, 3, 4, 4, requires_grad=True)] * 2, torch.ones(1, 8, 8, dtype=torch.int64)",
    "residual_layer_norm": "*torch.ones(2, 1, 3, 4, requires_grad=True), torch.ones(4), torch.zeros(4)",
    "segment_film_gate": (
        "torch.ones(1, 3, 4, 4, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.uint8), torch.ones(1, 3), "
        "torch.ones(1, 17), torch.ones(3), torch.ones(1, 2), *torch.zeros(2, 1, 3)"
    ),
    "spatial_gate": "torch.ones(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 1, 4, 4)",
    "temporal_film_gate": (
        "torch.ones(1, 3, 4, 4, requires_grad=True), torch.ones(1, 3), torch.ones(1, 2), *torch.zeros(2, 1, 3)"
    ),
    "upsample_argmax": "[torch.ones(1, 3, 4, 4)], (8, 8)",
    "weighted_block_fusion": "[torch.ones(1, 2, 4, requires_grad=True) for _ in range(3)], torch.zeros(3)",
}


@pytest.fixture(scope="module")
def loaded_by_operators() -> dict[str, list[str]]:
    """Return what import and first call of each operator loaded, one after the other in one child."""
    code = "import sys\nbefore, loaded = set(sys.modules), {}\nimport torch\n"
    for name in kernels.OPERATORS:
        code += f"from trifuse.kernels import {name}\nout = {name}({CPU_CALLS[name]})\n"
        code += "out = out[-1] if isinstance(out, tuple) else out\n"
        code += "if out.requires_grad:\n    out.sum().backward()\n"
        code += f"loaded[{name!r}], before = [*(set(sys.modules) - before)], set(sys.modules)\n"
    return json.loads(output_of(f"{code}import json\nprint(json.dumps(loaded))"))


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_operators_on_a_cpu_load_no_triton(name, loaded_by_operators):
    assert {module.split(".")[0] for module in loaded_by_operators[name]} & LAZY == set()


@pytest.mark.parametrize("words", ["--help", "--version", "train --help", "train fias --help", "data check --help"])
def test_l12_command_answers_without_torch(words):
    """The code is asked for its import times: what a machine under load does to the clock does not count as import."""
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from trifuse.architectures.cli.main import main\n"
        f"sys.argv = ['trifuse', *{words.split()!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert time.process_time() - start < 0.3, time.process_time() - start"
    )
    assert modules_loaded_by(code) & {"torch", "numpy", *LAZY} == set()


def test_tests_find_the_hub_s_package_and_not_the_folder_kernels():
    """Also with `python -m pytest` in the root, which looks for packages there as well."""
    tests = Path(__file__).resolve().parent
    code = (
        "import runpy, sys\nfrom importlib.util import find_spec\n"
        f"sys.path.insert(0, {str(tests.parent)!r})\n"
        f"runpy.run_path({str(tests / 'conftest.py')!r})\n"
        "found = find_spec('kernels')\n"
        "print(found and found.origin)"
    )
    assert output_of(code).strip() != str(tests.parent / "kernels" / "__init__.py")
