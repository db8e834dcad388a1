"""What pip would do to an environment that has torch already: add trifuse, and what it lacks, and leave torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A torch for another device, and what comes with one; packages that ask for a torch of their own choice.
NEVER = ("torch", "triton", "torchvision", "timm")
NEVER_BEGINNING = ("nvidia-", "cuda-")


def planned(*wanted: str) -> dict[str, str]:
    """Return name and version of what ``pip install`` would install here."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *wanted]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    metadata = [package["metadata"] for package in json.loads(result.stdout)["install"]]
    return {package["name"].lower(): package["version"] for package in metadata}


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "all,bench,docs,lightning,mlflow"])
def test_installing_leaves_the_torch_that_is_there(extras):
    plan = planned(f".[{extras}]" if extras else ".")
    assert "trifuse" in plan
    assert not [name for name in plan if name in NEVER or name.startswith(NEVER_BEGINNING)]
