"""Errors cross processes: loader processes and ranks send theirs, message and all."""

from __future__ import annotations

import pickle

import pytest

from trifuse.architectures.training.checkpoint import SaveError
from trifuse.architectures.training.run_folder import OutputFolderError
from trifuse.kernels import errors

MADE = [
    errors.DataError("a.nii", "dim", got=3, want=4, hint="look"),
    errors.DataError.merge([errors.DataError("a"), errors.DataError("b", "c")]),
    errors.MissingExtra("scipy", "med", "a report"),
    *(kind("words") for kind in (errors.ShapeError, errors.BackendError, errors.UnusableKernel, errors.NoKernelRan)),
    *(kind("words") for kind in (errors.CheckpointError, errors.NumericError, SaveError, OutputFolderError)),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error):
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found)) == (type(error), str(error))
