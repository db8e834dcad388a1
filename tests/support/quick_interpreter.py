"""Triton's interpreter at a fraction of its cost: without what it does over and over, or to no effect.

And with the rounding of a GPU: to the nearest bfloat16, where the interpreter cuts the further digits off, which makes
every stored result too small and doubles its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

KEPT = {"int32": 1 << 31, "int64": 1 << 63, "uint64": 0, "fp32": 0, "fp64": 0}
"""The types of which two make the same, whatever the operation; below which number an `int` does not change that."""


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Prepare each function that kernels call once, not at every call, and look numpy's types up in a cache.

    Nor is every integer sum computed a second time in 64 bits: without `debug`, nobody compares the two. What a tensor
    knows of its shape is worked out once per type. Where nothing is to be converted, that is seen at once.
    Numbers are rounded by PyTorch.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with ExitStack() as changes:
        for place, name, quick in (
            (interpreter.InterpretedFunction, "__call__", _calling(interpreter._patch_lang)),
            (interpreter, "_convert_float", _rounding(interpreter._convert_float)),
            (interpreter, "_get_np_dtype", _numpy_types(interpreter._get_np_dtype)),
            (interpreter.TensorHandle, "__post_init__", _item_sizes(interpreter.TensorHandle.__post_init__)),
            (core.block_type, "__init__", _block_types(core.block_type.__init__)),
            (core.tensor, "__init__", _tensors(core.tensor.__init__)),
            (core.dtype, "__eq__", _equality(core.dtype.__eq__)),
            (core, "_unwrap_if_constexpr", _unwrapping(core._unwrap_if_constexpr)),
            (semantic.TritonSemantic, "cast", _casting(semantic.TritonSemantic.cast)),
            *_operands(semantic.TritonSemantic),
        ):
            changes.enter_context(mock.patch.object(place, name, quick))
        changes.enter_context(mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)))
        yield


def _calling(prepare: Callable) -> Callable:
    prepared = set()

    def call(function, *args, **kwargs):
        if function.fn not in prepared:
            prepare(function.fn)
            prepared.add(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    return call


def _rounding(convert: Callable) -> Callable:
    def converted(values, source, target, mode):
        if mode is None and (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    return converted


def _numpy_types(look_up: Callable) -> Callable:
    numpy_type = cache(look_up)
    return lambda kind: numpy_type(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)


def _item_sizes(check: Callable) -> Callable:
    """Check the size of a number in memory once for each type that is to hold it."""
    sound = set()

    def post_init(self):
        pair = (self.dtype.name, self.data.itemsize)
        if pair not in sound:
            check(self)
            sound.add(pair)

    return post_init


def _block_types(make: Callable) -> Callable:
    """Let a block type take over what the first of its shape and of elements of that name found."""
    known: dict[Any, dict[str, Any]] = {}

    def init(self, element_ty, shape):
        key = (element_ty.name, *[side.value if type(side) is tl.constexpr else side for side in shape])
        found = known.get(key)
        if found is None:
            make(self, element_ty, shape)
            known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        else:
            self.__dict__.update(found, element_ty=element_ty)

    return init


def _tensors(make: Callable) -> Callable:
    """Let a tensor take over what the first of its type found."""
    known: dict[str, dict[str, Any]] = {}

    def init(self, handle, type):
        found = known.get(type.name)
        if found is None:
            make(self, handle, type)
            own = ("handle", "type", "dtype")
            known[type.name] = {name: value for name, value in vars(self).items() if name not in own}
        else:
            self.__dict__.update(found, handle=handle, type=type, dtype=type.scalar)

    return init


def _equality(compare: Callable) -> Callable:
    return lambda self, other: self is other or compare(self, other)


def _unwrapping(unwrap: Callable) -> Callable:
    plain = {tl.tensor, tl.dtype, int, float, bool, str, slice, type(None)}

    def quick(value):
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    return quick


def _casting(cast: Callable) -> Callable:
    def quick(self, value, kind, *rounding):
        return value if value.type.scalar is kind.scalar else cast(self, value, kind, *rounding)

    return quick


def _operands(kind: type) -> list[tuple[type, str, Callable]]:
    """Return what brings the two operands of an operation to one type, and to one shape."""
    convert, broadcast = kind.binary_op_type_checking_impl, kind.broadcast_impl_value

    def same_type(self, left, right, *given, **settings):
        if type(left) is tl.tensor:
            scalar = left.type.scalar
            limit = KEPT.get(scalar.name)
            if limit is not None:
                if type(right) is int and -limit <= right < limit:
                    return self.broadcast_impl_value(left, self.scalar_constant(right, scalar))
                if type(right) is tl.tensor and right.type.scalar is scalar:
                    return self.broadcast_impl_value(left, right)
        return convert(self, left, right, *given, **settings)

    def same_shape(self, left, right):
        a, b = left.type, right.type
        if a.is_block() and b.is_block() and [*a.shape] == [*b.shape]:
            return left, right
        return broadcast(self, left, right)

    return [(kind, "binary_op_type_checking_impl", same_type), (kind, "broadcast_impl_value", same_shape)]
