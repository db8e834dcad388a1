"""What a tensor says of its place, and how it gets from one place to the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

from .memory import CPU, Move, generators, naming_its_device, place_of, placed, put


class Generator(torch._C.Generator):
    """A generator that knows its device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = generators[made._cdata] = placed(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


def install() -> None:
    """Change `torch.Tensor`, and the functions that make tensors without an operation that could be seen."""
    Tensor.device = property(place_of)
    Tensor.is_cuda = property(lambda self: place_of(self).type == "cuda")
    Tensor.is_cpu = property(lambda self: place_of(self) == CPU)
    Tensor.get_device = lambda self: self.device.index if self.is_cuda else -1
    Tensor.to = _to(Tensor.to)
    Tensor.cuda = lambda self, device=None, non_blocking=False, memory_format=None: self.to(
        "cuda" if device is None else device
    )
    Tensor.cpu = lambda self, memory_format=None: self.to(CPU)
    Tensor.pin_memory = lambda self, device=None: self
    Tensor.record_stream = lambda self, stream: None
    Tensor.__deepcopy__ = _same_place(Tensor.__deepcopy__)
    for name in ("numpy", "__array__"):
        setattr(Tensor, name, _only_on_the_host(getattr(Tensor, name)))
    made_from_data = ("tensor", "as_tensor", "asarray")
    for function in _device_constructors():
        if getattr(torch, function.__name__, None) is function and function.__name__ not in made_from_data:
            setattr(torch, function.__name__, naming_its_device(function))
    for name in [name for name in dir(torch) if name.endswith("_like")]:
        setattr(torch, name, naming_its_device(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"):
        setattr(Tensor, name, naming_its_device(getattr(Tensor, name)))
    for name in made_from_data:
        setattr(torch, name, _made(getattr(torch, name)))
    Tensor.new_tensor = lambda self, data, *, dtype=None, device=None, requires_grad=False: torch.tensor(
        data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad
    )
    torch.Generator = Generator
    grouping = torch.nn.utils.clip_grad
    grouping._group_tensors_by_device_and_dtype = _by_place(grouping._group_tensors_by_device_and_dtype)
    optimizer = torch.optim.Optimizer
    optimizer._group_tensors_by_device_and_dtype = staticmethod(_by_place(optimizer._group_tensors_by_device_and_dtype))


def _by_place(original: Callable[..., dict]) -> Callable[..., dict]:
    """Name groups of tensors, which share a place, by it: the grouping itself asks C++ for it."""

    @wraps(original)
    def grouped(lists: Any, with_indices: bool = False) -> dict:
        groups = original(lists, with_indices)
        return {(place_of(group[0][0]), dtype): (group, at) for (_, dtype), (group, at) in groups.items()}

    return grouped


def _to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            return original(self, *args, **kwargs)
        here, there = place_of(self), place_of(self) if device is None else placed(device)
        options = {"dtype": dtype or self.dtype, "non_blocking": non_blocking}
        options |= {} if memory_format is None else {"memory_format": memory_format}
        if here == there:
            return original(self, copy=copy, **options)
        return Move.apply(original(self, **options), there)

    return to


def _same_place(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def copied(self: Tensor, memo: Any) -> Tensor:
        return put(original(self, memo), place_of(self))

    return copied


def _only_on_the_host(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def converted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place_of(self) != CPU:
            raise TypeError(
                f"can't convert {place_of(self)} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory."
            )
        return original(self, *args, **kwargs)

    return converted


def _default_device() -> torch.device:
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return contexts[-1].device if contexts else CPU


def _made(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function that turns data into a tensor."""

    @wraps(original)
    def made(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        if device is None:
            device = data.device if isinstance(data, Tensor) else _default_device()
        if torch.device(device).type not in ("cpu", "cuda"):
            return original(data, device=device, requires_grad=requires_grad, **options)
        if isinstance(data, Tensor):
            made = data.to(device, **options)
        else:
            options = {key: value for key, value in options.items() if key != "pin_memory"}
            made = original(data, device="cpu", **options)
        made = made if place_of(made) == placed(device) else Move.apply(made, placed(device))
        return made.requires_grad_() if requires_grad else made

    return made
