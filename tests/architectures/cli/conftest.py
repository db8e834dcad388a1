"""Cohorts of each kind, and a run of seconds on each, made once for all commands that read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import ABDOMEN_TRAINING, ATRIA_TRAINING, SCAR_TRAINING

from trifuse.architectures.cli.main import main
from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom


@pytest.fixture(scope="session")
def atria(tmp_path_factory) -> Path:
    """Return a cohort of four left atria, with its split in ``split.json``."""
    folder = tmp_path_factory.mktemp("atria") / "cohort"
    folder.mkdir()
    write_split(folder / "split.json", write_left_atrium_phantom(folder, cases=4, size=(24, 24, 4)))
    return folder


@pytest.fixture(scope="session")
def atria_run(atria, tmp_path_factory) -> Path:
    """Return a finished run of DINO-UNet on the left atria."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "dino_unet", str(atria), "--out", str(out), "--split", str(atria / "split.json")]
    assert main([*words, *ATRIA_TRAINING]) == 0
    return out


@pytest.fixture(scope="session")
def abdomen(tmp_path_factory) -> Path:
    """Return a cohort of three abdomens."""
    folder = tmp_path_factory.mktemp("abdomens") / "abdomen"
    write_abdomen_phantom(folder, cases=3, size=(48, 48, 12))
    return folder


@pytest.fixture(scope="session")
def abdomen_run(abdomen, tmp_path_factory) -> Path:
    """Return a finished run of FIAS on the abdomens."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "fias", str(abdomen), "--out", str(out), *ABDOMEN_TRAINING]) == 0
    return out


@pytest.fixture(scope="session")
def plain_run(scar_cohort, tmp_path_factory) -> Path:
    """Return a finished run of the plain U-Net on the cohort with scars."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert main(["train", "plain_unet", str(scar_cohort), "--out", str(out), *SCAR_TRAINING]) == 0
    return out
