"""Triton's interpreter at a third of its cost: without what it does over and over, or to no effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Prepare each function that kernels call once, not at every call, and look numpy's types up in a cache.

    Nor is every integer sum computed a second time in 64 bits: without `debug`, nobody compares the two.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    prepare, numpy_type = interpreter._patch_lang, cache(interpreter._get_np_dtype)
    prepared = set()

    def call(function, *args, **kwargs):
        if function.fn not in prepared:
            prepare(function.fn)
            prepared.add(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def numpy_type_of(kind):
        return numpy_type(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)

    with ExitStack() as changes:
        for place, name, changed in (
            (interpreter.InterpretedFunction, "__call__", call),
            (interpreter, "_get_np_dtype", numpy_type_of),
            (builder, "options", replace(builder.options, sanitize_overflow=False)),
        ):
            changes.enter_context(mock.patch.object(place, name, changed))
        yield
