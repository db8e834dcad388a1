"""A folder that cannot be opened as a cohort, and what the error has to say."""

from __future__ import annotations

import pytest

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.kernels.errors import DataError


def refused(root, *words, **options):
    """Assert that opening fails with a message that has every word."""
    with pytest.raises(DataError) as caught:
        open_cohort(root, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
