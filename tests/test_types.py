"""What a type checker knows of kernels and blocks: inside, what ``mypy --strict`` asks for; outside, every operator."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from trifuse import blocks, kernels

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [
    *(f"trifuse.kernels.{name}" for name in kernels.__all__ if callable(getattr(kernels, name)) and name[0].islower()),
    *(f"trifuse.blocks.{name}{'.forward' if name[0].isupper() else ''}" for name in blocks.__all__),
]
# What a user may write, with the mistakes that are to be found; a mistake that is not makes a comment useless.
USER = """
import torch, trifuse.blocks, trifuse.kernels
from torch import Tensor
from typing import assert_type

x, gate = torch.ones(2, 8, 4, 4), torch.ones(2, 8)
assert_type(trifuse.kernels.channel_gate(x, gate), Tensor)
assert_type(trifuse.kernels.residual_layer_norm(x, None, gate[0, :4], None), tuple[Tensor, Tensor])
assert_type(trifuse.kernels.weighted_block_fusion([x[0], x[1]], gate[0, :2]), Tensor)
assert_type(trifuse.kernels.weighted_block_fusion([x[0]], gate[0, :1], torch.tensor([0])), tuple[Tensor, ...])
assert_type(trifuse.blocks.LayerScale(8).forward(x, x), Tensor)
trifuse.kernels.channel_gate(x, 0.5)  # type: ignore[arg-type]
trifuse.kernels.chanel_gate(x, gate)  # type: ignore[attr-defined]
trifuse.blocks.DilatedAttention(8, heads=2)  # type: ignore[call-arg]
"""


def test_lint_asks_of_kernels_and_blocks_what_strict_does():
    pytest.importorskip("mypy", reason="mypy comes with the extra dev alone")
    text = subprocess.run([sys.executable, "-m", "mypy", "--help"], capture_output=True, text=True, check=True).stdout
    described = re.search(r"--strict +Strict mode; enables the following flags:(.*?)\n  --\w", text, re.DOTALL)[1]
    flags = re.sub(r"-\s+", "-", described).replace(" ", "").replace("\n", "").split(",")
    asked = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    strict = next(each for each in settings["overrides"] if each["module"] == ["trifuse.kernels.*", "trifuse.blocks.*"])
    given = {f"no_{name}" if value is False else name for name, value in {**settings, **strict}.items()}
    assert "disallow_untyped_defs" in asked
    assert asked - given == set()


def test_every_function_beside_the_triton_kernels_has_types():
    for path in sorted((ROOT / "kernels" / "gpu").glob("*.py")):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            if any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list):
                continue
            args = function.args
            taken = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            bare = [arg.arg for arg in taken if arg and arg.annotation is None and arg.arg not in ("self", "cls")]
            assert bare == [], f"{path.name}: {function.name}"
            assert function.returns, f"{path.name}: {function.name}"


def test_a_user_s_mypy_knows_every_operator_and_block():
    pytest.importorskip("mypy", reason="mypy comes with the extra dev alone")
    folder = ROOT / "build" / "user"  # kept: mypy takes ten seconds to read torch for the first time
    python = installed(folder / "environment")
    (folder / "user.py").write_text(USER + "".join(f"reveal_type({name})\n" for name in PUBLIC))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--python-executable={python}", "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', result.stdout)
    assert len(revealed) == len(PUBLIC)
    for name, kind in zip(PUBLIC, revealed, strict=True):
        assert "Any" not in re.findall(r"\w+", kind), f"{name} is {kind}"


def installed(environment: Path) -> Path:
    """Make an environment with trifuse where pip would put it, and all that this one has; return its Python."""
    venv.create(environment, symlinks=True)
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    package = site / "trifuse"
    package.unlink(missing_ok=True)
    package.symlink_to(ROOT)
    return environment / "bin" / "python"
