"""A sound NIfTI file."""

from __future__ import annotations

import pytest
from nifti_files import save


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "good.nii.gz")
