"""A folder that cannot be opened as a cohort, and what the error has to say."""

from __future__ import annotations

from functools import partial

import pytest

from trifuse.architectures.data.layouts.open_cohort import open_cohort
from trifuse.kernels.errors import DataError


def refused(root, *words, **options):
    """Assert that opening a cohort fails with a message that has every word, and return the message."""
    return refused_by(partial(open_cohort, root, **options), *words)


def refused_by(read, *words):
    """Assert that reading something fails with a message that has every word, and return the message."""
    with pytest.raises(DataError) as caught:
        read()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)
