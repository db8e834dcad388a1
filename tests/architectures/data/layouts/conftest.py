"""A cohort in the layout of LAScarQS."""

from __future__ import annotations

import pytest

from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom


@pytest.fixture(scope="module")
def lascarqs(tmp_path_factory):
    root = tmp_path_factory.mktemp("lascarqs")
    write_left_atrium_phantom(root, cases=11, size=(24, 24, 6))
    return root
