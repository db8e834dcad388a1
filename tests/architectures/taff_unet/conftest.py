"""A tiny cohort of scars, shared by the tests of what is trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trifuse.architectures.data.phantoms.scar import write_scar_phantom

CASES, SIZE = 7, (48, 48, 5)


@pytest.fixture(scope="session")
def scar_cohort(tmp_path_factory) -> Path:
    """Return the folder of a cohort of four cases to train on, one to validate and two to test."""
    folder = tmp_path_factory.mktemp("scars") / "phantom"
    write_scar_phantom(folder, CASES, 0, SIZE, val=1, test=2)
    return folder
