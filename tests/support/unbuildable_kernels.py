"""A machine on which Triton is chosen by default, as on a GPU, and no kernel can be built."""

from __future__ import annotations

import pytest

from trifuse.kernels import library

NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable."


def make_unbuildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors choose Triton by default, and every launch fail as it does where there is no C compiler."""

    def refuse(kernel, *arguments, **settings):
        raise RuntimeError(NO_COMPILER)

    def like_a_gpu(device, dtype, op=""):
        return default(device, dtype, op) if (op, device) in library._unusable else ("triton", "")

    default = library.default_backend
    monkeypatch.setattr(library, "_unusable", {})
    monkeypatch.setattr(library, "default_backend", like_a_gpu)
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", refuse)
